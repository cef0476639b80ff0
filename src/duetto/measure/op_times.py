"""How long a backend takes for each operation of a step: what calibration is made of.

A probe runs steps of any shape on a program and times each operation where it is computed. Knows no
peaks, no prices and no schedule; what KV holds does not matter to a time, so it is zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol

from numpy.typing import NDArray

from duetto.backends.backend import (
    AttentionLook,
    Backend,
    FloatArray,
    IntArray,
    KVMoves,
    LayersDone,
    ScoreArray,
    StepArrays,
)
from duetto.backends.blocks import Bytes
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.backends.reference.ops import Run, compute
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape
from duetto.program.dtype import KVDtype
from duetto.program.op import Op
from duetto.program.program import Program
from duetto.runner.step_arrays import build_step_arrays

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class OpTime:
    """One operation, and what it makes of its input if the backend fuses that into it."""

    op: Op
    seconds: float


@dataclass(frozen=True, slots=True)
class OpTimes:
    ops: tuple[OpTime, ...]
    outside_s: float  # of the backend, in no operation


class Probe(Protocol):
    """A backend that can be timed. `num_slots` tokens of KV are there."""

    program: Program

    def run(self, step: StepArrays) -> OpTimes: ...


class CpuProbe:
    """The native plan's own clocks.

    They are those of its first thread, which goes from storing KV to attention without waiting for
    the others, so the two are told as one: attention.
    """

    def __init__(
        self, program: Program, backend: CpuBackend, num_slots: int, kv_dtype: KVDtype
    ) -> None:
        self.program = program
        self._backend = backend
        self._kv = backend.allocate_kv(-(-num_slots // BLOCK_SIZE), BLOCK_SIZE, kv_dtype)

    def run(self, step: StepArrays) -> OpTimes:
        self._backend.run(step, self._kv)
        *times, outside = self._backend.times()
        found, stored_s = [], 0.0
        for native_step, seconds in zip(self._backend.steps, times, strict=True):
            kv = native_step.kv
            if kv is not None and kv.writes:
                stored_s = seconds
                continue
            found.append(OpTime(native_step.main, seconds + (0.0 if kv is None else stored_s)))
        return OpTimes(tuple(found), outside)


class ReferenceProbe:
    """The reference backend's operations, one by one."""

    def __init__(
        self, program: Program, weights: dict[str, NDArray[Any]], backend: Backend, num_slots: int
    ) -> None:
        """`weights` in fp32."""
        self.program = program
        self._weights = weights
        self._kv = backend.allocate_kv(-(-num_slots // BLOCK_SIZE), BLOCK_SIZE, "float32")

    def run(self, step: StepArrays) -> OpTimes:
        run = Run(step, self._kv, self._weights, self.program.buffers)
        found = []
        begin = perf_counter()
        with one_blas_thread():
            for op in self.program.ops:
                start = perf_counter()
                compute(op, run)
                found.append(OpTime(op, perf_counter() - start))
            logits = run.read(self.program.logits)
        whole = perf_counter() - begin
        assert logits.size
        return OpTimes(tuple(found), whole - sum(one.seconds for one in found))


class TimedBackend:
    """A backend that remembers how long it has computed, to tell it from what is around it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds = 0.0

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> Any:
        return self._backend.allocate_kv(num_blocks, block_size, dtype)

    def run(self, step: StepArrays, kv: Any) -> FloatArray:
        start = perf_counter()
        logits = self._backend.run(step, kv)
        self.seconds += perf_counter() - start
        return logits

    def move_kv(self, moves: KVMoves, kv: Any) -> None:
        start = perf_counter()
        self._backend.move_kv(moves, kv)
        self.seconds += perf_counter() - start

    def read_kv(self, layer: int, slots: IntArray, kv: Any) -> tuple[FloatArray, FloatArray]:
        start = perf_counter()
        found = self._backend.read_kv(layer, slots, kv)
        self.seconds += perf_counter() - start
        return found

    def look_attention(
        self, step: StepArrays, kv: Any, looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        start = perf_counter()
        found = self._backend.look_attention(step, kv, looks)
        self.seconds += perf_counter() - start
        return found

    def look_deviation(self, step: StepArrays, kv: Any) -> ScoreArray:
        start = perf_counter()
        found = self._backend.look_deviation(step, kv)
        self.seconds += perf_counter() - start
        return found

    def export_blocks(
        self, kv: Any, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        self._backend.export_blocks(kv, blocks, out, num_tokens)

    def import_blocks(self, kv: Any, blocks: Sequence[int], data: Bytes) -> None:
        self._backend.import_blocks(kv, blocks, data)

    def block_rows(self, kv: Any) -> Sequence[Sequence[Bytes]]:
        return self._backend.block_rows(kv)

    @property
    def layers_done(self) -> LayersDone:
        return self._backend.layers_done


def measure(probe: Probe, shape: BatchShape, *, seconds: float, least: int = 3) -> OpTimes:
    """The median of each operation's times, over runs that take about `seconds` together.

    The first run, in which caches fill and memory is touched, does not count.
    """
    step, _ = build_step_arrays(batch_of(shape), BLOCK_SIZE)
    probe.run(step)
    runs: list[OpTimes] = []
    begin = perf_counter()
    while len(runs) < least or perf_counter() - begin < seconds:
        runs.append(probe.run(step))
    ops = zip(*(run.ops for run in runs), strict=True)
    return OpTimes(
        tuple(OpTime(same[0].op, median(one.seconds for one in same)) for same in ops),
        median(run.outside_s for run in runs),
    )


def num_slots(shape: BatchShape) -> int:
    """Tokens of KV that `batch_of` lays out."""
    return sum(-(-(r.num_past + r.num_new) // BLOCK_SIZE) * BLOCK_SIZE for r in shape.requests)


def batch_of(shape: BatchShape) -> ScheduledBatch:
    """A batch of this shape over blocks in order; every request's last tokens give logits."""
    greedy = SamplingInput(SamplingParams(temperature=0.0), seed=0, num_output_tokens=0)
    requests: list[ScheduledRequest] = []
    first_block = 0
    for request in shape.requests:
        num_blocks = -(-(request.num_past + request.num_new) // BLOCK_SIZE)
        one = ScheduledRequest(
            request_id=str(len(requests)),
            token_ids=(0,) * request.num_new,
            num_computed_tokens=request.num_past,
            block_table=tuple(range(first_block, first_block + num_blocks)),
            rows=(greedy,) * request.num_logit_rows,
            num_drafts=max(0, request.num_logit_rows - 1),
        )
        requests.append(one)
        first_block += num_blocks
    return ScheduledBatch(tuple(requests))
