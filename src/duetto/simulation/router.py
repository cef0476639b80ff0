"""Which replica gets a request. Knows replicas by number, and of each only what a router sees:
what it has sent there and what has come back.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

from duetto.core.errors import ConfigError
from duetto.scheduler.block_pool import BlockHash, next_hash, root_hash

RouterName = Literal["round-robin", "least-loaded", "prefix-affinity"]
Loads = Callable[[], Sequence[int]]  # per replica, the tokens of prompts sent and not yet answered

_BLOCK = 128  # tokens; what is known of a prefix is known in steps of this size
_ROOT = root_hash(b"router", b"")
_OVERLOAD = 1.25  # times the mean load, at which affinity gives way
_LARGE = 8192  # tokens; ... unless the load is this small anyway


class Router(Protocol):
    def choose(self, prompt: Sequence[int], loads: Loads, /) -> int:
        """The replica for a prompt. `loads` costs something, so it is asked only if needed."""
        ...


class RoundRobin:
    """In turn."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._next = 0

    def choose(self, _prompt: Sequence[int], _loads: Loads, /) -> int:
        chosen = self._next
        self._next = (chosen + 1) % self._num_replicas
        return chosen


class LeastLoaded:
    """Where the fewest tokens are under way; ties go in turn, so that idle ones share."""

    def __init__(self, num_replicas: int) -> None:
        self._turn = RoundRobin(num_replicas)

    def choose(self, prompt: Sequence[int], loads: Loads, /) -> int:
        known = loads()
        turn = self._turn.choose(prompt, loads)
        return min(range(len(known)), key=lambda i: (known[i], (i - turn) % len(known)))


class PrefixAffinity:
    """Where the longest beginning of the prompt was sent before, unless that replica is overloaded.

    Bounded as consistent hashing with bounded loads is (Mirrokni et al., SODA 2018): a replica with
    more than 1.25 times the mean load gets nothing for affinity's sake. Without a match, and for an
    overloaded one, the least loaded is chosen.
    """

    def __init__(self, num_replicas: int) -> None:
        self._others = LeastLoaded(num_replicas)
        self._sent: dict[BlockHash, int] = {}  # the last replica that a prefix went to

    def choose(self, prompt: Sequence[int], loads: Loads, /) -> int:
        hashes = _prefix_hashes(prompt)
        chosen = next((self._sent[h] for h in reversed(hashes) if h in self._sent), None)
        known = loads()
        if chosen is None or known[chosen] > max(_LARGE, _OVERLOAD * sum(known) / len(known)):
            chosen = self._others.choose(prompt, loads)
        self._sent.update(dict.fromkeys(hashes, chosen))
        return chosen


_ROUTERS: dict[RouterName, Callable[[int], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-affinity": PrefixAffinity,
}


def make_router(name: RouterName, num_replicas: int) -> Router:
    """Raises ConfigError for a name that there is not."""
    if name not in _ROUTERS:
        accepted = ", ".join(get_args(RouterName))
        raise ConfigError(f"--router: {name!r} is not one of {accepted}")
    return _ROUTERS[name](num_replicas)


def _prefix_hashes(prompt: Sequence[int]) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    for start in range(0, len(prompt) - _BLOCK + 1, _BLOCK):
        parent = hashes[-1] if hashes else _ROOT
        hashes.append(next_hash(parent, prompt[start : start + _BLOCK]))
    return hashes
