"""From remembered steps to what is shown: the segments of one request's life, and a trace.

Plain functions from records to JSON; they know no engine and no HTTP.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import sleep

from duetto.core.batch import StepRecord
from duetto.core.draft_counts import StepDrafts
from duetto.core.shape import BatchShape, RequestShape
from duetto.core.trace_events import counter, process_name, span, track_name
from duetto.server.http.json_parts import Json
from duetto.server.observe.history import Ended, RememberedStep, Running

RoofTime = Callable[[BatchShape], float]  # seconds a step would take if it reached its roof

ROWS_PER_PAUSE = 500  # of one request in one step, each of which takes one or two microseconds
ROWS_PER_PRICE, ROWS_PER_EVENT = 10, 10
PAUSE_S = 1e-4


@dataclass(slots=True)
class Segment:
    """Steps in a row, or a wait, that one request spent alike."""

    kind: str  # wait, prompt, recompute, decode, shared
    start: float
    end: float
    num_steps: int = 0
    num_tokens: int = 0
    num_other_prompt_tokens: int = 0
    max_requests: int = 0
    longest_step_s: float = 0.0
    predicted_s: float | None = None
    roof_s: float | None = None
    busy_s: float = 0.0  # of its steps, without what lies between them
    num_drafts: int = 0  # of its tokens: proposals that were verified, rejected ones too

    def add(
        self, step: StepRecord, end: float, num_tokens: int, others: int, roof_s: float | None
    ) -> None:
        """One more step, which concerned the request until `end`."""
        duration = end - step.start_time
        self.end = end
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_other_prompt_tokens += others
        self.max_requests = max(self.max_requests, step.num_scheduled)
        self.longest_step_s = max(self.longest_step_s, duration)
        self.busy_s += duration
        self.predicted_s = _plus(self.predicted_s, step.predicted_s)
        self.roof_s = _plus(self.roof_s, roof_s)

    def shown(self, origin: float) -> Json:
        """Milliseconds after `origin`."""
        if not self.num_steps:
            return {"kind": self.kind, **_span(self, origin)}
        return {
            "kind": self.kind,
            **_span(self, origin),
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "drafts": self.num_drafts,
            "others_prompt_tokens": self.num_other_prompt_tokens,
            "max_requests": self.max_requests,
            "longest_step_ms": ms(self.longest_step_s),
            "busy_ms": ms(self.busy_s),
            "steps_expected_ms": ms(self.predicted_s),
            "of_roof": fraction(self.roof_s, self.busy_s),
        }


class Steps:
    """Remembered steps, with those that each of some requests was in: found in one pass."""

    def __init__(
        self, steps: Sequence[RememberedStep], wanted: Iterable[str], roof_time: RoofTime | None
    ) -> None:
        """`wanted` are the ids of the requests that will be asked for."""
        self.pace = Pace()
        self._steps = steps
        self._roof_time = roof_time
        self._roofs: dict[int, float] = {}
        # Of each request: numbers of steps, and its place in them.
        self._of = {each: (array("L"), array("L")) for each in wanted}
        for number, step in enumerate(steps):
            for place, request_id in enumerate(step.record.request_ids):
                mine = self._of.get(request_id)
                if mine is not None:
                    mine[0].append(number)
                    mine[1].append(place)
            self.pace.did(len(step.record.request_ids))

    def has(self, request_id: str) -> bool:
        """Whether any of the steps computed something for a request."""
        return bool(self._of[request_id][0])

    def of(self, request_id: str) -> Iterator[tuple[int, StepRecord, RequestShape]]:
        """The steps that did, oldest first: their numbers, records, and what they computed."""
        for number, place in zip(*self._of[request_id], strict=True):
            step = self._steps[number]
            yield number, step.record, step.request_shape(place)

    def roof_s(self, number: int) -> float | None:
        """What a step would have taken at the roof; priced once, however often it is asked."""
        if self._roof_time is None:
            return None
        known = self._roofs.get(number)
        if known is None:
            known = self._roofs[number] = self._roof_time(self._steps[number].shape())
            self.pace.did(ROWS_PER_PRICE)
        return known


class Pace:
    """A pause after each millisecond or so of work: threads that wait for the interpreter, the
    event loop's and the engine's, would otherwise get it every 5 ms only."""

    def __init__(self) -> None:
        self._num_rows = 0

    def did(self, num_rows: int) -> None:
        """Call it after work, `num_rows` times what one request in one step takes."""
        self._num_rows += num_rows
        if self._num_rows >= ROWS_PER_PAUSE:
            self._num_rows = 0
            sleep(PAUSE_S)


def segments(ended: Ended, steps: Steps) -> tuple[list[Segment], bool]:
    """What a request did, in order; and whether all of its steps are still remembered."""
    found, num_tokens = segments_until(ended, steps, ended.finish_time)
    return found, _is_whole(ended, num_tokens)


def segments_until(
    request: Ended | Running, steps: Steps, until: float
) -> tuple[list[Segment], int]:
    """What a request did up to an instant, in order; and how many tokens were computed for it."""
    found = [Segment("wait", request.arrival_time, request.arrival_time)]
    reached, num_tokens = 0, 0  # the most that it ever had computed, and tokens in all
    at = 0  # what it had computed after the step before
    for number, step, own in steps.of(request.request_id):
        if step.start_time > until:
            break
        if not num_tokens:
            found[0].end = step.start_time
        kind, others = _kind(step, own, reached, request.num_prompt_tokens)
        if own.num_past < at:  # it has lost its blocks in between
            found.append(Segment("wait", found[-1].end, step.start_time))
        # A step goes on after a request's last token: others' text is made, and it is recorded.
        end = min(step.end_time, until)
        if found[-1].kind != kind:
            found.append(Segment(kind, step.start_time, end))
        found[-1].add(step, end, own.num_new, others, steps.roof_s(number))
        drafts = num_drafts(own, request.num_prompt_tokens)
        found[-1].num_drafts += drafts
        at = own.num_past + own.num_new - drafts  # how many of them were accepted is not known here
        reached = max(reached, at)
        num_tokens += own.num_new
        steps.pace.did(1)
    if not num_tokens:
        found[0].end = until
    return found, num_tokens


def num_drafts(own: RequestShape, num_prompt_tokens: int) -> int:
    """Of what a step computed for a request, the proposals. Beyond the prompt, whose rows may be
    scored, each row of logits beside the first is a draft's."""
    return max(0, own.num_logit_rows - 1) if own.num_past >= num_prompt_tokens else 0


