"""What a program's steps should take on this machine, before any of them has run.

As calibrated, if it was. Else a GPU is priced by its name, and what has no known name by a guess
that only has the right shape, and no roof to speak of. Loads no weights and runs nothing.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

from duetto.core.cpus import usable_cpus
from duetto.core.errors import ConfigError
from duetto.core.shape import StepTime
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import (
    GPU,
    HOST,
    calibration_file,
    find_hardware,
    named_gpu,
)
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.reuse import with_looks
from duetto.program.program import Program
from duetto.program.shape import Precision

_WIDENED = ("bfloat16", "float16")
# A number, on average: an embedding may be kept whole beside int8, and bf16 in 12 bits takes 1.53.
_QUANTIZED_BYTES = 1.5


@dataclass(frozen=True, slots=True)
class HostPrices:
    step_time: StepTime
    roof_time: StepTime | None  # with nothing lost; None: this machine was not measured
    notes: tuple[str, ...] = ()  # for people


def host_prices(program: Program, precision: Precision) -> HostPrices:
    """A calibration that cannot be read is not worth a server that does not start: it is told in
    `notes`, and a guess does until steps are measured."""
    file = calibration_file()
    if file is None or not file.is_file():
        return _guessed(program, precision)
    try:
        host = find_hardware(HOST)
        return _priced(program, host, _on(host, precision))
    except ConfigError as error:
        return _guessed(program, precision, f"ignored: {error}")


def gpu_prices(
    program: Program, precision: Precision, arithmetic: str, gpu_name: str
) -> HostPrices:
    """Of this machine's GPU, `gpu_name` by its driver; products are in `arithmetic`. Steps of next
    tokens are replayed as graphs and planned while others run, so a host that was not measured
    counts nothing."""
    notes: tuple[str, ...] = ()
    file = calibration_file(GPU)
    if file is not None and file.is_file():
        try:
            spec = find_hardware(GPU)
            if gpu_name in spec.source:
                return _priced(program, spec, _on_gpu(spec, precision, arithmetic, graphs=False))
            notes = (f"ignored: {file} is of another GPU ({spec.source}); {gpu_name} is here",)
        except ConfigError as error:
            notes = (f"ignored: {error}",)
    known = named_gpu(gpu_name)
    if known is None:
        guess = _guess_gpu()
        deployment = _on_gpu(guess, precision, arithmetic, graphs=True)
        model = CostModel(program, guess, deployment)
        return HostPrices(with_looks(model), None, notes)
    deployment = _on_gpu(known, precision, arithmetic, graphs=True)
    return replace(_priced(program, known, deployment), notes=notes)


def hardware_here(gpu_name: str | None) -> HardwareSpec:
    """What computes here: this host, or its GPU of this name; as calibrated, or known by its name,
    or guessed."""
    key = HOST if gpu_name is None else GPU
    file = calibration_file(key)
    if file is not None and file.is_file():
        with suppress(ConfigError):
            found = find_hardware(key)
            if gpu_name is None or gpu_name in found.source:
                return found
    if gpu_name is None:
        return _guess()
    return named_gpu(gpu_name) or _guess_gpu()


def prices_on(program: Program, hardware: HardwareSpec | None, precision: Precision) -> HostPrices:
    """Of another machine, by what it says it has; None: a guess. Raises ConfigError for hardware
    that cannot compute the program so."""
    if hardware is None:
        return _guessed(program, precision)
    return _priced(program, hardware, _on(hardware, precision))


def _priced(program: Program, hardware: HardwareSpec, deployment: Deployment) -> HostPrices:
    model = CostModel(program, hardware, deployment)
    return HostPrices(with_looks(model), with_looks(model.on(hardware.ideal())))


def _on_gpu(
    hardware: HardwareSpec, precision: Precision, arithmetic: str, *, graphs: bool
) -> Deployment:
    known = arithmetic if arithmetic in hardware.peaks else "float32"
    return Deployment(precision=precision, arithmetic=known, graphs=graphs)


def _guessed(program: Program, precision: Precision, *notes: str) -> HostPrices:
    guess = _guess()
    model = CostModel(program, guess, _on(guess, precision))
    return HostPrices(with_looks(model), None, notes)


def computable(deployment: Deployment, hardware: HardwareSpec) -> Deployment:
    """The deployment, in the arithmetic that the hardware has for its weights.

    Where there is none in 16 bits, as on most hosts, numbers are widened to fp32 between
    operations, and products are in fp32, or in int8 with weights of 8 bits and less.
    """
    if deployment.arithmetic in hardware.peaks or deployment.arithmetic not in _WIDENED:
        return deployment
    is_quantized = deployment.precision.weight_bytes < _QUANTIZED_BYTES
    arithmetic = "int8" if is_quantized and "int8" in hardware.peaks else "float32"
    precision = replace(deployment.precision, activation_bytes=4.0)
    return replace(deployment, arithmetic=arithmetic, precision=precision)


def _on(hardware: HardwareSpec, precision: Precision) -> Deployment:
    return computable(Deployment(precision=precision), hardware)


def _guess() -> HardwareSpec:
    """A few cores of a server of 2020. Measured steps correct its scale at once."""
    return HardwareSpec(
        name="a guess",
        peaks={"float32": 40e9 * usable_cpus()},
        memory_bandwidth=20e9,
        memory_bytes=2**33,
    )


def _guess_gpu() -> HardwareSpec:
    """About what a card of 2021 for workstations does."""
    return HardwareSpec(
        name="a guess",
        peaks={"float32": 20e12, "bfloat16": 80e12, "float16": 80e12},
        memory_bandwidth=7e11,
        memory_bytes=2**34,
    )
