"""Triton's interpreter, where it differs from a GPU, or is slow, for these tests.

Products of matrices: numpy adds up in another order for another number of rows, and multiplies
bf16 as whole numbers. A GPU adds up along K in one order, whatever the tile (docs/design/gpu.md;
`make gpu` shows it). Here sums are in double, rounded once to fp32: those of fp16 and bf16 numbers
are exact, so they have no order, and those of fp32 numbers very nearly.

Functions within kernels are run as they are. The interpreter searches Triton's modules for what is
to be interpreted in each call anew, though a launch has done so for kernels, and a first call for
Triton's own functions.
"""

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _patch_lang,
)

_prepared: set[str] = set()  # modules of Triton's own


def mend_interpreter() -> None:
    InterpreterBuilder.create_dot = _create_dot  # type: ignore[method-assign]
    InterpretedFunction.__call__ = _call  # type: ignore[method-assign]


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    module = self.fn.__module__
    if module.startswith("triton.") and module not in _prepared:
        _prepared.add(module)
        _patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _create_dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    input_precision: Any,
    max_num_imprecise_acc: int,
) -> TensorHandle:
    product = np.matmul(_in_double(a), _in_double(b)).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _in_double(factor: TensorHandle) -> NDArray[np.float64]:
    assert not factor.dtype.scalar.is_fp8(), "kernels widen them before"
    if factor.dtype.scalar == tl.bfloat16:
        return (factor.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return factor.data.astype(np.float64)