def _kind(
    step: StepRecord, own: RequestShape, reached: int, num_prompt_tokens: int
) -> tuple[str, int]:
    """What a step was for one of its requests, and how many tokens of others' prompts it had."""
    if own.num_past + own.num_new <= reached:
        kind, own_prompt = "recompute", own.num_new
    elif own.num_past < num_prompt_tokens:
        kind, own_prompt = "prompt", own.num_new
    else:
        kind, own_prompt = "decode", 0
    others = step.num_prompt_tokens - min(own_prompt, step.num_prompt_tokens)
    return "shared" if kind == "decode" and others else kind, others


def trace(
    remembered: Sequence[RememberedStep], own: Sequence[Ended], roof_time: RoofTime | None
) -> Iterator[Json]:
    """Chrome's trace events, which Perfetto (ui.perfetto.dev) loads: a track of steps, counters,
    and a track for each of the requests that are given and were in one of the steps."""
    steps = Steps(remembered, [ended.request_id for ended in own], roof_time)
    yield process_name(1, "engine")
    for engine in sorted({step.record.engine for step in remembered} or {0}):
        yield track_name(1, 1 + engine, f"steps of engine {engine}" if engine else "steps")
    for number, step in enumerate(remembered):
        yield from _step_events(step.record, steps.roof_s(number))
        steps.pace.did(ROWS_PER_EVENT)
    yield process_name(2, "requests")
    seen = (ended for ended in own if steps.has(ended.request_id))
    for track, ended in enumerate(seen, start=1):
        mine = [s for s in segments(ended, steps)[0] if s.end > s.start]
        yield track_name(2, track, ended.request_id)
        for s in mine:
            yield span(2, track, s.kind, s.start, s.end, **s.shown(s.start))
            steps.pace.did(ROWS_PER_EVENT)


def _step_events(step: StepRecord, roof_s: float | None) -> list[Json]:
    duration = step.end_time - step.start_time
    told = {
        "tokens": step.num_tokens,
        "prompt_tokens": step.num_prompt_tokens,
        "requests": step.num_scheduled,
        "preemptions": step.num_preemptions,
        "expected_ms": ms(step.predicted_s),
        "of_roof": fraction(roof_s, duration),
    }
    spans = []
    if step.drafts is not None:
        told |= _draft_args(step.drafts)
        # Proposing is the last that an executor does; what the scheduler does after it is short.
        start = max(step.start_time, step.end_time - step.drafts.drafting_s)
        if start < step.end_time:
            spans.append(span(1, 1 + step.engine, "drafting", start, step.end_time))
    name = f"{step.num_tokens} tokens"
    counters = {
        "requests": {"running": step.num_running, "waiting": step.num_waiting},
        "KV blocks": {"used": step.num_blocks - step.num_free_blocks},
    }
    return [
        span(1, 1 + step.engine, name, step.start_time, step.end_time, **told),
        *spans,
        *(counter(1, title, step.end_time, values) for title, values in counters.items()),
    ]


def _draft_args(drafts: StepDrafts) -> Json:
    count = drafts.verified.total
    return {
        "drafts": count.num_proposed,
        "accepted": count.num_accepted,
        "asked": drafts.num_asked,
        "drafting_ms": ms(drafts.drafting_s),
        "verifying_ms": ms(drafts.verifying_s),
    }


def _is_whole(ended: Ended, num_tokens: int) -> bool:
    if not ended.was_admitted:
        return True
    # The last token is never computed; without a token, the prompt may not have been whole.
    least = ended.num_prompt_tokens - ended.num_cached_tokens + ended.num_output_tokens - 1
    return num_tokens >= least if ended.num_output_tokens else num_tokens > 0


def _span(segment: Segment, origin: float) -> Json:
    return {"start_ms": ms(segment.start - origin), "ms": ms(segment.end - segment.start)}


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def fraction(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole > 0 else round(part / whole, 3)


def _plus(a: float | None, b: float | None) -> float | None:
    return a if b is None else (a or 0.0) + b
