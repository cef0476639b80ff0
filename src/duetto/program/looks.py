"""What looks need of a model's program (core/batch.Look).

Layer 0's keys and values depend on a token and its position alone. Layer 1's are the first that
depend on what stands before it (CacheBlend, Yao et al., EuroSys 2025), and computing them takes one
layer and a projection. Knows no backend and no numbers.
"""

from collections.abc import Sequence

from duetto.core.errors import EngineError
from duetto.program.op import Op
from duetto.program.program import Program

LOOKED_LAYER = 1  # whose keys and values are compared


def first_attending_layer(num_layers: int) -> int:
    """The first layer whose attention counts. In the earlier half tokens attend to their neighbours
    and to the first of all, whatever is asked: on the demo reader that costs 4 points of right
    answers. csrc/walk.cpp has the same."""
    return num_layers // 2


def why_no_deviation(program: Program) -> str | None:
    """Why this program cannot be asked for a `deviation`; None if it can."""
    num_layers = len(program.kv)
    if num_layers > LOOKED_LAYER:
        return None
    return (
        f"a deviation of keys and values is told by the second layer; this model has {num_layers}"
    )


def num_ops_up_to_kv(program: Program, ops: Sequence[Op]) -> int:
    """How many of `ops`, the program's (perhaps fused), there are up to the one that writes the
    looked layer's KV. Raises EngineError if there is no such layer."""
    if reason := why_no_deviation(program):
        raise EngineError(reason)
    for place, op in enumerate(ops):
        if op.kv is not None and op.kv.writes and op.kv.layer == LOOKED_LAYER:
            return place + 1
    raise AssertionError(f"no operation writes the KV of layer {LOOKED_LAYER}")
