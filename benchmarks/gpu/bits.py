"""Part `bits`: two layers as wide as an 8B model's. A row's logits are the same bits alone and in
company, whole and in chunks, decoded and prefilled, by tiles of many shapes; and whether the
library's products have our bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from duetto.backends.backend import StepArrays
from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import launch_linear
from duetto.backends.cuda.random_weights import random_matrix
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.gpu import greedy, step_of
from duetto.program.ops import Linear
from gpu.bench import Bench
from gpu.device_model import DeviceModel

Logits = NDArray[np.float32]


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    length, company, odd = (9, 2, 7) if bench.rehearse else (1500, 33, 211)
    shapes = [BatchShape((RequestShape(length, 0),) * (1 if bench.rehearse else 4))]
    shapes.append(BatchShape((RequestShape(1, length - 1),) * company))
    model = DeviceModel.open(bench, "llama-3-8b", shapes, num_layers=2)
    ids = np.random.default_rng(3).integers(0, model.program.vocab_size, length)
    whole = _computed(model, ids, [length])
    axes = {
        "whole or in two chunks": _computed(model, ids, [length * 2 // 5, length]),
        "prefilled or decoded": _computed(model, ids, [length - 1, length]),
        "in chunks of any size": _computed(model, ids, [*range(7, length, odd), length]),
    }
    wrong = [name for name, logits in axes.items() if not np.array_equal(logits, whole)]
    alone, crowded = _beside_others(model, ids, company)
    axes["alone or in company"] = crowded
    wrong += ["alone or in company"] * (not np.array_equal(alone, crowded))
    if not np.isfinite(whole).all() or not np.ptp(whole) > 0:
        wrong.append("logits are numbers")
    if wrong:
        raise RuntimeError(f"other bits: {', '.join(wrong)}")
    return {"dtype": bench.dtype_name, "axes": list(axes), "library": _library(bench, model)}


def _computed(model: DeviceModel, ids: NDArray[np.int64], ends: Sequence[int]) -> Logits:
    """Of the last row, its tokens computed up to each of `ends` in turn."""
    start, logits = 0, np.empty((0, 0), np.float32)
    for end in ends:
        step = step_of(BatchShape((RequestShape(end - start, start),)))
        logits = _run(model, step._replace(token_ids=ids[start:end].astype(np.int32)))
        start = end
    return logits[-1]


def _run(model: DeviceModel, step: StepArrays) -> Logits:
    return model.backend.run(step, model.kv)


def _beside_others(
    model: DeviceModel, ids: NDArray[np.int64], company: int
) -> tuple[Logits, Logits]:
    """The logits of one request's next token, and those among so many requests that have other
    tokens and contexts behind blocks of their own."""
    length = len(ids)
    shape = BatchShape((RequestShape(1, length - 1),) * company)
    step = step_of(shape)._replace(token_ids=np.resize(ids, company).astype(np.int32))
    for layer in model.kv.layers:
        for numbers in (layer.keys, layer.values):
            numbers.normal_()
    first = StepArrays(
        *(step.token_ids[:1], step.positions[:1], step.slots[:1], step.query_starts[:2]),
        *(step.context_lens[:1], step.block_tables[:1], step.logit_rows[:1]),
    )
    rows = greedy(company)
    one = np.array(model.backend.start(first, model.kv, greedy(1), wants_logits=True).logits())
    all_ = np.array(model.backend.start(step, model.kv, rows, wants_logits=True).logits())
    return one[0], all_[0]


def _library(bench: Bench, model: DeviceModel) -> dict[str, bool]:
    """Whether the library's product has our bits, for each projection and numbers of rows."""
    found = {}
    for op in model.program.ops:
        if not isinstance(op, Linear):
            continue
        outputs, inputs = op.out.width, op.x.width
        matrix = random_matrix(GpuFormat(bench.dtype_name), outputs, inputs, bench.device)  # type: ignore[arg-type]
        for rows in (1, 3) if bench.rehearse else (1, 64, 512, 2048):
            name = f"{op.label(model.program)}, {rows} rows"
            if name in found or (op.rows != "all" and rows > 64):
                continue
            x = torch.randn(rows, inputs, device=bench.device).to(bench.dtype)
            ours = torch.empty(rows, outputs, device=bench.device, dtype=bench.dtype)
            launch_linear(x, matrix, ours)
            found[name] = bool(torch.equal(ours, x @ matrix.data.t()))
    return found
