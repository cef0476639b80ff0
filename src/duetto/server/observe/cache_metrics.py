"""What /metrics shows of the KV cache's contents: evictions by reason, and what pins hold."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from duetto.core.cache_control import CacheCounts, EvictionReason


class CacheMetrics:
    """Counts come whole, from steps and from what users of the cache ask."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        evicted = Counter(
            "duetto:kv_cache_evicted_blocks",
            "KV blocks whose contents can no longer be found.",
            (*labels, "reason"),
            registry=registry,
        )
        self._evicted = {
            reason: evicted.labels(**labels, reason=reason.value) for reason in EvictionReason
        }
        pinned = Gauge(
            "duetto:kv_cache_pinned_blocks",
            "KV blocks that only a pin holds.",
            tuple(labels),
            registry=registry,
        )
        self._pinned = pinned.labels(**labels)
        self._counts = CacheCounts()

    @property
    def num_pinned_blocks(self) -> int:
        return self._counts.num_pinned_blocks

    def record(self, counts: CacheCounts) -> None:
        before, self._counts = self._counts, counts
        if counts == before:
            return
        for reason, counter in self._evicted.items():
            counter.inc(max(0, getattr(counts, reason.value) - getattr(before, reason.value)))
        self._pinned.set(counts.num_pinned_blocks)
