"""Queries and keys normed by head and rotated, and KV written into its slots.

Rotation is that of program/ops.RopeSpec: pairs (i, i + half),
columns behind them stay. In int8 a head's row has a scale of its own, its largest magnitude / 127;
in fp8 (e4m3) / 448: as in backends/reference/kv.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from duetto.backends.cuda.arena import LARGEST, store_heads
from duetto.backends.cuda.kernels.norm import NO_NORM, Norm, rms_norm_twin
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.tensors import LayerKV

_ROWS, _WARPS = 8, 4  # (token, head) rows of a program


class Rotation(NamedTuple):
    """Of every position, [max_model_len, half] fp32 each."""

    cos: Tensor
    sin: Tensor


@triton.jit
def _quantized(x, divisor, at):
    steps = tl.div_rn(x, tl.zeros_like(x) + divisor)
    if at.dtype.element_ty == tl.int8:
        return _nearest(steps).to(tl.int8)
    else:
        return e4m3_bits(steps)


@triton.jit
def _nearest(x):
    """The nearest whole number of one below 2^22, the even one of two."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_bits(x):
    """The nearest e4m3 number of one up to 448, as uint8: by bits, as GPUs before sm_89 cannot."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = _nearest(tl.abs(x) * 512.0).to(tl.uint32)  # subnormal: steps of 2^-9
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def _store(at, scale_at, low, high, tail, is_row, LARGEST: tl.constexpr):
    """Rows of heads into the arena: low and high halves of pairs, and what is behind them. Each of
    them is (numbers, columns, whether there is such a number)."""
    if LARGEST > 0:
        largest = tl.maximum(tl.max(tl.abs(low[0]), 1), tl.max(tl.abs(high[0]), 1))
        largest = tl.maximum(largest, tl.max(tl.abs(tail[0]), 1))
        scale = tl.div_rn(largest, LARGEST)
        tl.store(scale_at, scale, mask=is_row)
        divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
        tl.store(at + low[1], _quantized(low[0], divisor, at), mask=low[2])
        tl.store(at + high[1], _quantized(high[0], divisor, at), mask=high[2])
        tl.store(at + tail[1], _quantized(tail[0], divisor, at), mask=tail[2])
    else:
        kept = at.dtype.element_ty
        tl.store(at + low[1], low[0].to(kept), mask=low[2])
        tl.store(at + high[1], high[0].to(kept), mask=high[2])
        tl.store(at + tail[1], tail[0].to(kept), mask=tail[2])


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_write(
    q, k, v, keys, values, key_scales, value_scales, positions, slots, cos, sin,
    q_norm, k_norm, q_stride, k_stride, v_stride, q_eps, k_eps, q_offset, k_offset, num_tokens,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
    TAILP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    WRITE: tl.constexpr, KEEP_K: tl.constexpr, LARGEST: tl.constexpr, FIRST_KIND: tl.constexpr,
):  # fmt: skip
    """ROWS rows (token, head) of the queries, the keys or the values, by program_id(1). The halves
    of pairs are columns [0, HALF) and [HALF, 2 HALF); TAILP has room for those behind."""
    kind = tl.program_id(1) + FIRST_KIND
    if kind == 0:
        _rotate_rows(
            q, None, None, positions, slots, cos, sin, q_norm, q_stride, q_eps, q_offset,
            num_tokens, QH, D, HALF, HALFP, TAILP, ROWS, NORM, ROTATE, False, True, 0.0,
        )  # fmt: skip
    elif kind == 1:
        _rotate_rows(
            k, keys, key_scales, positions, slots, cos, sin, k_norm, k_stride, k_eps, k_offset,
            num_tokens, KH, D, HALF, HALFP, TAILP, ROWS, NORM, ROTATE, WRITE, KEEP_K, LARGEST,
        )  # fmt: skip
    else:
        _rotate_rows(
            v, values, value_scales, positions, slots, cos, sin, None, v_stride, 0.0, 0.0,
            num_tokens, KH, D, HALF, HALFP, TAILP, ROWS, False, False, WRITE, False, LARGEST,
        )  # fmt: skip


@triton.jit
def _rotate_rows(
    x, stored, scales, positions, slots, cos, sin, norm, stride, eps, offset, num_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
    TAILP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    WRITE: tl.constexpr, KEEP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, head = row // HEADS, row % HEADS
    is_row = t < num_tokens
    pair, behind = tl.arange(0, HALFP), 2 * HALF + tl.arange(0, TAILP)
    is_pair = is_row[:, None] & (pair < HALF)[None, :]
    is_behind = is_row[:, None] & (behind < D)[None, :]
    source = x + (t.to(tl.int64) * stride + head * D)[:, None]
    low_at, high_at, tail_at = pair[None, :], pair[None, :] + HALF, behind[None, :]
    low = tl.load(source + low_at, mask=is_pair, other=0.0).to(tl.float32)
    high = tl.load(source + high_at, mask=is_pair, other=0.0).to(tl.float32)
    tail = tl.load(source + tail_at, mask=is_behind, other=0.0).to(tl.float32)
    kept = x.dtype.element_ty
    if NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1) + tl.sum(tail * tail, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low = low * scale * _weights_at(norm, pair, pair < HALF, offset)
        high = high * scale * _weights_at(norm, pair + HALF, pair < HALF, offset)
        tail = tail * scale * _weights_at(norm, behind, behind < D, offset)
        low, high = low.to(kept).to(tl.float32), high.to(kept).to(tl.float32)
        tail = tail.to(kept).to(tl.float32)
    if ROTATE:
        position = tl.load(positions + t, mask=is_row, other=0).to(tl.int64)
        angle = (position * HALF)[:, None] + pair[None, :]
        c = tl.load(cos + angle, mask=is_pair, other=0.0)
        s = tl.load(sin + angle, mask=is_pair, other=0.0)
        turned = low * c - high * s
        high = (high * c + low * s).to(kept).to(tl.float32)
        low = turned.to(kept).to(tl.float32)
    if KEEP:
        tl.store(source + low_at, low.to(kept), mask=is_pair)
        tl.store(source + high_at, high.to(kept), mask=is_pair)
        if NORM:
            tl.store(source + tail_at, tail.to(kept), mask=is_behind)
    if WRITE:
        place = tl.load(slots + t, mask=is_row, other=0).to(tl.int64) * HEADS + head
        at = stored + (place * D)[:, None]
        scale_at = stored if scales is None else scales + place
        _store(
            at, scale_at, (low, low_at, is_pair), (high, high_at, is_pair),
            (tail, tail_at, is_behind), is_row, LARGEST,
        )  # fmt: skip


@triton.jit
def _weights_at(norm, column, mask, offset):
    return (tl.load(norm + column, mask=mask, other=0.0) + offset)[None, :]


class Heads(NamedTuple):
    """Of one layer, and what is done to them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    keep_k: bool = False  # the keys' buffer is written too


