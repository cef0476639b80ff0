"""`duetto bench throughput`: everything arrives at once; how fast is it all done?"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from duetto.measure.metrics import SLO, JsonValue, Report, summarize
from duetto.measure.offline import OfflineLLM, mean_parts_s, records_of, run_offline
from duetto.measure.workload import Workload


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    report: Report
    parts_s: dict[str, float]  # the parts of a request's mean latency
    notes: tuple[str, ...]
    is_interrupted: bool = False

    def as_json(self) -> dict[str, JsonValue]:
        """`vllm bench throughput`'s five keys, and the report."""
        report = self.report
        num_tokens = report.num_input_tokens + report.num_output_tokens
        return {
            "elapsed_time": report.duration_s,
            "num_requests": report.num_requests,
            "total_num_tokens": num_tokens,
            "requests_per_second": report.per_second(report.num_ok),
            "tokens_per_second": report.per_second(num_tokens),
            **report.as_json(),
            "mean_parts_ms": {part: spent * 1000 for part, spent in self.parts_s.items()},
            "notes": self.notes,
            "interrupted": self.is_interrupted,
        }


def measure_throughput(
    llm: OfflineLLM,
    workload: Workload,
    *,
    slo: SLO | None = None,
    use_tqdm: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> ThroughputResult | None:
    """Run the whole workload at once. Arrival times in it are ignored.

    Once `is_stopped`, what the LLM has aborted is counted as such; None if nothing was begun.
    """
    start = perf_counter()
    outputs = run_offline(llm, workload.requests, use_tqdm=use_tqdm)
    duration_s = perf_counter() - start
    records = records_of(outputs)
    if not records:
        return None
    notes = workload.notes
    if is_stopped():
        notes = (*notes, "interrupted: what had not ended is counted as aborted")
    report = summarize(records, duration_s, slo=slo)
    return ThroughputResult(report, mean_parts_s(outputs), notes, is_interrupted=is_stopped())
