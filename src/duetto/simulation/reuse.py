"""Loads whose documents' KV is reused: how it is asked for, and what came of it, all together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import NO_LIMITS, ReuseLimits, parse_reuse
from duetto.core.timings import RequestTimings
from duetto.measure.metrics import JsonValue
from duetto.simulation.workload import Traffic

FLAG = "--reuse"
_NO_DOCUMENTS = "nothing of it is there to be reused: it needs --random-documents, or a --trace \
with hash_ids (mooncake)"


def with_reuse(traffic: Traffic, word: str | None, limits: ReuseLimits = NO_LIMITS) -> Traffic:
    """A load whose documents are marked. Raises ConfigError, naming the flag, for what is no
    choice, or none on this model, and for a load without documents."""
    try:
        choice = None if word is None else parse_reuse(word, FLAG)
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
    if choice is None:
        return traffic
    marked = replace(traffic, reuse=choice)
    if not any(marked.num_documents(arrival) for arrival in marked.arrivals):
        raise ConfigError(f"{FLAG} {word}: {_NO_DOCUMENTS}")
    if reason := limits.why_not(choice, (TokenRange(0, traffic.hash_block),)):
        raise ConfigError(f"{FLAG} {word}: {reason}")
    notes = [f"documents are blocks of {traffic.hash_block} tokens, and reused by {choice}"]
    if not _has_moved(traffic):
        notes.append(
            "no document stands behind different ones in different prompts: the prefix cache alone "
            "finds all that reuse does, and what it finds is exact"
        )
    return replace(marked, notes=(*traffic.notes, *notes))


def _has_moved(traffic: Traffic) -> bool:
    """Whether a document comes behind different ones; in Mooncake's trace none does, as a hash id
    there stands for all blocks up to its own."""
    behind: dict[int, int | None] = {}
    for arrival in traffic.arrivals:
        before = None
        for hash_id in arrival.hash_ids:
            if behind.setdefault(hash_id, before) != before:
                return True
            before = hash_id
    return False


@dataclass(frozen=True, slots=True)
class ReuseTotals:
    """Tokens of all prompts. Exact, reused, recomputed and computed ones are the whole of them."""

    num_exact: int
    num_reused: int
    num_recomputed: int
    num_computed: int
    num_missing: int  # of documents that were not there: computed besides, each alone
    num_segments: int
    misses: Mapping[str, int]  # of them, by reason

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "exact_tokens": self.num_exact,
            "reused_tokens": self.num_reused,
            "recomputed_tokens": self.num_recomputed,
            "computed_tokens": self.num_computed,
            "missing_tokens": self.num_missing,
            "segments": self.num_segments,
            "misses": dict(self.misses),
        }

    @property
    def words(self) -> str:
        parts = [
            f"{self.num_exact:,} tokens of prompts exact, {self.num_reused:,} reused, "
            f"{self.num_recomputed:,} of documents and {self.num_computed:,} others computed"
        ]
        if self.num_missing:
            parts.append(f"{self.num_missing:,} computed besides, as documents were not there")
        if self.misses:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.misses.items())
            parts.append(f"of {self.num_segments} documents: {causes}")
        return "reuse: " + "; ".join(parts)


def total_reuse(all_timings: Sequence[RequestTimings]) -> ReuseTotals | None:
    """None if no request was marked."""
    counts = [timings.reuse for timings in all_timings if timings.reuse is not None]
    if not counts:
        return None
    hits = [hit for timings in all_timings for hit in timings.segment_hits]
    missed = Counter(hit.miss.value for hit in hits if hit.miss is not None)
    return ReuseTotals(
        num_exact=sum(count.num_exact for count in counts),
        num_reused=sum(count.num_reused for count in counts),
        num_recomputed=sum(count.num_recomputed for count in counts),
        num_computed=sum(count.num_computed for count in counts),
        num_missing=sum(count.num_missing for count in counts),
        num_segments=len(hits),
        misses=dict(sorted(missed.items())),
    )
