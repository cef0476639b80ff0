"""A device of numpy for tests: it keeps what it is given in a queue, and computes when it is asked.

So a step that takes another one's tokens too early, or reads what it should have waited for, shows:
nothing of a step is there before somebody has asked for it. What `faults` names goes wrong.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from duetto.backends.backend import Backend, FloatArray, IntArray, StepArrays
from duetto.backends.device import NOT_FINITE, SampleArrays
from duetto.runner import gumbel
from duetto.runner.candidates import nucleus, set_of_largest

PLACES = 3  # on the host for what steps give: each is overwritten by the third step after it


class _Queued(NamedTuple):
    step: StepArrays
    kv: Any
    sampling: SampleArrays | None
    feedback: IntArray | None


class FakeStarted:
    """A step in the queue, then what it gave."""

    def __init__(self, device: "FakeDevice", queued: _Queued, *, wants_logits: bool) -> None:
        self.queued: _Queued | None = queued
        self.wants_logits = wants_logits
        self.has_sampled = queued.sampling is not None
        self.samples: IntArray | None = None
        self.rows: FloatArray | None = None
        self.error: BaseException | None = None
        self._device, self._number = device, device.num_started

    def tokens(self) -> IntArray:
        assert self.has_sampled, "nothing was sampled"
        self.wait()
        self._check_place()
        assert self.samples is not None
        return self.samples.copy()

    def logits(self) -> FloatArray:
        assert self.wants_logits, "no logits were wanted"
        self.wait()
        self._check_place()
        assert self.rows is not None
        return self.rows.copy()

    def _check_place(self) -> None:
        num_behind = self._device.num_started - self._number - 1
        assert num_behind < PLACES, "what it gave was overwritten"

    def wait(self) -> None:
        while self.queued is not None:
            self._device.run_next()
        if self.error is not None:
            raise self.error


class FakeDevice:
    """A DeviceBackend over another backend, which is its memory and its arithmetic."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._queue = deque[FakeStarted]()
        self._samples = np.full(0, NOT_FINITE, np.int32)  # of the sampled step that ran last
        self.num_fed_back = self.num_sampled = self.num_started = 0
        self.most_waiting = 0
        self.num_failed = 0
        # Numbers of steps after which one of several requests raises: as it starts, or as it runs.
        self.refuses: set[int] = set()
        self.fails: set[int] = set()

    def start(
        self,
        step: StepArrays,
        kv: Any,
        sampling: SampleArrays | None,
        feedback: IntArray | None = None,
        *,
        wants_logits: bool = False,
    ) -> FakeStarted:
        num_rows = len(step.logit_rows)
        assert sampling is None or {len(each) for each in sampling} == {num_rows}
        assert feedback is None or len(feedback) == len(step.token_ids)
        assert num_rows or (sampling is None and not wants_logits)
        assert step.token_ids.min() >= 0, "a token that is none"
        if self._is_planted(self.refuses, len(step.context_lens)):
            raise RuntimeError("planted, as it starts")
        queued = _Queued(
            StepArrays(*[each.copy() for each in step]),
            kv,
            None if sampling is None else SampleArrays(*[each.copy() for each in sampling]),
            None if feedback is None else feedback.copy(),
        )
        started = FakeStarted(self, queued, wants_logits=wants_logits)
        self._queue.append(started)
        self.num_started += 1
        self.num_sampled += 0 if sampling is None else num_rows
        self.most_waiting = max(self.most_waiting, len(self._queue))
        return started

    def run_next(self) -> None:
        started = self._queue.popleft()
        queued, started.queued = started.queued, None
        assert queued is not None
        try:
            self._run(started, queued)
            if self._is_planted(self.fails, len(queued.step.context_lens)):
                self._samples = np.full_like(self._samples, NOT_FINITE)
                raise RuntimeError("planted, as it runs")
        except BaseException as error:
            started.error = error

    def _is_planted(self, numbers: set[int], num_requests: int) -> bool:
        due = {number for number in numbers if number <= self.num_started}
        if num_requests < 2 or not due:
            return False
        numbers -= due
        self.num_failed += 1
        return True

    def _run(self, started: FakeStarted, queued: _Queued) -> None:
        step = queued.step
        if queued.feedback is not None:
            fed = queued.feedback >= 0
            self.num_fed_back += int(fed.sum())
            samples = self._samples[queued.feedback[fed]]
            step.token_ids[fed] = np.maximum(samples, 0)  # NOT_FINITE: its tokens are nobody's
        logits = self._backend.run(step, queued.kv)
        if started.wants_logits:
            started.rows = logits
        if queued.sampling is not None:
            self._samples = started.samples = sampled(logits, queued.sampling)

    def _drain(self) -> None:
        while self._queue:
            self.run_next()

    # --- in the order of the queue, at once ---------------------------------------------------

    def allocate_kv(self, *given: Any) -> Any:
        return self._backend.allocate_kv(*given)

    def run(self, step: StepArrays, kv: Any) -> FloatArray:
        self._drain()
        return self._backend.run(step, kv)

    def move_kv(self, *given: Any) -> None:
        self._drain()
        self._backend.move_kv(*given)

    def read_kv(self, *given: Any) -> Any:
        self._drain()
        return self._backend.read_kv(*given)

    def look_attention(self, *given: Any) -> Any:
        self._drain()
        return self._backend.look_attention(*given)

    def look_deviation(self, *given: Any) -> Any:
        self._drain()
        return self._backend.look_deviation(*given)

    def export_blocks(
        self, kv: Any, blocks: Sequence[int], out: Any, num_tokens: Sequence[int] = ()
    ) -> None:
        self._drain()
        self._backend.export_blocks(kv, blocks, out, num_tokens)

    def import_blocks(self, *given: Any) -> None:
        self._drain()
        self._backend.import_blocks(*given)

    def block_rows(self, kv: Any) -> Any:
        return self._backend.block_rows(kv)

    @property
    def layers_done(self) -> Any:
        return self._backend.layers_done


def sampled(logits: FloatArray, sampling: SampleArrays) -> IntArray:
    """What the device's sampler gives, in numpy."""
    rows = zip(logits, *sampling, strict=True)
    return np.array([_token(row, *params) for row, *params in rows], np.int32)


def _token(
    row: FloatArray,
    temperature: np.float64,
    key: np.uint64,
    top_k: np.int32,
    top_p: np.float64,
    min_gap: np.float64,
) -> int:
    largest = int(row.argmax())
    if not np.isfinite(row[largest]):
        return NOT_FINITE
    if temperature == 0:
        return largest
    ids = set_of_largest(row, int(top_k)) if 0 < top_k < len(row) else np.arange(len(row))
    logits, first = row[ids].astype(np.float64), float(row[largest])
    kept = np.flatnonzero(logits >= first + min_gap)
    if top_p < 1:
        kept = kept[nucleus(logits[kept], float(temperature), float(top_p))]
    with np.errstate(over="ignore"):
        scaled = (logits[kept] - first) / temperature
    return gumbel.draw(scaled, ids[kept], int(key))
