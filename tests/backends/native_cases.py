"""Steps, arrays and packed weights for tests of the native plan."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from duetto.backends.backend import StepArrays
from duetto.backends.reference.kv import KVArena
from duetto.backends.reference.ops import OPS, Run

native = pytest.importorskip("duetto._native")

ISAS = native.isas()
BLOCK_SIZE = 16
Array = NDArray[np.float32]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.RandomState(seed).uniform(-2, 2, shape).astype(np.float32)


def ints(values: Any) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32)


def one_request(num_rows: int, num_past: int = 0, **changes: Any) -> StepArrays:
    """Rows of one request whose blocks are numbered backwards."""
    positions = np.arange(num_past, num_past + num_rows)
    num_blocks = -(-(num_past + num_rows) // BLOCK_SIZE)
    table = np.arange(num_blocks, 0, -1)
    fields = {
        "token_ids": ints(np.arange(num_rows) % 7),
        "positions": ints(positions),
        "slots": ints(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
        "query_starts": ints([0, num_rows]),
        "context_lens": ints([num_past + num_rows]),
        "block_tables": ints([table]),
        "logit_rows": ints([num_rows - 1]),
    }
    return StepArrays(**fields | changes)


def run(plan: Any, step: StepArrays, result: tuple[int, int, int], kv: Any = None) -> Array:
    logits: Array = plan.run(
        step.token_ids,
        step.positions,
        step.slots,
        step.query_starts,
        step.context_lens,
        step.block_tables,
        step.logit_rows,
        kv,
        result,
    )
    return logits


def pack(format: str, group: int, weight: Array, pool: Any = None) -> Any:
    data_bytes, scale_bytes = native.packed_bytes(format, group, *weight.shape)
    data, scales = native.Arena(data_bytes).array, native.Arena(scale_bytes).array
    pool = pool or native.Pool(1)
    assert native.pack(format, group, [weight], data, scales if scale_bytes else None, pool) is None
    return native.Weight(format, group, *weight.shape, data, scales if scale_bytes else None)


def reference(
    op: Any,
    buffers: dict[str, Array],
    step: StepArrays,
    weights: dict[str, Array] | None = None,
    kv: KVArena | None = None,
    **widths: int,
) -> dict[str, Array]:
    """The buffers after one operation of the reference backend."""
    buffers = {name: array.copy() for name, array in buffers.items()}
    widths |= {name: array.shape[1] for name, array in buffers.items()}
    OPS[type(op)](op, Run(step, kv or KVArena((), ()), weights or {}, widths, buffers))
    return buffers
