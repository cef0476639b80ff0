"""The activations of gated layers, on numbers in fp32: what several kernels compute in passing."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.program.ops import Activation

_GELU_FACTOR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """silu(x) = x * sigmoid(x). gelu_tanh(x) = x * (1 + tanh(y)) / 2 = x * sigmoid(2 y), in which
    nothing cancels for a negative y. exp may be inf: the result is then the right 0."""
    if KIND == "gelu_tanh":
        inner = _GELU_FACTOR * (x + _GELU_CUBE * x * x * x)
    else:
        tl.static_assert(KIND == "silu")
        inner = x
    return x / (1.0 + tl.exp(-inner))


def activate_twin(x: Tensor, kind: Activation) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")