def launch_rope_write(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, rotation: Rotation | None,
    kv: LayerKV | None, positions: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """q [T, heads * head_dim] in place, k and v [T, kv_heads * head_dim] into their slots.

    Norms are of both or of none. kv: None writes none; v is not read then.
    """
    head_dim = heads.head_dim
    half = head_dim // 2 if rotation is None else rotation.cos.shape[1]
    rows = 256 if knobs.runtime.interpret else _ROWS
    q_norm, k_norm = heads.q_norm or NO_NORM, heads.k_norm or NO_NORM
    arena = kv or LayerKV(k, v)
    keys, values = arena.keys, arena.values
    if keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    cos, sin = rotation or (None, None)
    most_heads = max(heads.num_heads, heads.num_kv_heads)
    kinds = range(
        0 if heads.num_heads else 1, 3 if kv is not None else bool(heads.num_kv_heads) + 1
    )
    _rope_write[(triton.cdiv(len(q) * most_heads, rows), len(kinds))](
        q, k, v, keys, values, arena.key_scales, arena.value_scales,
        positions, slots, cos, sin, q_norm.weight, k_norm.weight,
        q.stride(0), k.stride(0), v.stride(0),
        q_norm.eps, k_norm.eps, q_norm.offset, k_norm.offset, len(q),
        QH=max(1, heads.num_heads), KH=max(1, heads.num_kv_heads), D=head_dim,
        HALF=half, HALFP=triton.next_power_of_2(half),
        TAILP=triton.next_power_of_2(max(1, head_dim - 2 * half)), ROWS=rows,
        NORM=heads.q_norm is not None, ROTATE=rotation is not None, WRITE=kv is not None,
        KEEP_K=heads.keep_k, LARGEST=LARGEST.get(arena.keys.dtype, 0.0),
        FIRST_KIND=kinds[0], num_warps=_WARPS,
    )  # fmt: skip


def rope_write_twin(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, rotation: Rotation | None,
    kv: LayerKV | None, positions: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    new_k = k.clone()
    for x, norm in ((q, heads.q_norm), (new_k, heads.k_norm)):
        if norm is not None:
            rms_norm_twin(x, norm, x)
        if rotation is not None:
            _rotate_twin(x, heads.head_dim, rotation, positions[: len(x)].long())
    if heads.keep_k:
        k.copy_(new_k)
    if kv is None:
        return
    places = slots[: len(q)].long()
    for rows, stored, scales in (
        (new_k, kv.keys, kv.key_scales),
        (v, kv.values, kv.value_scales),
    ):
        store_heads(stored, scales, places, rows.float().reshape(len(q), -1, heads.head_dim))


def _rotate_twin(x: Tensor, head_dim: int, rotation: Rotation, positions: Tensor) -> None:
    by_head = x.float().reshape(len(x), -1, head_dim)
    half = rotation.cos.shape[1]
    cos, sin = rotation.cos[positions][:, None], rotation.sin[positions][:, None]
    first, second = by_head[..., :half].clone(), by_head[..., half : 2 * half].clone()
    by_head[..., :half] = first * cos - second * sin
    by_head[..., half : 2 * half] = second * cos + first * sin
    x.copy_(by_head.reshape(x.shape))


def variants() -> Iterator[KernelVariant]:
    """Of 32 query and 8 KV heads of 128."""
    for stored, largest, normed in (("bf16", 0.0, False), ("i8", 127.0, True)):
        signature = dict.fromkeys(("q", "k", "v"), "*bf16")
        signature |= dict.fromkeys(("keys", "values"), f"*{stored}")
        signature |= dict.fromkeys(("cos", "sin"), "*fp32")
        signature |= dict.fromkeys(("positions", "slots"), "*i32")
        signature |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32")
        signature |= dict.fromkeys(("q_eps", "k_eps", "q_offset", "k_offset"), "fp32")
        signature |= {"num_tokens": "i32"}
        constants: dict[str, Any] = {"QH": 32, "KH": 8, "D": 128, "HALF": 64, "HALFP": 64}
        constants |= {"TAILP": 1, "ROWS": _ROWS, "NORM": normed, "ROTATE": True, "WRITE": True}
        constants |= {"KEEP_K": False, "LARGEST": largest, "FIRST_KIND": 0}
        given = {"key_scales": largest > 0, "value_scales": largest > 0}
        for name, is_given in (given | {"q_norm": normed, "k_norm": normed}).items():
            if is_given:
                signature[name] = "*fp32"
            else:
                constants[name] = None
        name = f"{stored}{' with norms' if normed else ''}"
        yield KernelVariant(name, _rope_write, signature, constants, {"num_warps": _WARPS})
