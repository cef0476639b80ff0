"""What the reference backend needs in a step beside the program's buffers. Computes nothing.

Every operation frees what it made, so the hungriest one counts. Sizes follow ops.py by the array:
what an operation reads and writes, in fp32, and of some more.
"""

from duetto.program.activations import LargestStep
from duetto.program.dtype import KVDtype, kv_head_bytes
from duetto.program.op import Op
from duetto.program.ops import Attention, RmsNorm
from duetto.program.program import Program

_FP32, _FP64 = 4, 8


def scratch_bytes(program: Program, kv_dtype: KVDtype, step: LargestStep) -> int:
    """For the largest step that there may be."""
    return max(_op_bytes(op, step, kv_dtype) for op in program.ops)


def _op_bytes(op: Op, step: LargestStep, kv_dtype: KVDtype) -> int:
    if isinstance(op, RmsNorm):
        return _rms_norm(op, step)
    if isinstance(op, Attention):
        return _attention(op, step, kv_dtype)
    return _operands(op, step)


def _operands(op: Op, step: LargestStep) -> int:
    """What is read, and the result."""
    return step.rows(op) * _FP32 * sum(ref.width for ref in (*op.reads, *op.writes))


def _rms_norm(op: RmsNorm, step: LargestStep) -> int:
    """Read; widened; the quotient; rounded."""
    return step.rows(op) * op.x.width * (_FP32 + _FP64 + _FP64 + _FP32)


def _attention(op: Attention, step: LargestStep, kv_dtype: KVDtype) -> int:
    """Keys and values in fp32, while those of the request before are still there, and one of
    them as it is stored."""
    stored = op.num_kv_heads * kv_head_bytes(kv_dtype, op.head_dim)
    whole = min(2 * step.max_model_len, step.num_kv_tokens) * op.num_kv_heads * op.head_dim
    return _operands(op, step) + 2 * whole * _FP32 + step.max_model_len * stored
