"""Queries and keys normed by head and rotated, and KV written into its slots.

One program for each token and head. Rotation is that of program/ops.RopeSpec: pairs (i, i + half),
columns behind them stay. In int8 a head's row has a scale of its own, its largest magnitude / 127;
in fp8 (e4m3) / 448: as in backends/reference/kv.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.norm import NO_NORM, Norm, rms_norm_twin
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.tensors import LayerKV

QUANTIZED_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Rotation(NamedTuple):
    """Of every position, [max_model_len, half] fp32 each."""

    cos: Tensor
    sin: Tensor


@triton.jit
def _store_quantized(
    at, scale_at, first, second, rest, low, half_mask, tail, tail_mask,
    HALF: tl.constexpr, LARGEST: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    if TAIL > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
    scale = tl.div_rn(largest, LARGEST)
    tl.store(scale_at, scale)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    tl.store(at + low, _quantized(first, divisor, at), mask=half_mask)
    tl.store(at + HALF + low, _quantized(second, divisor, at), mask=half_mask)
    if TAIL > 0:
        tl.store(at + tail, _quantized(rest, divisor, at), mask=tail_mask)


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
def _rope_write(
    q, k, v, keys, values, key_scales, value_scales, positions, slots, cos, sin,
    q_norm, k_norm, q_stride, k_stride, v_stride, q_eps, k_eps, q_offset, k_offset,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
    TAIL: tl.constexpr, TAILP: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    WRITE: tl.constexpr, KEEP_K: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Head program_id(1): first the queries', then the keys', then (WRITE) the values'."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low = tl.arange(0, HALFP)
    half_mask = low < HALF
    tail = 2 * HALF + tl.arange(0, TAILP)
    tail_mask = tail < D
    is_q, is_v = h < QH, h >= QH + KH
    if is_q:
        source = q + t * q_stride + h * D
    elif is_v:
        source = v + t * v_stride + (h - QH - KH) * D
    else:
        source = k + t * k_stride + (h - QH) * D
    first = tl.load(source + low, mask=half_mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + low, mask=half_mask, other=0.0).to(tl.float32)
    rest = tl.zeros([TAILP], tl.float32)
    if TAIL > 0:
        rest = tl.load(source + tail, mask=tail_mask, other=0.0).to(tl.float32)
    kept = q.dtype.element_ty
    if NORM:
        if not is_v:
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            if TAIL > 0:
                squares += tl.sum(rest * rest, 0)
            scale = tl.rsqrt(squares / D + tl.where(is_q, q_eps, k_eps))
            offset = tl.where(is_q, q_offset, k_offset)
            weight = q_norm if is_q else k_norm
            w = tl.load(weight + low, mask=half_mask, other=0.0) + offset
            first = (first * scale * w).to(kept).to(tl.float32)
            w = tl.load(weight + HALF + low, mask=half_mask, other=0.0) + offset
            second = (second * scale * w).to(kept).to(tl.float32)
            if TAIL > 0:
                w = tl.load(weight + tail, mask=tail_mask, other=0.0) + offset
                rest = (rest * scale * w).to(kept).to(tl.float32)
    if ROTATE:
        if not is_v:
            angle = tl.load(positions + t).to(tl.int64) * HALF + low
            c = tl.load(cos + angle, mask=half_mask, other=0.0)
            s = tl.load(sin + angle, mask=half_mask, other=0.0)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
    first, second = first.to(kept).to(tl.float32), second.to(kept).to(tl.float32)
    if is_q or (KEEP_K and not is_v):
        tl.store(source + low, first.to(kept), mask=half_mask)
        tl.store(source + HALF + low, second.to(kept), mask=half_mask)
        if NORM and TAIL > 0:
            tl.store(source + tail, rest.to(kept), mask=tail_mask)
    if WRITE:
        if not is_q:
            slot = tl.load(slots + t).to(tl.int64)
            row = slot * KH + (h - QH - KH if is_v else h - QH)
            at = (values if is_v else keys) + row * D
            if LARGEST > 0:
                scale_at = (value_scales if is_v else key_scales) + row
                _store_quantized(
                    at, scale_at, first, second, rest, low, half_mask, tail, tail_mask,
                    HALF, LARGEST, TAIL,
                )  # fmt: skip
            else:
                tl.store(at + low, first.to(at.dtype.element_ty), mask=half_mask)
                tl.store(at + HALF + low, second.to(at.dtype.element_ty), mask=half_mask)
                if TAIL > 0:
                    tl.store(at + tail, rest.to(at.dtype.element_ty), mask=tail_mask)


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
    tail = head_dim - 2 * half
    num_programs = heads.num_heads + heads.num_kv_heads * (2 if kv is not None else 1)
    q_norm, k_norm = heads.q_norm or NO_NORM, heads.k_norm or NO_NORM
    arena = kv or LayerKV(k, v)
    keys, values = arena.keys, arena.values
    if keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    cos, sin = rotation or (None, None)
    _rope_write[(len(q), num_programs)](
        q, k, v, keys, values, arena.key_scales, arena.value_scales,
        positions, slots, cos, sin, q_norm.weight, k_norm.weight,
        q.stride(0), k.stride(0), v.stride(0),
        q_norm.eps, k_norm.eps, q_norm.offset, k_norm.offset,
        QH=heads.num_heads, KH=heads.num_kv_heads, D=head_dim,
        HALF=half, HALFP=triton.next_power_of_2(half),
        TAIL=tail, TAILP=triton.next_power_of_2(max(1, tail)),
        NORM=heads.q_norm is not None, ROTATE=rotation is not None, WRITE=kv is not None,
        KEEP_K=heads.keep_k, LARGEST=QUANTIZED_LARGEST.get(arena.keys.dtype, 0.0), num_warps=1,
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
        _store_twin(rows.float().reshape(len(q), -1, heads.head_dim), stored, scales, places)


def _rotate_twin(x: Tensor, head_dim: int, rotation: Rotation, positions: Tensor) -> None:
    by_head = x.float().reshape(len(x), -1, head_dim)
    half = rotation.cos.shape[1]
    cos, sin = rotation.cos[positions][:, None], rotation.sin[positions][:, None]
    first, second = by_head[..., :half].clone(), by_head[..., half : 2 * half].clone()
    by_head[..., :half] = first * cos - second * sin
    by_head[..., half : 2 * half] = second * cos + first * sin
    x.copy_(by_head.reshape(x.shape))


def _store_twin(rows: Tensor, stored: Tensor, scales: Tensor | None, places: Tensor) -> None:
    if scales is None:
        stored[places] = rows.to(stored.dtype)
        return
    scale = rows.abs().amax(-1) / QUANTIZED_LARGEST[stored.dtype]
    scales[places] = scale
    steps = rows / torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    if stored.dtype == torch.int8:
        steps = steps.round()
    stored[places] = steps.to(stored.dtype)


def variants() -> Iterator[KernelVariant]:
    """Of 32 query and 8 KV heads of 128."""
    for stored, largest, normed in (("bf16", 0.0, False), ("i8", 127.0, True)):
        signature = dict.fromkeys(("q", "k", "v"), "*bf16")
        signature |= dict.fromkeys(("keys", "values"), f"*{stored}")
        signature |= dict.fromkeys(("cos", "sin"), "*fp32")
        signature |= dict.fromkeys(("positions", "slots"), "*i32")
        signature |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32")
        signature |= dict.fromkeys(("q_eps", "k_eps", "q_offset", "k_offset"), "fp32")
        constants: dict[str, Any] = {"QH": 32, "KH": 8, "D": 128, "HALF": 64, "HALFP": 64}
        constants |= {"TAIL": 0, "TAILP": 1, "NORM": normed, "ROTATE": True, "WRITE": True}
        constants |= {"KEEP_K": False, "LARGEST": largest}
        given = {"key_scales": largest > 0, "value_scales": largest > 0}
        for name, is_given in (given | {"q_norm": normed, "k_norm": normed}).items():
            if is_given:
                signature[name] = "*fp32"
            else:
                constants[name] = None
        name = f"{stored}{' with norms' if normed else ''}"
        yield KernelVariant(name, _rope_write, signature, constants, {"num_warps": 1})
