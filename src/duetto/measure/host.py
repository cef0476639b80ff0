"""Measures this machine for the planner: its roofs, what kernels reach, and what is around them.

Random models of calibration's own are made, loaded as any other, and timed operation by operation:
one whose weights come from memory at each step, and a small one whose weights stay in the caches.
Nothing is printed or kept here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from platform import machine
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.config import SchedulerConfig
from duetto.core.cpus import usable_cpus
from duetto.core.engine_args import BackendName, EngineArgs, QuantizationName
from duetto.core.files import Progress
from duetto.core.options import check_choice
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape, RequestShape
from duetto.engine.engine import Engine
from duetto.measure.kernels import WORKING_SET
from duetto.measure.op_times import (
    BLOCK_SIZE,
    CpuProbe,
    Probe,
    ReferenceProbe,
    TimedBackend,
    measure,
    num_slots,
)
from duetto.models.make_model import make_model
from duetto.pricing.busy import busy_notes, cpu_times, load_average
from duetto.pricing.calibrate import MeasuredStep, fit_kinds
from duetto.pricing.hardware import CachedWeights, Efficiencies, HardwareSpec, rounded
from duetto.runner.choose_backend import resolve_backend
from duetto.runner.host_memory import available_memory_bytes
from duetto.runner.load import LoadedModel, load_model
from duetto.runner.model_runner import ModelRunner
from duetto.scheduler.scheduler import Scheduler

# As large as a cache is not (its int8 weights are 100 MB), and as small as two minutes allow.
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# Its widths are odd multiples of the kernels' 64 outputs, as those of small models often are: two
# threads cannot share them evenly.
SMALL_MODEL = MODEL | {  # 6 million numbers
    "vocab_size": 2048,
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
SECONDS_PER_STEP = 0.5  # to repeat a step for


def _shape(batch: int, new: int, past: int) -> BatchShape:
    return BatchShape((RequestShape(new, past),) * batch)


DECODE = tuple(_shape(batch, 1, past) for batch in (1, 2, 4, 8, 16) for past in (64, 1024))
PREFILL = tuple(_shape(1, new, past) for new in (16, 64) for past in (0, 1024))
LONG = (_shape(1, 256, 0), _shape(1, 512, 0), _shape(4, 256, 1024))  # not for the reference


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold and multiply weights."""

    arithmetic: str  # by which its efficiencies are kept
    backend: BackendName
    quantization: QuantizationName


NATIVE = (Variant("float32", "cpu", "none"), Variant("int8", "cpu", "int8"))
REFERENCE = (Variant("float32", "reference", "none"),)
READ_SIZES = tuple(2**i for i in range(23, 29))  # bytes: from what most last caches hold
CACHES_HELP = 1.25  # by so much the fewest bytes must be read faster than the most
KV_BYTES = 1 << 26  # beside the probe's own
NUM_STEPS = 24  # of the engine


@dataclass(frozen=True, slots=True)
class _Measured:
    """A model in one variant."""

    arithmetic: str
    steps: list[MeasuredStep]
    step_s: float  # that the engine adds to each step ...
    logit_row_s: float  # ... and to each row of logits that it samples from
    dtype: str  # of weights, by which `number_bytes` are kept
    weight_bytes: int
    number_bytes: float  # of weights, on average

    def efficiencies(self, roofs: HardwareSpec) -> Efficiencies:
        found = fit_kinds(self.steps, roofs.for_weights(self.weight_bytes))
        outside_s = median(step.outside_s for step in self.steps)
        return rounded(
            Efficiencies(step_s=self.step_s + outside_s, logit_row_s=self.logit_row_s, **found)  # type: ignore[arg-type]
        )


