"""What each GPU kernel reaches, in the shape of a model, beside what the device gives in the same
run.

As measure/kernels.py does it for the CPU's. Every operation is timed as the backend launches it;
weights, and keys and values, are read from memory. Knows no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.gpu import CUDA, GpuModel
from duetto.measure.kernels import CONTEXT
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import kv_number_bytes
from duetto.program.op import Op
from duetto.program.program import Program
from duetto.program.shape import Precision

MOST_DECODED = 256  # rows; more are a prompt
WEIGHT_BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0 + 4 / 128,
    "int4": 0.5 + 4 / 64,
    "fp8": 1.0,
}


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """What there is to be had, by the library's own loops."""

    name: str
    read_bandwidth: float  # bytes per second
    copy_bandwidth: float  # bytes read and bytes written
    peaks: Mapping[str, float]  # operations per second, by what is multiplied


@dataclass(frozen=True, slots=True)
class GpuKernel:
    """One kind of operation in one step."""

    kernel: str  # the operation that it computes, with what is fused into it
    kind: str
    shape: str
    format: str  # of weights, or of keys and values
    rows: int
    seconds: float  # of one call
    num_bytes: int  # that it must move
    num_ops: int
    arithmetic: str

    def limit(self, machine: GpuMachine) -> float:
        """Seconds that it would take at the device's own speed."""
        moving = self.num_bytes / machine.read_bandwidth
        return max(moving, self.num_ops / machine.peaks[self.arithmetic])

    def as_json(self, machine: GpuMachine) -> dict[str, Any]:
        return asdict(self) | {
            "bytes_per_s": self.num_bytes / self.seconds,
            "ops_per_s": self.num_ops / self.seconds,
            "of_machine": self.limit(machine) / self.seconds,
        }


class GpuKernelBench:
    """Measures one program's kernels on this machine's GPU; yields one result at a time."""

    def __init__(self, program: Program, dtype: str, shrink: int = 1, runs: int = 5) -> None:
        """`program` has as many layers as keep its weights out of the caches. `shrink` divides the
        sizes by which roofs are measured. Raises ConfigError where there is no usable GPU."""
        gpu = import_module(f"{CUDA}.device").find_gpu()
        watch = import_module(f"{CUDA}.stopwatch").watch_on(gpu.device)
        roofs = import_module(f"{CUDA}.roofs").measure_roofs(watch, shrink, 4 * runs)
        self.machine = GpuMachine(gpu.name, roofs.read_bandwidth, roofs.copy_bandwidth, roofs.peaks)
        self._program, self._dtype, self._runs = program, dtype, runs

    def kernels(
        self,
        weights: Sequence[str],
        kv: Sequence[KVDtype],
        rows: Sequence[int],
        context: int = CONTEXT,
    ) -> Iterator[GpuKernel]:
        """All kernels with the first formats of each; with the others, those that they change."""
        shapes = [step_shape(count, context) for count in rows]
        cases = [(weights[0], kv[0]), *((w, kv[0]) for w in weights[1:])]
        cases += [(weights[0], k) for k in kv[1:]]
        for number, (weight, kept) in enumerate(cases):
            model = self._model(shapes, weight, kept)
            precision = Precision(
                WEIGHT_BYTES[weight],
                WEIGHT_BYTES[self._dtype],
                kv_number_bytes(self._program, kept),
            )
            changed = None if number == 0 else ("linear",) if kept == kv[0] else ("attention",)
            for count, shape in zip(rows, shapes, strict=True):
                yield from self._of(model, shape, count, precision, (weight, kept), changed)
            del model  # before the next takes its memory

    def _model(self, shapes: Sequence[BatchShape], weight: str, kept: str) -> GpuModel:
        quantization = None if weight == self._dtype else weight
        return GpuModel.of(self._program, self._dtype, shapes, quantization, kept, self._runs)

    def _of(
        self,
        model: GpuModel,
        shape: BatchShape,
        rows: int,
        precision: Precision,
        formats: tuple[str, str],
        changed: tuple[str, ...] | None,
    ) -> Iterator[GpuKernel]:
        seen: set[str] = set()
        for op, seconds in model.of_step(shape):
            name = name_of(op, self._program)
            if name in seen or (changed is not None and op.kind not in changed):
                continue
            seen.add(name)
            cost = _cost(op, shape, precision)
            format = formats[op.kind == "attention"]
            yield GpuKernel(
                kernel=name,
                kind=op.kind,
                shape=_words(op, shape),
                format=format if op.kind in ("linear", "attention") else self._dtype,
                rows=rows,
                seconds=seconds,
                num_bytes=cost.bytes_moved,
                num_ops=cost.flops,
                arithmetic=self._dtype if op.kind in ("linear", "attention") else "float32",
            )


def step_shape(rows: int, context: int) -> BatchShape:
    """As many requests with a next token each; above MOST_DECODED one prompt."""
    if rows > MOST_DECODED:
        return BatchShape((RequestShape(rows, 0),))
    return BatchShape((RequestShape(1, context - 1),) * rows)


def name_of(op: Op, program: Program) -> str:
    """As `duetto roofline` calls them, with what is fused behind it."""
    parts = [part.label(program) for part in getattr(op, "parts", (op,))]
    return " + ".join(dict.fromkeys(parts))


def _cost(op: Op, shape: BatchShape, precision: Precision) -> Any:
    """Of what is fused, that of its main part, as far as bytes go: the rest is in registers."""
    main = getattr(op, "main", op)
    return main.cost(shape, precision)


def _words(op: Op, shape: BatchShape) -> str:
    main: Any = getattr(op, "main", op)
    if main.kind == "linear":
        return f"{main.out.width} x {main.x.width}"
    if main.kind == "attention":
        request = shape.requests[0]
        heads = f"{main.num_heads}/{main.num_kv_heads} heads of {main.head_dim}"
        return f"{heads}, context {request.num_past + request.num_new}"
    return f"{main.writes[0].width} columns" if main.writes else ""
