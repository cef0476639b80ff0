"""Norms, embeddings, rotations and rows: each kernel against its twin, and the same bits alone."""

import pytest
import torch

from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.embed import embed_twin, launch_embed
from duetto.backends.cuda.kernels.norm import (
    Norm,
    add_norm_twin,
    launch_add_norm,
    launch_rms_norm,
    rms_norm_twin,
)
from duetto.backends.cuda.kernels.rope_write import (
    Heads,
    Rotation,
    launch_rope_write,
    rope_write_twin,
)
from duetto.backends.cuda.kernels.rows import (
    launch_select_rows,
    launch_soft_cap,
    select_rows_twin,
    soft_cap_twin,
)
from duetto.backends.cuda.tensors import LayerKV, Matrix

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
SIZES = pytest.mark.parametrize("rows", [1, 19])


def numbers(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(dtype)


def norm_of(group: int, offset: float = 0.0) -> Norm:
    return Norm(1 + 0.1 * numbers(group, seed=7), 1e-5, group, offset)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """One rounding apart at most: the sums of a twin are added up in another order."""
    step = {torch.float16: 2e-3, torch.float32: 2e-6}[got.dtype]
    torch.testing.assert_close(got, want, rtol=step, atol=step)


@DTYPES
@SIZES
@pytest.mark.parametrize(("width", "group"), [(111, 111), (500, 500), (128, 16), (120, 40)])
def test_rms_norm(dtype, rows, width, group):
    wide = numbers(rows, width + 5, dtype=dtype)
    x, norm = wide[:, 3 : 3 + width], norm_of(group, offset=1.0)
    got, want = torch.empty(rows, width, dtype=dtype), torch.empty(rows, width, dtype=dtype)
    launch_rms_norm(x, norm, got)
    rms_norm_twin(x, norm, want)
    close(got, want)
    alone = torch.empty(1, width, dtype=dtype)
    launch_rms_norm(x[-1:], norm, alone)
    assert torch.equal(alone[0], got[-1])
    launch_rms_norm(x, norm, x)  # in place
    assert torch.equal(x, got)


@DTYPES
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_add_norm(dtype, before, after):
    width = 111
    norms = (norm_of(width, 1.0) if before else None, norm_of(width) if after else None)
    found = []
    for do in (launch_add_norm, add_norm_twin):
        x, y = numbers(5, width, dtype=dtype), numbers(5, width, dtype=dtype, seed=1)
        out = torch.zeros(5, width, dtype=dtype)
        do(x, y, *norms, out if after else None)
        found.append((x, out))
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_add_norm_has_the_bits_of_its_parts():
    x, y = numbers(5, 111, dtype=torch.float16), numbers(5, 111, dtype=torch.float16, seed=1)
    before, after = norm_of(111, 1.0), norm_of(111)
    out = torch.empty_like(x)
    total, normed_y, normed = x.clone(), torch.empty_like(y), torch.empty_like(x)
    launch_add_norm(x, y, before, after, out)
    launch_rms_norm(y, before, normed_y)
    total += normed_y
    launch_rms_norm(total, after, normed)
    assert torch.equal(x, total)
    assert torch.equal(out, normed)


def table_of(kind: str, rows: int, width: int) -> Matrix:
    if kind == "float16":
        data = numbers(rows, width, dtype=torch.float16)
        return Matrix(GpuFormat("float16"), (rows, width), data)
    if kind == "fp8":
        data = numbers(rows, width).to(torch.float8_e4m3fn)
        return Matrix(GpuFormat("fp8"), (rows, width), data, numbers(rows, 1)[:, 0].abs())
    group = {"int8": 128, "int4": 64}[kind]
    scales = numbers(-(-width // group), rows).abs().t()  # group by group, as weights.py keeps them
    generator = torch.Generator().manual_seed(3)
    if kind == "int8":
        data = torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator)
    else:
        padded = -(-width // 64) * 32
        data = torch.randint(0, 256, (rows, padded), dtype=torch.uint8, generator=generator)
    return Matrix(GpuFormat(kind, group), (rows, width), data, scales)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("width", [64, 111, 1100])
def test_embed(kind, width):
    table = table_of(kind, 50, width)
    token_ids = torch.tensor([0, 49, 7, -1, 7], dtype=torch.int32)
    feedback = torch.tensor([-1, -1, -1, 2, 0], dtype=torch.int32)
    sampled = torch.tensor([11, 12, 13], dtype=torch.int32)
    got, want = torch.empty(5, width), torch.empty(5, width)
    launch_embed(token_ids, feedback, sampled, table, got, 1.5)
    embed_twin(token_ids, feedback, sampled, table, want, 1.5)
    assert torch.equal(got, want)
    fed = torch.empty(2, width)
    ids = torch.tensor([13, 11], dtype=torch.int32)
    embed_twin(ids, torch.full((2,), -1, dtype=torch.int32), sampled, table, fed, 1.5)
    assert torch.equal(got[3:], fed)


def arena_of(dtype: torch.dtype, kv_heads: int, head_dim: int) -> LayerKV:
    keys, values = (torch.zeros(64, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    if dtype in (torch.float16, torch.float32):
        return LayerKV(keys, values)
    return LayerKV(keys, values, torch.zeros(64, kv_heads), torch.zeros(64, kv_heads))


@DTYPES
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (80, 40), (96, 24)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write(dtype, stored, head_dim, half, normed):
    rows, q_heads, kv_heads = 5, 4, 2
    norm = norm_of(head_dim) if normed else None
    heads = Heads(q_heads, kv_heads, head_dim, norm, norm, keep_k=True)
    angles = numbers(100, half)
    rotation = Rotation(angles.cos(), angles.sin())
    positions = torch.tensor([0, 1, 99, 50, 7], dtype=torch.int32)
    slots = torch.tensor([3, 63, 0, 11, 12], dtype=torch.int32)
    found = []
    for do in (launch_rope_write, rope_write_twin):
        qkv = numbers(rows, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
        q, k, v = qkv.split([w * head_dim for w in (q_heads, kv_heads, kv_heads)], 1)
        kv = arena_of(stored or dtype, kv_heads, head_dim)
        do(q, k, v, heads, rotation, kv, positions, slots)
        found.append((qkv, kv))
    (got, got_kv), (want, want_kv) = found
    close(got, want)
    assert (got_kv.values.float() == want_kv.values.float()).all()
    if stored is None:
        close(got_kv.keys, want_kv.keys)
        return
    assert torch.equal(got_kv.value_scales, want_kv.value_scales)
    close(got_kv.key_scales, want_kv.key_scales)
    # A key that is a rounding apart may fall on the next step of its format.
    apart = (got_kv.keys.float() - want_kv.keys.float()).abs()
    assert (apart > 0).float().mean() < 0.02
    assert (apart <= torch.maximum(torch.ones(()), want_kv.keys.float().abs() / 8)).all()


def test_a_row_of_zeros_has_scale_0():
    kv = arena_of(torch.int8, 1, 16)
    k, v, q = torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(1, 16)
    places = torch.tensor([5], dtype=torch.int32)
    launch_rope_write(q, k, v, Heads(1, 1, 16), None, kv, places, places)
    assert not kv.keys.any()
    assert not kv.key_scales.any()


def test_rotation_alone_writes_no_kv():
    angles = numbers(100, 8)
    rotation = Rotation(angles.cos(), angles.sin())
    positions = torch.tensor([5, 60, 7], dtype=torch.int32)
    found = []
    for do in (launch_rope_write, rope_write_twin):
        q = numbers(3, 64)
        do(q, q, q, Heads(4, 0, 16), rotation, None, positions, positions)
        found.append(q)
    close(*found)


@DTYPES
def test_rows(dtype):
    x = numbers(9, 1100, dtype=dtype)
    rows = torch.tensor([8, 0, 3, 99], dtype=torch.int32)
    got, want = torch.empty(3, 1100, dtype=dtype), torch.empty(3, 1100, dtype=dtype)
    launch_select_rows(x, rows, got)
    select_rows_twin(x, rows, want)
    assert torch.equal(got, want)


def test_soft_cap():
    x = torch.tensor([[0.0, 1.0, -3.0, 1e9, -1e9, float("inf"), -float("inf")]])
    got, want = x.clone(), x.clone()
    launch_soft_cap(got, 30.0)
    soft_cap_twin(want, 30.0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(got).all()
