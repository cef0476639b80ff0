"""The Executor over a device that computes behind its host: steps in flight, and their results.

`submit` puts a step on the device's queue and returns. What a step before it has sampled there is
taken there too, where nobody on the host knows it yet. What the device cannot sample, the host
samples from logits when the step's result is asked for; a step that needs such a token waits for
it. Results are made in the order of the steps, whoever asks first, as proposers and masks follow
requests step by step. Knows no schedule, no text and no architecture.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import numpy as np

from duetto.backends.backend import Backend, FloatArray, IntArray
from duetto.backends.device import DeviceBackend, Started
from duetto.core.batch import (
    PLACEHOLDER,
    MoveResult,
    RequestResult,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.errors import DeviceLost, EngineError
from duetto.core.executor import Pending
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import MAX_SLOTS
from duetto.program.program import Program
from duetto.runner.device_rows import DeviceRows, device_rows, feedback_of
from duetto.runner.looks import look
from duetto.runner.masks import Constrained, Masks
from duetto.runner.placeholders import LastSteps
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.results import result_of, results_of
from duetto.runner.step_arrays import build_moves, build_step_arrays
from duetto.runner.step_parts import StepNeeds, StepParts, needs_of
from duetto.runner.tiers.mover import TierRoom
from duetto.runner.verify import verify_sampled

BEHIND = "the step is behind one that failed: what it would give is nobody's"


class _Running(NamedTuple):
    """What is needed of a step to make its results; nothing of it once they are made."""

    started: Started
    logit_starts: tuple[int, ...]
    rows: DeviceRows
    needs: StepNeeds
    masks: Future[Constrained] | None


class DeviceStep:
    """A step in flight, then its output or what it raised."""

    def __init__(
        self, runner: "DeviceRunner", batch: ScheduledBatch, outcome: StepOutput | None = None
    ) -> None:
        self._runner = runner
        self.batch = batch  # placeholders that only the device knows among it
        self.running: _Running | None = None
        self.moved: tuple[MoveResult, ...] = ()
        self.outcome: StepOutput | BaseException | None = outcome

    @cached_property
    def sampling_places(self) -> dict[str, int]:
        """Where in the batch each request stands that samples."""
        requests = enumerate(self.batch.requests)
        return {request.request_id: place for place, request in requests if request.rows}

    def result(self) -> StepOutput:
        return self._runner.result(self)


class DeviceRunner:
    """Runs a program on one device, over `num_blocks` blocks of KV that it allocates at once."""

    def __init__(
        self,
        program: Program,
        backend: DeviceBackend,
        num_blocks: int,
        block_size: int,
        kv_dtype: KVDtype,
        proposers: Mapping[str, Proposer] | None = None,
        depth: int = 1,
        tiers: TierRoom | None = None,
        masks: Masks | None = None,
    ) -> None:
        """As ModelRunner's."""
        assert num_blocks * block_size <= MAX_SLOTS
        self.depth = depth
        self._width = program.logits.width  # the vocabulary, or numbers of a hidden state
        self._backend = backend
        self._block_size = block_size
        self._kv = backend.allocate_kv(num_blocks, block_size, kv_dtype)
        self._parts = StepParts(backend, self._kv, self._width, proposers, tiers, masks)
        self._in_flight: deque[DeviceStep] = deque()  # without an outcome, oldest first
        self._recent: deque[DeviceStep] = deque(maxlen=depth)  # newest first
        self._sampled: DeviceStep | None = None  # whose samples the device has
        self._last_steps = LastSteps(depth)
        self._moving_s = 0.0  # since a result was asked for

    @property
    def backend(self) -> Backend:
        """What computes, for those who measure."""
        return self._backend

    # --- start -------------------------------------------------------------------------------

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Start a step. What goes wrong as it starts concerns the whole step, and raises."""
        self._moving_s += self._parts.move(batch)
        if not batch.requests:
            return DeviceStep(self, batch, StepOutput(()))
        needs = needs_of(batch)
        if needs.moves:
            self._backend.move_kv(build_moves(batch, self._block_size), self._kv)
        feedback: dict[str, int] = {}
        if needs.placeholders:
            batch, feedback = self._with_known_tokens(batch)
        step = DeviceStep(self, batch)
        if needs.looks:
            self._look(step, needs)
        else:
            self._start(step, needs, feedback)
        step.moved = self._parts.moved()
        return step

    def _with_known_tokens(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, dict[str, int]]:
        """The batch with a token for each placeholder that the host knows, or must wait for; and
        for each of the others, by request, the row of the device's samples that it is."""
        requests, feedback = list(batch.requests), dict[str, int]()
        has_changed = False
        for place, request in enumerate(requests):
            if request.token_ids[-1] != PLACEHOLDER:
                continue
            source = self._source_of(request)
            row = None if source is None else self._row_on_device(source, request)
            if row is not None:
                feedback[request.request_id] = row
                continue
            if source is not None:
                self._settle(source)
                if isinstance(source.outcome, DeviceLost):
                    raise source.outcome
                if isinstance(source.outcome, BaseException):
                    raise EngineError(BEHIND)
            requests[place] = self._last_steps.with_token(request)
            has_changed = True
        return ScheduledBatch(tuple(requests)) if has_changed else batch, feedback

    def _source_of(self, request: ScheduledRequest) -> DeviceStep | None:
        """The newest step that samples a token of the request, among the last ones."""
        for step in self._recent:
            if request.request_id in step.sampling_places:
                return step
        return None

    def _row_on_device(self, source: DeviceStep, request: ScheduledRequest) -> int | None:
        """Where the device has the token that a step in flight samples for the request; None: it
        has it no more, or never, or the host has it too."""
        running = source.running
        if running is None or source is not self._sampled:
            return None
        place = source.sampling_places[request.request_id]
        if not running.rows.on_device[place]:
            return None
        assert not source.batch.requests[place].num_drafts, "which token is the last is not known"
        return running.logit_starts[place]

    def _start(self, step: DeviceStep, needs: StepNeeds, feedback: dict[str, int]) -> None:
        while (
            len(self._in_flight) > self.depth
        ):  # nobody has asked for it, nor will: it was given up
            self._settle(self._in_flight[0])
        arrays, logit_starts = build_step_arrays(step.batch, self._block_size)
        rows = device_rows(step.batch.requests, logit_starts, self._width)
        started = self._backend.start(
            arrays,
            self._kv,
            rows.sampling,
            self._feedback(step.batch, arrays.token_ids, feedback),
            wants_logits=rows.wants_logits,
        )
        if rows.sampling is not None:
            self._sampled = step
        step.running = _Running(started, logit_starts, rows, needs, None)
        if needs.masks or self._parts.keeps_matchers:
            # Masks follow requests step by step: first the results of the steps before, while the
            # device computes this one.
            self._settle_all()
            masks = self._parts.start_masks(step.batch, needs)
            step.running = step.running._replace(masks=masks)
        self._in_flight.append(step)
        self._recent.appendleft(step)

    def _feedback(
        self, batch: ScheduledBatch, token_ids: IntArray, rows: dict[str, int]
    ) -> IntArray | None:
        """For each token; token ids that are not known are no ids of the vocabulary, and go."""
        if not rows:
            return None
        places, end = dict[int, int](), 0
        for request in batch.requests:
            end += len(request.token_ids)
            if request.request_id in rows:
                places[end - 1] = rows[request.request_id]
        token_ids[list(places)] = 0
        return feedback_of(places, len(token_ids))

    def _look(self, step: DeviceStep, needs: StepNeeds) -> None:
        """Compute a step at once: looks are rare, and tell the host."""
        self._settle_all()
        batch = step.batch = self._last_steps.resolved(step.batch)
        masks = self._parts.start_masks(batch, needs)

        def sample(
            others: ScheduledBatch, logits: FloatArray, logit_starts: tuple[int, ...]
        ) -> list[RequestResult]:
            constrained: Constrained = {} if masks is None else masks.result()
            return results_of(others, logits, logit_starts, constrained)

        results = look(batch, self._backend, self._kv, self._block_size, sample)
        step.outcome = self._kept(batch, results, needs)
        self._recent.appendleft(step)

    # --- results -----------------------------------------------------------------------------

    def result(self, step: DeviceStep) -> StepOutput:
        """Waits for a step, and for those before it. Raises what it raised."""
        self._settle(step)
        if isinstance(step.outcome, BaseException):
            raise step.outcome
        assert step.outcome is not None
        moved = step.moved if step.batch.requests else self._parts.moved(step.batch.awaits)
        # Moves take time from the step that is in flight as they are done: so it is told with the
        # result that is asked for next.
        moving_s, self._moving_s = self._moving_s, 0.0
        return step.outcome._replace(moving_s=moving_s, moved=moved)

    def _settle_all(self) -> None:
        if self._in_flight:
            self._settle(self._in_flight[-1])

    def _settle(self, step: DeviceStep) -> None:
        """Give it an outcome, and all before it."""
        while step.outcome is None:
            first = self._in_flight[0]
            try:
                first.outcome = self._output(first)
            except (KeyboardInterrupt, SystemExit):  # it is still on its way
                raise
            except BaseException as error:  # a panic of a native library is not an Exception
                first.outcome = error
                self._fail_behind(error)
            first.running = None
            if self._in_flight and self._in_flight[0] is first:
                self._in_flight.popleft()

    def _fail_behind(self, error: BaseException) -> None:
        """No step that has read what a failed one wrote gives anything, nor runs on beside what is
        computed again."""
        self._in_flight.popleft()
        while self._in_flight:
            step = self._in_flight.popleft()
            step.outcome = EngineError(BEHIND)
            if isinstance(error, DeviceLost):
                step.outcome = error
            elif step.running is not None:
                with suppress(Exception):
                    step.running.started.wait()
            step.running = None

    def _output(self, step: DeviceStep) -> StepOutput:
        running, batch = step.running, step.batch
        assert running is not None
        results = self._results(batch, running)
        if running.needs.placeholders and running.needs.drafts:
            batch = self._last_steps.resolved(batch)  # proposers are sent all tokens
        return self._kept(batch, results, running.needs)

    def _kept(
        self, batch: ScheduledBatch, results: list[RequestResult], needs: StepNeeds
    ) -> StepOutput:
        self._last_steps.keep(batch, results)
        return self._parts.output(batch, results, needs)

    def _results(self, batch: ScheduledBatch, running: _Running) -> list[RequestResult]:
        started, logit_starts, rows, _, masks = running
        started.wait()
        token_ids = [] if rows.sampling is None else started.tokens().tolist()
        logits = np.empty((0, self._width), np.float32)
        if rows.wants_logits:
            logits = started.logits()
            assert logits.shape == (logit_starts[-1], self._width)
            assert logits.dtype == np.float32
        constrained: Constrained = {} if masks is None else masks.result()
        return [
            _sampled_result(request, token_ids[start:end])
            if is_on_device
            else result_of(request, logits, start, constrained.get(request.request_id))
            for request, start, end, is_on_device in zip(
                batch.requests, logit_starts, logit_starts[1:], rows.on_device, strict=False
            )
        ]


def _sampled_result(request: ScheduledRequest, token_ids: list[int]) -> RequestResult:
    try:
        return RequestResult(verify_sampled(request, token_ids))
    except EngineError as error:
        return RequestResult(error=str(error))
