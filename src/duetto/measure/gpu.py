"""Measures this machine's GPU: its roofs, and what the kernels of a model's shape reach of them.

Weights are drawn on the device, so there is no checkpoint. Nothing is printed or kept here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from duetto.backends.backend import StepArrays
from duetto.backends.device import SampleArrays
from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.core.files import Progress
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.op_times import BLOCK_SIZE, batch_of, num_slots
from duetto.models.programs import build_program
from duetto.pricing.calibrate import MeasuredStep, fit_kinds
from duetto.pricing.find_hardware import GPU
from duetto.pricing.hardware import Efficiencies, HardwareSpec, rounded
from duetto.program.op import Op
from duetto.program.program import Program
from duetto.program.shape import Precision
from duetto.runner.step_arrays import build_step_arrays

CUDA = "duetto.backends.cuda"
# The widths of an 8B model in few layers: what it takes is known of one, and each layer's weights
# leave the caches before they are read again.
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
DTYPE = "bfloat16"
MOST_ROWS = 256  # of logits, and of steps of next tokens
HALF_BYTES = 2.0


def _shape(batch: int, new: int, past: int) -> BatchShape:
    return BatchShape((RequestShape(new, past),) * batch)


SHAPES = (
    *(_shape(batch, 1, past) for batch in (1, 4, 16, 64) for past in (128, 1024)),
    *(_shape(1, 1, 8192), _shape(8, 1, 4096), _shape(256, 1, 256)),
    *(_shape(1, new, past) for new in (64, 512, 2048) for past in (0, 4096)),
    _shape(1, 8192, 0),
)


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A program on a GPU whose weights were drawn there, and its operations timed."""

    program: Program
    backend: Any  # CudaBackend
    times: Any  # LaunchTimes

    @classmethod
    def of(
        cls,
        program: Program,
        dtype: str,
        shapes: Sequence[BatchShape],
        quantization: str | None = None,
        kv_dtype: str | None = None,
        runs: int = 5,
    ) -> "GpuModel":
        """For steps of these shapes.

        Raises ConfigError where there is no GPU that can be used.
        """
        gpu = import_module(f"{CUDA}.device").find_gpu()
        cuda = import_module(f"{CUDA}.random_model")
        slots = max(map(num_slots, shapes))
        backend, kv, times = cuda.random_model(
            program,
            quantization=quantization,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            device=gpu.device,
            num_tokens=max(shape.num_tokens for shape in shapes),
            num_runs=max(len(shape.requests) for shape in shapes),
            num_blocks=-(-slots // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            runs=runs,
        )
        del kv
        return cls(program, backend, times)

    def of_step(self, shape: BatchShape) -> list[tuple[Op, float]]:
        """Seconds of each operation as it is launched."""
        found: list[tuple[Op, float]] = self.times.of(step_of(shape))
        return found

    def of_parts(self, shape: BatchShape, precision: Precision) -> list[tuple[Op, float]]:
        """Seconds of each operation of the program. What one kernel computes together is shared
        out by what each would take at least."""
        found: list[tuple[Op, float]] = []
        for op, seconds in self.of_step(shape):
            parts: Sequence[Op] = getattr(op, "parts", (op,))
            least = [_least(part, shape, precision) for part in parts]
            whole = sum(least) or 1.0
            found += [(p, seconds * own / whole) for p, own in zip(parts, least, strict=True)]
        return found


def gpu_is_here() -> bool:
    """Whether this machine has a GPU that can be used; kernels that are interpreted are none."""
    device = import_module(f"{CUDA}.device")
    facts = device.probe_gpu()
    return not facts.is_interpreted and device.why_unusable(facts) is None


def step_of(shape: BatchShape) -> StepArrays:
    return build_step_arrays(batch_of(shape), BLOCK_SIZE)[0]


def greedy(num_rows: int) -> SampleArrays:
    zeros = np.zeros(num_rows)
    return SampleArrays(
        zeros,
        np.zeros(num_rows, np.uint64),
        np.zeros(num_rows, np.int32),
        zeros + 1,
        zeros - np.inf,
    )


def _least(op: Op, shape: BatchShape, precision: Precision) -> float:
    """In proportion to what it takes at least, on about any GPU of today."""
    cost = op.cost(shape, precision)
    return max(cost.bytes_moved, cost.flops / 250) + 1.0


def measure_gpu(
    *,
    config: dict[str, Any] = MODEL,
    dtype: str = DTYPE,
    shapes: Sequence[BatchShape] = SHAPES,
    shrink: int = 1,
    runs: int = 5,
    on_progress: Progress | None = None,
) -> HardwareSpec:
    """The GPU as `--hardware gpu`. `shrink` divides the sizes by which roofs are measured.

    Raises ConfigError where there is no GPU that can be used.
    """
    gpu = import_module(f"{CUDA}.device").find_gpu()
    program = build_program(parse_config(JsonSection(Path("config.json"), config)))
    roofs = _roofs(gpu, shrink, runs)
    model = GpuModel.of(program, dtype, shapes, runs=runs)
    size = 4.0 if dtype == "float32" else HALF_BYTES
    precision = Precision(size, size, size)
    steps = []
    for number, shape in enumerate(shapes):
        times = tuple(model.of_parts(shape, precision))
        steps.append(MeasuredStep(program, precision, dtype, shape, times, 0.0))
        if on_progress is not None:
            on_progress(number + 1, len(shapes))
    roofs = _raised(roofs, steps)
    reached = _reached(model, steps, roofs, shapes)
    return replace(
        roofs,
        efficiencies=reached,
        efficiencies_of={dtype: reached},
        kernels=tuple(point for step in steps for point in step.points(roofs)),
    )


def _roofs(gpu: Any, shrink: int, runs: int) -> HardwareSpec:
    watch = import_module(f"{CUDA}.stopwatch").watch_on(gpu.device)
    found = import_module(f"{CUDA}.roofs").measure_roofs(watch, shrink, 4 * runs)
    return HardwareSpec(
        name=GPU,
        peaks={name: _short(peak) for name, peak in found.peaks.items()},
        memory_bandwidth=_short(found.read_bandwidth),
        memory_bytes=max(gpu.memory_bytes, 2**20),
        date=datetime.now(UTC).date().isoformat(),
        source=f"duetto calibrate: {gpu.name}, driver {gpu.driver}, torch {gpu.torch}, "
        f"triton {gpu.triton}",
    )


def _raised(roofs: HardwareSpec, steps: Sequence[MeasuredStep]) -> HardwareSpec:
    """No roof is lower than what a kernel reaches."""
    memory, compute = 1.0, 1.0
    for step in steps:
        for kind, sample in step.samples(roofs):
            if kind == "linear":
                memory = max(memory, sample.memory_s / sample.measured_s)
                compute = max(compute, sample.compute_s / sample.measured_s)
    arithmetic = steps[0].arithmetic
    peaks = roofs.peaks | {arithmetic: _short(roofs.peaks[arithmetic] * compute)}
    return replace(roofs, peaks=peaks, memory_bandwidth=_short(roofs.memory_bandwidth * memory))


def _reached(
    model: GpuModel,
    steps: Sequence[MeasuredStep],
    roofs: HardwareSpec,
    shapes: Sequence[BatchShape],
) -> Efficiencies:
    """A step of next tokens is one graph, so the host launches nothing of it; a step with a chunk
    is launched kernel by kernel."""
    most = max(shape.num_logit_rows for shape in shapes)
    few = model.times.sample_s(step_of(_shape(1, 1, 0)), greedy(1))
    many = model.times.sample_s(step_of(_shape(most, 1, 0)), greedy(most))
    row_s = max(0.0, (many - few) / max(1, most - 1))
    prompts = [shape for shape in shapes if shape.num_tokens > len(shape.requests)] or [*shapes]
    host_s = median(model.times.host_s(step_of(shape)) for shape in prompts)
    return rounded(
        Efficiencies(
            chunk_launch_s=host_s / len(model.program.ops),
            step_s=max(0.0, few - row_s),
            logit_row_s=row_s,
            **fit_kinds(steps, roofs),  # type: ignore[arg-type]
        )
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")
