"""act(gate) * up of rows that hold both, side by side: what a fused projection does by itself."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.activations import activate, activate_twin
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.program.ops import Activation

_COLUMNS = 1024  # of a program
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # the bits of a fused projection


@triton.jit
def _gated_act(x, out, x_stride, out_stride, W, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < W
    gate = tl.load(x + t * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + t * x_stride + W + column, mask=mask, other=0.0).to(tl.float32)
    result = activate(gate, KIND) * up
    tl.store(out + t * out_stride + column, result.to(out.dtype.element_ty), mask=mask)


def launch_gated_act(x: Tensor, out: Tensor, act: Activation) -> None:
    """x [T, 2 * width]: gate, then up; out [T, width]."""
    width = out.shape[1]
    _gated_act[(len(x), triton.cdiv(width, _COLUMNS))](
        x, out, x.stride(0), out.stride(0), width, KIND=act, COLUMNS=_COLUMNS, **_OPTIONS
    )


def gated_act_twin(x: Tensor, out: Tensor, act: Activation) -> None:
    gate, up = x.float().chunk(2, dim=1)
    out.copy_(activate_twin(gate, act) * up)


def variants() -> Iterator[KernelVariant]:
    """Of 14,336 columns."""
    signature = {"x": "*bf16", "out": "*bf16", "x_stride": "i32", "out_stride": "i32", "W": "i32"}
    for kind in ("silu", "gelu_tanh"):
        constants = {"KIND": kind, "COLUMNS": _COLUMNS}
        yield KernelVariant(kind, _gated_act, signature, constants, _OPTIONS)
