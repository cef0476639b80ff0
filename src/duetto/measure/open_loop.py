"""A workload through engines of this process, each request at its own time, whatever is answered.

Knows engines by their handles only: where several are fed, they take turns, as the simplest of
routers has it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from threading import Event
from time import monotonic, sleep

from duetto.core.batch import StepRecord
from duetto.core.errors import DuettoError
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import StepReport
from duetto.engine.handle import EngineHandle, EngineOpener
from duetto.measure.records import RequestRecord, record_from_timings
from duetto.measure.workload import Workload, WorkloadRequest
from duetto.pricing.learned import LearnedStepTime

_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class OpenedEngines:
    """What is fed, and what helps those (it computes their prompts, say)."""

    fed: Sequence[EngineOpener]
    helping: Sequence[EngineOpener] = ()
    prefill_at: tuple[str, ...] = ()  # links of the helping ones


@dataclass(slots=True)
class OpenLoopRun:
    """What came of one run. Records are in the workload's order."""

    duration_s: float = 0.0
    records: list[RequestRecord] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    steps: list[list[StepRecord]] = field(default_factory=list)  # by engine, the fed ones first


@dataclass(slots=True)
class _Live:
    """A run under way. Each engine reports on a thread of its own; a request has one engine."""

    workload: Workload
    is_over: Event = field(default_factory=Event)
    records: dict[int, RequestRecord] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)
    steps: list[list[StepRecord]] = field(default_factory=list)

    def deliver(self, engine: int, report: StepReport) -> None:
        if report.record is not None:
            self.steps[engine].append(report.record)
        for update in report.updates:
            index = int(update.request_id)
            self.answers[index] += [token.token_id for token in update.tokens]
            if update.finish_reason is None or update.timings is None:
                continue
            prompt = self.workload.requests[index].prompt_token_ids or ()
            self.records[index] = record_from_timings(
                update.timings,
                num_prompt_tokens=len(prompt),
                num_cached_tokens=update.num_cached_tokens,
                finish_reason=update.finish_reason.value,
            )
            if len(self.records) == len(self.workload.requests):
                self.is_over.set()


def run_open_loop(
    engines: OpenedEngines, workload: Workload, *, timeout_s: float = 600.0
) -> OpenLoopRun:
    """Run to the end, greedily and to full lengths. Raises DuettoError if an engine fails or the
    end does not come in time."""
    openers = [*engines.fed, *engines.helping]
    live = _Live(workload, answers=[[] for _ in workload.requests], steps=[[] for _ in openers])
    with ExitStack() as stack:
        handles = []
        for number, opener in enumerate(openers):
            handle = opener(lambda report, number=number: live.deliver(number, report))  # type: ignore[misc]
            handle.start()
            stack.callback(handle.stop, _STOP_S)
            handles.append(handle)
        start = monotonic()
        _feed(handles[: len(engines.fed)], workload, start, engines.prefill_at)
        until = monotonic() + timeout_s
        while not live.is_over.wait(0.2):
            if monotonic() > until or any(handle.has_failed for handle in handles):
                num_open = len(workload.requests) - len(live.records)
                raise DuettoError(f"{num_open} requests have no answer: an engine failed or hangs")
        duration_s = monotonic() - start
    records = [live.records[index] for index in range(len(workload.requests))]
    return OpenLoopRun(duration_s, records, live.answers, live.steps)


def _feed(
    handles: Sequence[EngineHandle], workload: Workload, start: float, prefill_at: tuple[str, ...]
) -> None:
    for index, wanted in sorted(enumerate(workload.requests), key=lambda each: each[1].arrival_s):
        wait_s = start + wanted.arrival_s - monotonic()
        if wait_s > 0:
            sleep(wait_s)
        request = _request_at(index, wanted, start)
        request.prefill_at = prefill_at
        handles[index % len(handles)].add(request)


def _request_at(index: int, wanted: WorkloadRequest, start: float) -> Request:
    return Request(
        request_id=str(index),
        prompt_token_ids=wanted.prompt_token_ids or (),
        sampling=SamplingParams(
            temperature=0.0, max_tokens=wanted.num_output_tokens, ignore_eos=True
        ),
        max_tokens=wanted.num_output_tokens,
        seed=0,
        arrival_time=start + wanted.arrival_s,
    )


def check_same_answers(runs: Sequence[OpenLoopRun]) -> None:
    """Raises DuettoError if two runs of a workload differ in a token: whoever schedules it, and
    wherever its KV comes from, an answer is the same."""
    for run in runs[1:]:
        differ = [
            i for i, (a, b) in enumerate(zip(run.answers, runs[0].answers, strict=True)) if a != b
        ]
        if differ:
            raise DuettoError(f"request {differ[0]}: two runs of one load differ in their answers")


# --- what steps took -----------------------------------------------------------------------------

_GAP_S = 0.003  # between two steps of an engine that had work all the time


def learn_steps(times: LearnedStepTime, steps: Sequence[StepRecord]) -> None:
    """Let a price learn from an engine's steps. One that another follows at once takes until that
    begins: what is decided between them is part of it, and a simulation has no other place for
    it."""
    for record, following in zip_longest(steps, steps[1:]):
        end_s = record.end_time
        if following is not None and following.start_time - end_s < _GAP_S:
            end_s = following.start_time
        times.observe(record.shape, end_s - record.start_time)
