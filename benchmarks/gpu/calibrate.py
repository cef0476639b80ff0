"""Part `calibrate`: `duetto calibrate` on the device, and what its prices say of an 8B model."""

from typing import Any

import msgspec

from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.gpu import MODEL, measure_gpu
from duetto.models.programs import build_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.program.shape import Precision
from gpu.bench import TINY, Bench


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    if bench.rehearse:
        shapes = tuple(BatchShape((RequestShape(new, past),)) for new, past in ((1, 8), (3, 0)))
        spec = measure_gpu(config=TINY, dtype="float16", shapes=shapes, shrink=64, runs=1)
    else:
        spec = measure_gpu(config=MODEL)
    program = build_program(bench.config("llama-3-8b"))
    deployment = Deployment(precision=Precision(2.0, 2.0, 2.0), arithmetic=bench.dtype_name)
    model = CostModel(program, spec, deployment)
    steps = [
        {"step": words, "measured_s": seconds, "predicted_s": model.step_time(shape)}
        for words, shape, seconds in _measured(bench)
    ]
    return {"steps": steps, "hardware": msgspec.to_builtins(spec)}


def _measured(bench: Bench) -> list[tuple[str, BatchShape, float]]:
    """What the parts `decode` and `prefill` found."""
    found = []
    for one in bench.found.get("decode", {}).get("steps", ()):
        batch, context = one["at"]
        shape = BatchShape((RequestShape(1, context - 1),) * batch)
        found.append((f"decode, B = {batch} at {context:,}", shape, one["ours_s"]))
    for one in bench.found.get("prefill", {}).get("prompts", ()):
        shape = BatchShape((RequestShape(one["tokens"], 0),))
        found.append((f"prefill, {one['tokens']:,} tokens", shape, one["seconds"]))
    return found
