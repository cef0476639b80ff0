"""What /metrics shows, under vLLM's names, from step records, final updates and HTTP replies.

Every label value comes from a closed set, so no client can make series grow. Lives on the event
loop; knows no HTTP beyond three labels. Definitions: docs/metrics.md.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import StepDrafts
from duetto.core.request import FinishReason, Request
from duetto.core.reuse_count import ReuseCount
from duetto.core.timings import Part, RequestTimings
from duetto.server.observe.cache_metrics import CacheMetrics
from duetto.server.observe.transfer_metrics import TransferMetrics
from duetto.server.settings import ServerSettings

# Seconds, as vLLM's dashboards expect them.
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKEN_BUCKETS = tuple(float(2**i) for i in range(15))
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Metrics:
    """One registry per server, so that two in one process do not meet."""

    def __init__(self, settings: ServerSettings, config: SchedulerConfig) -> None:
        self._registry = CollectorRegistry()
        for collect in (ProcessCollector, PlatformCollector, GCCollector):
            collect(registry=self._registry)
        self._labels = {"model_name": settings.served_model_name, "engine": "0"}
        self.cache = CacheMetrics(self._registry, self._labels)
        self._transfers: TransferMetrics | None = None  # until something moves
        self._num_blocks = config.num_blocks
        self._make_step_metrics(config, settings.kv_cache_dtype)
        self._make_request_metrics(config)
        self._drafts = self._make_draft_metrics(max(settings.max_drafts.values(), default=0))
        self._http_requests = Counter(
            "http_requests",
            "HTTP replies.",
            ("handler", "method", "status"),
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From head to end of the reply, streams included.",
            ("handler", "method"),
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)

    def record_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one reply; `handler` and `method` must come from closed sets."""
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def record_step(self, record: StepRecord) -> None:
        self._num_running.set(record.num_running)
        self._num_waiting.set(record.num_waiting)
        self._num_blocks = record.num_blocks  # of all engines that are there, if they are several
        self._kv_usage.set(1.0 - record.num_free_blocks / record.num_blocks)
        self._num_preemptions.inc(record.num_preemptions)
        self._queried_tokens.inc(record.num_queried_tokens)
        self._hit_tokens.inc(record.num_hit_tokens)
        self._step_tokens.observe(record.num_tokens)
        self.cache.record(record.cache)
        if record.drafts is not None and self._drafts is not None:
            self._drafts.record(record.drafts)

        if record.transfers is not None:
            if self._transfers is None:
                self._transfers = TransferMetrics(self._registry, self._labels)
            self._transfers.record(record.transfers)

    def record_idle(self) -> None:
        """Nothing runs, nothing waits, and so no block is in use but those that are pinned."""
        for gauge in (self._num_running, self._num_waiting):
            gauge.set(0)
        self._kv_usage.set(self.cache.num_pinned_blocks / self._num_blocks)

    def record_update(self, request: Request, update: RequestUpdate) -> None:
        self._generation_tokens.inc(len(update.tokens))
        if update.finish_reason is None:
            return
        self._finished[update.finish_reason].inc()
        self._params_n.observe(request.sampling.n)
        self._params_max_tokens.observe(request.max_tokens)
        if update.timings is None:
            return
        if update.timings.token_times or update.embedding:
            self._record_prompt(request, update, update.timings)
        if update.timings.token_times:
            self._record_tokens(update.timings)

    def _record_prompt(
        self, request: Request, update: RequestUpdate, timings: RequestTimings
    ) -> None:
        self._prompt_tokens.inc(request.num_prompt_tokens)
        self._cached_tokens.inc(update.num_cached_tokens)
        reuse = timings.reuse
        num_reused = 0 if reuse is None else reuse.num_reused
        if reuse is not None:
            self._record_reuse(reuse)
        num_computed = request.num_prompt_tokens - update.num_cached_tokens - num_reused
        self._tokens_by_source["local_compute"].inc(num_computed)
        self._tokens_by_source["local_cache_hit"].inc(update.num_cached_tokens)
        self._tokens_by_source["local_reuse"].inc(num_reused)
        self._request_computed_tokens.observe(num_computed)
        self._request_prompt_tokens.observe(request.num_prompt_tokens)
        self._request_generation_tokens.observe(len(timings.token_times))
        if timings.e2e_s is not None:
            self._e2e.observe(timings.e2e_s)
        self._queue.observe(timings.parts[Part.WAITING] + timings.parts[Part.BLOCKS])

    def _record_tokens(self, timings: RequestTimings) -> None:
        first, last = timings.token_times[0], timings.token_times[-1]
        started = timings.first_scheduled_time
        self._ttft.observe(first - timings.arrival_time)
        _observe_all(self._itl, timings.itl_s)
        if timings.tpot_s is not None:
            self._tpot.observe(timings.tpot_s)
        self._decode.observe(last - first)
        if started is not None:
            self._prefill.observe(first - started)
            self._inference.observe(last - started)

    def _make_step_metrics(self, config: SchedulerConfig, kv_cache_dtype: str) -> None:
        self._num_running = self._gauge("num_requests_running", "Requests admitted.")
        self._num_waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.")
        self._num_preemptions = self._counter("num_preemptions", "Requests put back, all told.")
        self._queried_tokens = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hit_tokens = self._counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step.", STEP_TOKEN_BUCKETS
        )
        info = {
            "cache_dtype": kv_cache_dtype,
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(config.num_blocks),  # the name that dashboards know
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        names = (*self._labels, *info)
        gauge = Gauge("vllm:cache_config_info", "The KV cache.", names, registry=self._registry)
        gauge.labels(**self._labels, **info).set(1)

    def _make_request_metrics(self, config: SchedulerConfig) -> None:
        tokens = _token_buckets(config.max_model_len)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of these, not computed again.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens sampled.")
        finished = Counter(
            "vllm:request_success",
            "Requests that ended.",
            (*self._labels, "finished_reason"),
            registry=self._registry,
        )
        self._finished = {
            reason: finished.labels(**self._labels, finished_reason=reason.value)
            for reason in FinishReason
        }
        by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of answered requests.",
            (*self._labels, "source"),
            registry=self._registry,
        )
        self._tokens_by_source = {
            source: by_source.labels(**self._labels, source=source)
            for source in ("local_compute", "local_cache_hit", "local_reuse")
        }
        self._make_reuse_metrics()
        self._ttft = self._histogram("time_to_first_token_seconds", "TTFT.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "ITL.", TOKEN_GAP_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "TPOT of a request.", TOKEN_GAP_BUCKETS
        )
        self._e2e = self._latency("e2e_request_latency_seconds", "Arrival to end.")
        self._queue = self._latency("request_queue_time_seconds", "Arrival to admission.")
        self._prefill = self._latency("request_prefill_time_seconds", "Admission to first token.")
        self._decode = self._latency("request_decode_time_seconds", "First to last token.")
        self._inference = self._latency("request_inference_time_seconds", "Both of these.")
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Per request.", tokens
        )
        self._request_computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", tokens
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Per request.", tokens
        )
        self._params_max_tokens = self._histogram("request_params_max_tokens", "As asked.", tokens)
        self._params_n = self._histogram("request_params_n", "As asked.", N_BUCKETS)

    def _make_reuse_metrics(self) -> None:
        requests = Counter(
            "duetto:reuse_requests",
            "Requests that asked for reuse, by whether anything was reused.",
            (*self._labels, "outcome"),
            registry=self._registry,
        )
        tokens = Counter(
            "duetto:reuse_tokens",
            "Of their prompts: reused, recomputed in segments, or missing and computed apart.",
            (*self._labels, "kind"),
            registry=self._registry,
        )
        self._reuse_requests = {
            outcome: requests.labels(**self._labels, outcome=outcome)
            for outcome in ("reused", "computed")
        }
        self._reuse_tokens = {
            kind: tokens.labels(**self._labels, kind=kind)
            for kind in ("reused", "recomputed", "missing")
        }

    def _record_reuse(self, count: ReuseCount) -> None:
        self._reuse_requests["reused" if count.num_reused else "computed"].inc()
        self._reuse_tokens["reused"].inc(count.num_reused)
        self._reuse_tokens["recomputed"].inc(count.num_recomputed)
        self._reuse_tokens["missing"].inc(count.num_missing)

    def _make_draft_metrics(self, max_drafts: int) -> "_DraftMetrics | None":
        """vLLM has them only where speculation is on, and so have we."""
        if not max_drafts:
            return None
        by_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts by their place, from 0.",
            (*self._labels, "position"),
            registry=self._registry,
        )
        return _DraftMetrics(
            chains=self._counter("spec_decode_num_drafts", "Chains of drafts that were verified."),
            proposed=self._counter("spec_decode_num_draft_tokens", "Drafts in them."),
            accepted=self._counter("spec_decode_num_accepted_tokens", "Of these, accepted."),
            by_place=[by_place.labels(**self._labels, position=str(i)) for i in range(max_drafts)],
            drafting=self._counter("spec_decode_drafting_seconds", "Spent proposing.", "duetto"),
            verifying=self._counter(
                "spec_decode_verifying_seconds", "Added to steps, by their prices.", "duetto"
            ),
        )

    def _gauge(self, name: str, what: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", what, tuple(self._labels), registry=self._registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, what: str, whose: str = "vllm") -> Counter:
        counter = Counter(f"{whose}:{name}", what, tuple(self._labels), registry=self._registry)
        return counter.labels(**self._labels)

    def _latency(self, name: str, what: str) -> Histogram:
        return self._histogram(name, what, LATENCY_BUCKETS)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", what, tuple(self._labels), buckets=buckets, registry=self._registry
        )
        return histogram.labels(**self._labels)


