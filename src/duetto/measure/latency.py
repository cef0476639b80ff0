"""`duetto bench latency`: one batch of equal requests at a time, again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from duetto.core.errors import ConfigError
from duetto.measure.metrics import Distribution, JsonValue, Report, distribution, summarize
from duetto.measure.offline import OfflineLLM, records_of, run_offline
from duetto.measure.records import RequestRecord
from duetto.measure.workload import Lengths, random_workload

PERCENTILES = (10.0, 25.0, 50.0, 75.0, 90.0, 99.0)  # as `vllm bench latency` prints


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPlan:
    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    num_iters_warmup: int = 3
    num_iters: int = 10
    vocab_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "batch_size", "num_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more")
        if self.num_iters_warmup < 0:
            raise ConfigError("--num-iters-warmup: must be 0 or more")


@dataclass(frozen=True, slots=True)
class LatencyResult:
    latencies_s: tuple[float, ...]  # of whole batches
    report: Report  # over the requests of all measured batches
    is_interrupted: bool = False  # before all of them were

    @property
    def batch(self) -> Distribution:
        return distribution(self.latencies_s, PERCENTILES)

    def as_json(self) -> dict[str, JsonValue]:
        """`avg_latency`, `latencies` and `percentiles` in seconds as in vLLM, and the report."""
        percentiles: dict[str, JsonValue] = {
            f"{percentile:g}": value for percentile, value in self.batch.percentiles.items()
        }
        return {
            "avg_latency": self.batch.mean,
            "latencies": self.latencies_s,
            "percentiles": percentiles,
            **self.report.as_json(),
            "interrupted": self.is_interrupted,
        }


def measure_latency(
    llm: OfflineLLM,
    plan: LatencyPlan,
    *,
    advance: Callable[[int], None] = lambda _count: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> LatencyResult | None:
    """Time `num_iters` batches after some that count nowhere; calls advance(1) after each batch.

    Every prompt of every batch is different, so a prefix cache never helps. Once `is_stopped`, the
    batch under way does not count, and is the last; None if none was measured before.
    """
    num_batches = plan.num_iters_warmup + plan.num_iters
    workload = random_workload(
        num_batches * plan.batch_size,
        input_lengths=Lengths(plan.input_len),
        output_lengths=Lengths(plan.output_len),
        vocab_size=plan.vocab_size,
        seed=plan.seed,
    )
    latencies: list[float] = []
    records: list[RequestRecord] = []
    for first in range(0, num_batches * plan.batch_size, plan.batch_size):
        start = perf_counter()
        outputs = run_offline(llm, workload.requests[first : first + plan.batch_size])
        if is_stopped():
            break
        latencies.append(perf_counter() - start)
        records += records_of(outputs)
        advance(1)
    measured = latencies[plan.num_iters_warmup :]
    if not measured:
        return None
    return LatencyResult(
        tuple(measured),
        summarize(records[plan.num_iters_warmup * plan.batch_size :], sum(measured)),
        is_interrupted=len(latencies) < num_batches,
    )