def measure_host(
    backend: str = "auto",
    threads: int | None = None,
    *,
    folder: Path,
    seconds_per_step: float = SECONDS_PER_STEP,
    config: dict[str, Any] = MODEL,
    small_config: dict[str, Any] = SMALL_MODEL,
    on_progress: Progress | None = None,
) -> HardwareSpec:
    """The machine as `--hardware host`, by models that are made in `folder`.

    Raises ConfigError for a backend that cannot run.
    """
    check_choice("backend", backend, ("auto", "cpu", "reference"))
    is_native = resolve_backend(backend)[0] == "cpu"
    shapes = (*DECODE, *PREFILL, *LONG) if is_native else (*DECODE, *PREFILL)
    variants = NATIVE if is_native else REFERENCE
    configs = (config, small_config) if is_native else (config,)  # numpy's own time hides a cache
    load, before = load_average(), cpu_times()
    roofs = [_roofs(threads) if is_native else _plain_roofs()]
    total, done = len(configs) * len(variants) * len(shapes), 0
    measured: list[list[_Measured]] = [[] for _ in configs]
    for number, its_config in enumerate(configs):
        model = folder / str(number)
        make_model(its_config, model, dtype="bfloat16")
        for variant in variants:
            loaded = _load(model, variant, threads)
            probe = _probe(loaded, model, shapes)
            steps = []
            for shape in shapes:
                steps.append(_measure(probe, loaded, variant, shape, seconds_per_step))
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
            measured[number].append(_measured(loaded, variant, steps))
            roofs.append(_roofs(threads) if is_native else _plain_roofs())
    busy = busy_notes(
        _repeats(roofs), num_cpus=usable_cpus(), load=load, before=before, after=cpu_times()
    )
    return replace(_spec(_highest(roofs, measured[0]), *measured), busy=busy)


def _repeats(roofs: Sequence[HardwareSpec]) -> dict[str, list[float]]:
    """Each roof, as often as it was measured."""
    found = {f"{name} peak": [one.peaks[name] for one in roofs] for name in roofs[0].peaks}
    return found | {"read bandwidth": [one.memory_bandwidth for one in roofs]}


def _measured(loaded: LoadedModel, variant: Variant, steps: list[MeasuredStep]) -> _Measured:
    return _Measured(
        variant.arithmetic,
        steps,
        *_overhead(loaded),
        dtype=loaded.dtype if variant.quantization == "none" else variant.quantization,
        weight_bytes=loaded.weight_bytes,
        number_bytes=loaded.weight_bytes / loaded.program.num_parameters,
    )


def _highest(roofs: Sequence[HardwareSpec], measured: Sequence[_Measured]) -> HardwareSpec:
    """What else runs on the machine lowers a roof, never raises it; nor is a roof lower than what
    a kernel reaches that reads all weights of a large model for one token."""
    sizes = [size for size, _ in roofs[0].read_bandwidths]
    columns = zip(*(roof.read_bandwidths for roof in roofs), strict=True)
    reads = [max(rate for _, rate in column) for column in columns]
    reads = [max(reads[i:]) for i in range(len(reads))]  # fewer bytes are never read slower
    highest = replace(
        roofs[0],
        peaks={name: max(roof.peaks[name] for roof in roofs) for name in roofs[0].peaks},
        memory_bandwidth=max(roof.memory_bandwidth for roof in roofs),
        read_bandwidths=tuple(zip(sizes, reads, strict=True)),
    )
    beyond = max(1.0, *(_reached(one, highest) for one in measured))
    return replace(
        highest,
        memory_bandwidth=_short(highest.memory_bandwidth * beyond),
        read_bandwidths=tuple(
            (size, _short(rate * beyond)) for size, rate in highest.read_bandwidths
        ),
    )


def _reached(measured: _Measured, roofs: HardwareSpec) -> float:
    """Of the bandwidth, by the matrix products of one token."""
    samples = measured.steps[0].samples(roofs.for_weights(measured.weight_bytes))
    return median(
        sample.memory_s / sample.measured_s
        for kind, sample in samples
        if kind == "linear" and sample.calls > 1
    )


def _spec(
    roofs: HardwareSpec, large: Sequence[_Measured], small: Sequence[_Measured] = ()
) -> HardwareSpec:
    found = {one.arithmetic: one.efficiencies(roofs) for one in large}
    return replace(
        roofs,
        efficiencies=found.pop("float32"),
        efficiencies_of=found,
        cached=_cached(roofs, small),
        weight_bytes={one.dtype: _short(one.number_bytes) for one in large},
        kernels=tuple(
            point
            for one in large
            for step in one.steps
            for point in step.points(roofs.for_weights(one.weight_bytes))
        ),
    )


def _cached(roofs: HardwareSpec, small: Sequence[_Measured]) -> CachedWeights | None:
    """Up to the size that is read nearer to the rate of the fewest bytes than to that of the most;
    nothing, where the fewest are not read much faster either."""
    reads = roofs.read_bandwidths
    if not small or reads[0][1] < CACHES_HELP * reads[-1][1]:
        return None
    found = {one.arithmetic: one.efficiencies(roofs) for one in small}
    middle = sqrt(reads[0][1] * reads[-1][1])
    return CachedWeights(
        most_bytes=max(size for size, bandwidth in reads if bandwidth >= middle),
        efficiencies=found.pop("float32"),
        efficiencies_of=found,
    )