@dataclass(frozen=True, slots=True)
class _DraftMetrics:
    chains: Counter
    proposed: Counter
    accepted: Counter
    by_place: list[Counter]
    drafting: Counter
    verifying: Counter

    def record(self, drafts: StepDrafts) -> None:
        count = drafts.verified.total
        self.chains.inc(drafts.verified.num_chains)
        self.proposed.inc(count.num_proposed)
        self.accepted.inc(count.num_accepted)
        for counter, num_accepted in zip(self.by_place, drafts.verified.accepted, strict=False):
            counter.inc(num_accepted)
        self.drafting.inc(max(0.0, drafts.drafting_s))
        self.verifying.inc(max(0.0, drafts.verifying_s or 0.0))


def _observe_all(histogram: Histogram, values: list[float]) -> None:
    """`observe` each value, in a sixth of the time: an answer has thousands of gaps, and they come
    with its end. The client library has no call for several."""
    values.sort()
    seen = 0
    for bound, bucket in zip(histogram._upper_bounds, histogram._buckets, strict=True):
        upto = bisect_right(values, bound)
        if upto > seen:
            bucket.inc(upto - seen)
        seen = upto
    histogram._sum.inc(sum(values))


def _token_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to the context's length."""
    ladder = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return tuple(float(bound) for bound in ladder if bound <= most)
