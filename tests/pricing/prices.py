"""What the planner's tests share: programs by name, hardware that is easy to reckon with."""

from functools import cache

from duetto.core.shape import BatchShape, RequestShape
from duetto.models.find import find_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.hardware import Efficiencies, HardwareSpec, KernelEfficiency
from duetto.program.program import Program

A100 = find_hardware("a100-80g")
ROUGH = HardwareSpec(  # every number is another, so that none can be mistaken
    name="rough",
    peaks={"float32": 2e12, "bfloat16": 100e12},
    memory_bandwidth=1e12,
    memory_bytes=2**36,
    link_bandwidth=50e9,
    link_latency_s=3e-6,
    efficiencies=Efficiencies(
        linear=KernelEfficiency(compute=0.7, memory=0.8, half_rows=50, call_s=5e-6),
        attention=KernelEfficiency(compute=0.3, memory=0.6, call_s=7e-6, row_s=1e-6),
        norm=KernelEfficiency(memory=0.5, call_s=1e-6),
        rope=KernelEfficiency(memory=0.4, call_s=2e-6),
        copy=KernelEfficiency(memory=0.3, call_s=4e-6),
        collective=KernelEfficiency(memory=0.5, call_s=9e-6),
        step_s=3e-4,
        logit_row_s=2e-5,
    ),
)


@cache
def program(name: str) -> Program:
    return find_program(name)


def model(
    name: str, hardware: HardwareSpec = ROUGH, deployment: Deployment | None = None
) -> CostModel:
    return CostModel(program(name), hardware, deployment or Deployment())


def decode(batch: int, context: int) -> BatchShape:
    return BatchShape((RequestShape(1, context),) * batch)


def prefill(batch: int, context: int) -> BatchShape:
    return BatchShape((RequestShape(context, 0),) * batch)
