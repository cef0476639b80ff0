"""What a program's steps should take on this machine, before any of them has run.

As calibrated, if it was; else by a guess that only has the right shape, and no roof to speak of.
Loads no weights and runs nothing.
"""

from dataclasses import dataclass, replace

from duetto.core.cpus import usable_cpus
from duetto.core.errors import ConfigError
from duetto.core.shape import StepTime
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import HOST, calibration_file, find_hardware
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
        model = CostModel(program, host, _on(host, precision))
    except ConfigError as error:
        return _guessed(program, precision, f"ignored: {error}")
    return HostPrices(with_looks(model), with_looks(model.on(host.ideal())))


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
