"""How long each operation of a step takes on the device, each kind of it apart.

Operations alike (of all layers) are launched one after the other, many times, in one recorded
graph: so nothing of the host is in their time, and what one reads is in no cache, because the
others' weights have been read since. Their results mean nothing. Knows no prices.
"""

from collections.abc import Collection, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import torch

from duetto.backends.backend import StepArrays
from duetto.backends.cuda.arena import CudaArena
from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.kernels.sampler import sample
from duetto.backends.cuda.ops import LAUNCHES, DeviceRun
from duetto.backends.cuda.stopwatch import Launch, Stopwatch
from duetto.backends.device import SampleArrays
from duetto.program.op import Op
from duetto.program.program import Program


class LaunchTimes:
    """Of the operations that a backend launches, over KV of random numbers."""

    def __init__(
        self, program: Program, backend: CudaBackend, kv: CudaArena, watch: Stopwatch, runs: int = 5
    ) -> None:
        self._program, self._backend, self._kv = program, backend, kv
        self._watch, self._runs = watch, runs
        for layer in kv.layers:
            for numbers in (layer.keys, layer.values):
                if numbers.dtype.is_floating_point and numbers.dtype.itemsize > 1:
                    numbers.normal_()

    def of(self, step: StepArrays, kinds: Collection[str] | None = None) -> list[tuple[Op, float]]:
        """Every operation as it is launched, or those of some kinds, and its seconds: the mean of
        those alike."""
        ops, run = self._prepared(step)
        found: list[tuple[Op, float]] = []
        for alike in _alike(ops, self._program):
            if kinds is not None and alike[0].kind not in kinds:
                continue
            self._refill(run)
            launches = [_launch_of(op, run) for op in alike]
            seconds = self._watch.each(launches, self._runs)
            found += [(op, seconds) for op in alike]
        return found

    def launch_first(self, step: StepArrays, kind: str) -> Op:
        """Launch the first operation of a kind, on what its buffers hold."""
        ops, run = self._prepared(step)
        op = next(op for op in ops if op.kind == kind)
        _launch_of(op, run)()
        return op

    def host_s(self, step: StepArrays) -> float:
        """Seconds that the host takes to launch the whole step, kernel by kernel."""
        ops, run = self._prepared(step)
        launches = [_launch_of(op, run) for op in ops]
        times = []
        for _ in range(self._runs):
            self._wait()
            start = perf_counter()
            for launch in launches:
                launch()
            times.append(perf_counter() - start)
        self._wait()
        return median(times)

    def sample_s(self, step: StepArrays, sampling: SampleArrays) -> float:
        """Seconds that sampling all rows of a step takes."""
        backend, count = self._backend, len(step.logit_rows)
        inputs = backend._inputs_for(step)
        inputs.send(step, None, sampling, backend._tiles(step))
        rows, logits = inputs.sample_tensors(count), backend._logits[:count]
        out = backend._held.sampled[:count]
        launch = partial(sample, logits, rows, backend._scratch, out)
        return self._watch.each([launch], self._runs)

    def _prepared(self, step: StepArrays) -> tuple[list[Op], DeviceRun]:
        """All operations, and a step's tensors, as the backend launches them kernel by kernel."""
        backend = self._backend
        tiles, inputs = backend._tiles(step), backend._inputs_for(step)
        inputs.send(step, None, None, tiles)
        num_tokens, num_rows = len(step.token_ids), len(step.logit_rows)
        tensors = inputs.tensors(num_tokens, len(step.context_lens), num_rows, tiles)
        run = DeviceRun(tensors, self._kv, backend._held, num_tokens, num_rows)
        return [*backend._every, *backend._selected], run

    def _refill(self, run: DeviceRun) -> None:
        """Sums that are added to again and again would not be random for long."""
        for numbers in run.held.buffers.values():
            numbers.normal_()

    def _wait(self) -> None:
        if self._watch.is_gpu:
            torch.cuda.synchronize(self._watch.device)


def _launch_of(op: Op, run: DeviceRun) -> Launch:
    return partial(LAUNCHES[type(op)], op, run)


def _alike(ops: Sequence[Op], program: Program) -> list[list[Op]]:
    """Operations of one kind and name, in the order of their first ones."""
    found: dict[tuple[type[Op], str], list[Op]] = {}
    for op in ops:
        found.setdefault((type(op), op.label(program)), []).append(op)
    return list(found.values())
