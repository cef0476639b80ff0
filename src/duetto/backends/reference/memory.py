"""What the reference backend needs in a step beside the program's buffers. Computes nothing.

Every operation frees what it made, so the hungriest one counts. Sizes follow ops.py by the array:
what an operation reads and writes, in fp32, and of some more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from duetto.program.dtype import KVDtype, kv_head_bytes
from duetto.program.op import Op
from duetto.program.ops import Attention, RmsNorm
from duetto.program.program import Program
from duetto.program.shape import of_rows

_FP32, _FP64 = 4, 8


@dataclass(frozen=True, slots=True)
class LargestStep:
    """So many tokens and rows of logits, over contexts up to max_model_len that together have
    num_kv_tokens."""

    kv_dtype: KVDtype
    num_tokens: int
    num_logit_rows: int
    max_model_len: int
    num_kv_tokens: int

    def rows(self, op: Op) -> int:
        return of_rows(op.rows, self.num_tokens, self.num_logit_rows)


def scratch_bytes(
    program: Program,
    kv_dtype: KVDtype,
    *,
    num_tokens: int,
    num_logit_rows: int,
    max_model_len: int,
    num_kv_tokens: int,
) -> int:
    """For the largest step that there may be."""
    step = LargestStep(kv_dtype, num_tokens, num_logit_rows, max_model_len, num_kv_tokens)
    return max(_MORE.get(type(op), _operands)(op, step) for op in program.ops)


def _operands(op: Op, step: LargestStep) -> int:
    """What is read, and the result."""
    return step.rows(op) * _FP32 * sum(ref.width for ref in (*op.reads, *op.writes))


def _rms_norm(op: RmsNorm, step: LargestStep) -> int:
    """Read; widened; the quotient; rounded."""
    return step.rows(op) * op.x.width * (_FP32 + _FP64 + _FP64 + _FP32)


def _attention(op: Attention, step: LargestStep) -> int:
    """Keys and values in fp32, while those of the request before are still there, and one of
    them as it is stored."""
    stored = op.num_kv_heads * kv_head_bytes(step.kv_dtype, op.head_dim)
    whole = min(2 * step.max_model_len, step.num_kv_tokens) * op.num_kv_heads * op.head_dim
    return _operands(op, step) + 2 * whole * _FP32 + step.max_model_len * stored


_MORE: dict[type[Op], Callable[[Any, LargestStep], int]] = {
    RmsNorm: _rms_norm,
    Attention: _attention,
}
