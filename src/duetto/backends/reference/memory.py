"""What the reference backend needs in a step beside the program's buffers. Computes nothing.

Every operation frees what it made, so the hungriest one counts. Sizes follow ops.py by the array.
"""

from duetto.program.dtype import KVDtype, kv_head_bytes
from duetto.program.ops import Attention, Linear, Op, RmsNorm
from duetto.program.program import Program

_FP32, _FP64 = 4, 8


def scratch_bytes(
    program: Program,
    kv_dtype: KVDtype,
    *,
    num_tokens: int,
    num_logit_rows: int,
    max_model_len: int,
    num_kv_tokens: int,
) -> int:
    """For the largest step: so many tokens and rows of logits, over contexts up to max_model_len
    that together have num_kv_tokens."""

    def needs(op: Op) -> int:
        if isinstance(op, RmsNorm):  # read; widened; the quotient; rounded
            rows = num_logit_rows if op.after_select else num_tokens
            return rows * op.x.width * (_FP32 + _FP64 + _FP64 + _FP32)
        if isinstance(op, Linear):  # read; the product; what it is added to
            rows = num_logit_rows if op.after_select else num_tokens
            return rows * _FP32 * (op.x.width + op.out.width * (2 if op.accumulate else 1))
        if isinstance(op, Attention):
            return num_tokens * 2 * op.q.width * _FP32 + gathered(op)  # read; the result
        return 0

    def gathered(op: Attention) -> int:
        """Keys and values in fp32, while those of the request before are still there, and one of
        them as it is stored."""
        stored = op.num_kv_heads * kv_head_bytes(kv_dtype, op.head_dim)
        whole = min(2 * max_model_len, num_kv_tokens) * op.num_kv_heads * op.head_dim
        return 2 * whole * _FP32 + max_model_len * stored

    return max(map(needs, program.ops))