def _roofs(threads: int | None) -> HardwareSpec:
    """As the native kernels' own loops find them."""
    pool, isa = native.Pool(threads or 0), choose_isa()
    reads = [(size, native.read_bandwidth(pool, size)) for size in (*READ_SIZES, WORKING_SET)]
    found = _host(
        {"float32": native.fp32_peak(pool, isa), "int8": native.int8_peak(pool, isa)},
        reads[-1][1],
        f"duetto calibrate: {pool.num_threads} threads, {isa}",
    )
    return replace(found, read_bandwidths=tuple((size, _short(rate)) for size, rate in reads))


def _plain_roofs() -> HardwareSpec:
    """As numpy finds them: a product of matrices, and the sum of more than a cache holds."""
    matrix = np.ones((1024, 1024), np.float32)
    numbers = np.ones(1 << 26, np.float32)
    return _host(
        {"float32": 2 * 1024**3 / _fastest(lambda: matrix @ matrix)},
        numbers.nbytes / _fastest(numbers.sum),
        "duetto calibrate: numpy, for the reference backend",
    )


def _host(peaks: dict[str, float], bandwidth: float, source: str) -> HardwareSpec:
    return HardwareSpec(
        name="host",
        peaks={name: _short(peak) for name, peak in peaks.items()},
        memory_bandwidth=_short(bandwidth),
        memory_bytes=available_memory_bytes(),
        date=datetime.now(UTC).date().isoformat(),
        source=f"{source}, {machine()}",
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _fastest(function: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return min(times)


def _load(model: Path, variant: Variant, threads: int | None) -> LoadedModel:
    args = EngineArgs(
        backend=variant.backend,
        quantization=variant.quantization,
        threads=threads if variant.backend == "cpu" else None,
        packed_cache="off",
        kv_cache_memory_bytes=KV_BYTES,
    )
    return load_model(model, args)


def _probe(loaded: LoadedModel, model: Path, shapes: tuple[BatchShape, ...]) -> Probe:
    most = max(map(num_slots, shapes))
    backend = loaded.runner.backend
    if isinstance(backend, CpuBackend):
        return CpuProbe(loaded.program, backend, most, loaded.kv_dtype)
    weights = load_weights(model, loaded.program, loaded.dtype)
    wide = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
    return ReferenceProbe(loaded.program, wide, ReferenceBackend(loaded.program, wide), most)


def _measure(
    probe: Probe, loaded: LoadedModel, variant: Variant, shape: BatchShape, seconds: float
) -> MeasuredStep:
    times = measure(probe, shape, seconds=seconds)
    ops = tuple((one.op, one.seconds) for one in times.ops)
    return MeasuredStep(
        loaded.program, loaded.precision, variant.arithmetic, shape, ops, times.outside_s
    )


def _overhead(loaded: LoadedModel) -> tuple[float, float]:
    """Seconds that the engine adds to each step, and to each row of logits that it samples from."""
    few, many = (_engine_s(loaded, batch) for batch in (1, 9))
    row_s = max(0.0, (many - few) / 8)
    return max(0.0, few - row_s), row_s


def _engine_s(loaded: LoadedModel, batch: int) -> float:
    """What a step of `batch` next tokens takes beside the backend."""
    backend = TimedBackend(loaded.runner.backend)
    length = 8 + NUM_STEPS
    num_blocks = batch * -(-length // BLOCK_SIZE)
    runner = ModelRunner(loaded.program, backend, num_blocks, BLOCK_SIZE, loaded.kv_dtype)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        max_model_len=length,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
    )
    engine = Engine(Scheduler(config), runner)
    for number in range(batch):
        engine.add(_request(number))
    engine.step()  # all prompts
    found = []
    for _ in range(NUM_STEPS - 4):
        backend.seconds, start = 0.0, perf_counter()
        engine.step()
        found.append(perf_counter() - start - backend.seconds)
    return median(found)


def _request(number: int) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=(1, 2, 3, 4),
        sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        max_tokens=NUM_STEPS,
        seed=number,
    )
