"""Rows of the embedding table, and where a token's id comes from.

A token that the step before sampled is read where that step left it: the host need not know it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.linear import widen
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.tensors import Matrix

_COLUMNS = 1024  # of a program


@triton.jit
def _embed(
    token_ids, feedback, sampled, data, scales, out, scale_stride, group_stride, out_stride, scale,
    K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < K
    place = tl.load(feedback + t)
    own = tl.load(token_ids + t)
    fed = tl.load(sampled + tl.maximum(place, 0))
    token = tl.maximum(tl.where(place < 0, own, fed), 0).to(tl.int64)
    if KIND == "int4":
        group, within = column // 64, column % 64
        byte = tl.load(data + token * ((K + 63) // 64 * 32) + group * 32 + within % 32, mask=mask)
        numbers = ((byte.to(tl.int32) >> tl.where(within < 32, 0, 4)) & 15) - 8
        row = numbers.to(tl.float32)
    else:
        row = widen(tl.load(data + token * K + column, mask=mask, other=0), tl.float32, KIND)
    if GROUP > 0:
        at = token * scale_stride + column // GROUP * group_stride
        row = row * tl.load(scales + at, mask=mask, other=0.0)
    elif scales is not None:
        row = row * tl.load(scales + token * scale_stride)
    tl.store(
        out + t.to(tl.int64) * out_stride + column,
        (row * scale).to(out.dtype.element_ty),
        mask=mask,
    )


def launch_embed(
    token_ids: Tensor, feedback: Tensor, sampled: Tensor, table: Matrix, out: Tensor, scale: float
) -> None:
    """out[t] = table[token] * scale, [T, K]. The token is token_ids[t], or sampled[feedback[t]]
    where feedback[t] is not negative."""
    width, kind = table.shape[1], str(table.format.kind)
    data = table.data
    if kind == "fp8":  # decoded by bits: GPUs before sm_89 have no other way
        kind, data = "fp8_bits", data.view(torch.int8)
    grid = (len(out), triton.cdiv(width, _COLUMNS))
    scale_strides = (0, 0) if table.scales is None else (*table.scales.stride(), 0)[:2]
    _embed[grid](
        token_ids, feedback, sampled, data, table.scales, out, *scale_strides, out.stride(0), scale,
        K=width, KIND=kind, GROUP=table.format.group, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip


def embed_twin(
    token_ids: Tensor, feedback: Tensor, sampled: Tensor, table: Matrix, out: Tensor, scale: float
) -> None:
    own = token_ids[: len(out)].long()
    place = feedback[: len(out)].long()
    tokens = torch.where(place < 0, own, sampled.long()[place.clamp(min=0)]).clamp(min=0)
    out.copy_(_rows(table, tokens) * scale)


def _rows(table: Matrix, tokens: Tensor) -> Tensor:
    data, width, group = table.data[tokens], table.shape[1], table.format.group
    if table.format.kind == "int4":
        halves = data.reshape(len(tokens), -1, 32)
        numbers = torch.cat((halves & 15, halves >> 4), 2).reshape(len(tokens), -1)
        rows = numbers.float()[:, :width] - 8
    else:
        rows = data.float()
    if table.scales is None:
        return rows
    scales = table.scales[tokens].float()
    if not group:
        return rows * scales[:, None]
    return rows * scales.repeat_interleave(group, 1)[:, :width]


def variants() -> Iterator[KernelVariant]:
    """Of a table with 4,096 columns."""
    pointers = {"token_ids": "*i32", "feedback": "*i32", "sampled": "*i32", "out": "*bf16"}
    strides = dict.fromkeys(("scale_stride", "group_stride", "out_stride"), "i32")
    rest = {**strides, "scale": "fp32"}
    for kind, group, stored in (("bfloat16", 0, "*bf16"), ("int8", 128, "*i8")):
        signature = pointers | rest | {"data": stored}
        constants = {"K": 4096, "KIND": kind, "GROUP": group, "COLUMNS": _COLUMNS}
        if group:
            signature |= {"scales": "*fp32"}
        else:
            constants |= {"scales": None}
        yield KernelVariant(f"embed {kind}", _embed, signature, constants, {"num_warps": 4})
