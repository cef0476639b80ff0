"""What /metrics shows of KV that moves between engines. Its series are there once some has moved,
or was to."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter

from duetto.core.kv_transfers import KVTransfers

_BYTES = {"in": "num_bytes_in", "out": "num_bytes_out"}
_OUTCOMES = {
    "imported": "num_imported",
    "exported": "num_exported",
    "refused": "num_refused",
    "failed": "num_failed",
}


class TransferMetrics:
    """Counts come as what is new. Reasons are the code's own, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        def counter(name: str, what: str, *own: str) -> Counter:
            return Counter(f"duetto:{name}", what, (*labels, *own), registry=registry)

        self._labels = labels
        self._bytes = counter("kv_transfer_bytes", "KV moved between engines.", "direction")
        self._outcomes = counter(
            "kv_transfers", "Prompts computed for or by another engine.", "outcome"
        )
        self._local = counter(
            "prefill_local", "Prompts that a decode worker computed itself.", "reason"
        )
        self._exposed = counter(
            "kv_transfer_exposed_seconds", "From the end of a prefill to when all had arrived."
        )
        self._alarms = counter("kv_transfer_alarms", "Times that nothing came for long.")

    def record(self, moved: KVTransfers) -> None:
        labels = self._labels
        for direction, name in _BYTES.items():
            self._bytes.labels(**labels, direction=direction).inc(getattr(moved, name))
        for outcome, name in _OUTCOMES.items():
            self._outcomes.labels(**labels, outcome=outcome).inc(getattr(moved, name))
        for reason, number in moved.local:
            self._local.labels(**labels, reason=reason).inc(number)
        self._exposed.labels(**labels).inc(max(0.0, moved.exposed_s))
        self._alarms.labels(**labels).inc(moved.num_alarms)
