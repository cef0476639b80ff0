"""Why the cache gave a request no more of its prompt, or of a segment of it, than it did. Knows no
blocks."""

import enum
from dataclasses import dataclass
from typing import NamedTuple


class MissReason(enum.Enum):
    """What the first block that was not found has to say."""

    OFF = "off"  # prefix caching is turned off
    SCORED = "scored"  # the prompt is to be scored, so all of it is computed
    TOO_SHORT = "too_short"  # only whole blocks are kept, and the prompt is shorter than one
    NEVER_SEEN = "never_seen"  # nothing that began like this was computed before, or long ago
    DIFFERS = "differs"  # the last prompt that began alike had another token here
    EVICTED = "evicted"  # it was there, and its block was needed for others
    DROPPED = "dropped"  # it was there, and a user dropped it, or the cache was reset
    OTHER_SALT = "other_salt"  # the same tokens are there, of another tenant or cache_salt
    # Of segments only:
    AT_START = "at_start"  # the prompt begins with it: exact, and the prefix cache's
    ALL_COMPUTED = "all_computed"  # it is so short that the choice leaves nothing of it to reuse


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """The end of what the cache could give."""

    reason: MissReason
    token: int  # index of the first prompt token that had to be computed
    # Index of the first token that is another in the last prompt that began alike: for DIFFERS, and
    # for OTHER_SALT, where it is what may be told to those who must not know of others.
    differs_at: int | None = None


class SegmentHit(NamedTuple):
    """What was there of a segment's own KV when its request was first admitted."""

    start: int  # in the prompt
    end: int
    num_found: int = 0  # tokens; the others are computed, alone
    miss: MissReason | None = None  # why no more; None: all was there
    # Of the segment's tokens the first that is another in the last text that began alike.
    differs_at: int | None = None
