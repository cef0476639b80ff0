"""What looks see in a simulation, which has no attention and no KV: numbers out of a hash.

So the same input gives the same output, and which tokens are chosen is spread over the documents;
how good the choice is, a simulation cannot say.
"""

from bisect import bisect_right
from zlib import crc32

from duetto.core.batch import Look, ScheduledRequest
from duetto.simulation.uniform import uniform

_WEIGHTS = 2**20  # of a token's attention: as many as there are units of it


def seen(item: ScheduledRequest, look: Look) -> tuple[float, ...]:
    """As the executor that computes would tell it: of each token of the step, or of each position
    that is looked at, the more the more tokens look, so that chunks of any size add up alike."""
    seed = crc32(item.request_id.encode())
    positions = [place for start, end in item.runs for place in range(start, end)]
    if look.method == "deviation":
        return tuple([uniform(seed, place) for place in positions])
    return tuple(
        [
            float(int(uniform(seed, place) * _WEIGHTS) * _num_behind(positions, place))
            for start, end in look.ranges
            for place in range(start, end)
        ]
    )


def _num_behind(positions: list[int], place: int) -> int:
    """Tokens at a position or after it: they see what lies there."""
    return len(positions) - bisect_right(positions, place - 1)
