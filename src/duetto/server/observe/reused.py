"""What of a request's segments was there, and why the rest was not: in JSON, and for people.

Knows what is remembered of a request; knows no engine and no HTTP.
"""

from collections.abc import Sequence

from duetto.core.cache_miss import CacheMiss, SegmentHit
from duetto.server.http.json_parts import Json
from duetto.server.observe.miss import cache_miss

_NOT_MOVED = {
    "at_start": "the prompt begins with it, so what the prefix cache has of it is exact",
    "all_computed": "too short: the choice leaves nothing of it to reuse",
}
_MISSES = {
    "never_seen": "nothing remembered begins like it",
    "differs": "another text that begins alike has another token {differs_at}",
    "evicted": "it was there, and its blocks were taken for other requests",
    "dropped": "it was there, and a user of the cache dropped it",
    "other_salt": "the same text is there for another tenant or cache_salt",
}


def segments_found(hits: Sequence[SegmentHit], *, tells_other_salts: bool) -> list[Json]:
    return [
        {
            "start": hit.start,
            "end": hit.end,
            "found_tokens": hit.num_found,
            "miss": _miss(hit, tells_other_salts=tells_other_salts),
        }
        for hit in hits
    ]


def segment_lines(hits: Sequence[SegmentHit], *, tells_other_salts: bool) -> list[str]:
    """Of each segment, in words."""
    return [_line(hit, tells_other_salts=tells_other_salts) for hit in hits]


def _miss(hit: SegmentHit, *, tells_other_salts: bool) -> Json | None:
    """As a miss of the prefix cache, `token` and `differs_at` counted from the segment's first."""
    if hit.miss is None:
        return None
    miss = CacheMiss(hit.miss, hit.num_found, hit.differs_at)
    return cache_miss(miss, tells_other_salts=tells_other_salts)


def _line(hit: SegmentHit, *, tells_other_salts: bool) -> str:
    miss, size = _miss(hit, tells_other_salts=tells_other_salts), hit.end - hit.start
    return f"tokens {hit.start} to {hit.end - 1}: {_cause(miss, hit.num_found, size)}"


def _cause(miss: Json | None, num_found: int, size: int) -> str:
    if miss is None:
        return "their own KV was there"
    reason = miss["reason"]
    if reason in _NOT_MOVED:
        return _NOT_MOVED[reason]
    share = f"{num_found} of {size} were there; the others were" if num_found else "all were"
    return f"{share} computed alone: {_MISSES[reason].format(**miss)}"
