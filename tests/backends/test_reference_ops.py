"""Each operation of the reference against another formula for it, number by number."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from program.operations import every_operation

from duetto.backends.backend import StepArrays
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.ops import OPS, Run
from duetto.program.dtype import KVDtype
from duetto.program.ops import (
    Add,
    Attention,
    Embed,
    EmbedPart,
    GatedAct,
    Linear,
    Ref,
    RmsNorm,
    Rope,
    RopeSpec,
    SelectRows,
    SoftCap,
    WriteKV,
)
from duetto.program.program import KVSpec
from duetto.program.rewrites.fuse import FusedLinear
from duetto.program.rewrites.runs import AddNorm, GatedLinear, RopeWrite

ROWS = (1, 2, 19, 99)
BLOCK_SIZE = 8


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.RandomState(seed).uniform(-2, 2, shape).astype(np.float32)


def ints(values: Any) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)


def one_request(num_rows: int, num_past: int = 0, **changes: Any) -> StepArrays:
    """Rows of one request whose blocks are 1, 2, 3, ... backwards."""
    positions = np.arange(num_past, num_past + num_rows)
    num_blocks = -(-(num_past + num_rows) // BLOCK_SIZE)
    table = np.arange(num_blocks, 0, -1)
    fields = {
        "token_ids": ints(np.arange(num_rows) % 7),
        "positions": ints(positions),
        "slots": ints(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
        "query_starts": ints([0, num_rows]),
        "context_lens": ints([num_past + num_rows]),
        "block_tables": ints([table]),
        "logit_rows": ints([num_rows - 1]),
    }
    return StepArrays(**fields | changes)


def run_op(
    op: Any,
    buffers: dict[str, NDArray[np.float32]],
    weights: dict[str, NDArray[np.float32]] | None = None,
    step: StepArrays | None = None,
    kv: KVArena | None = None,
    **widths: int,
) -> dict[str, NDArray[np.float32]]:
    """The buffers after one operation."""
    buffers = {name: array.copy() for name, array in buffers.items()}
    widths |= {name: array.shape[1] for name, array in buffers.items()}
    step = step or one_request(len(next(iter(buffers.values()))))
    kv = kv or KVArena((), ())
    OPS[type(op)](op, Run(step, kv, weights or {}, widths, buffers))
    return buffers


def test_every_operation_has_its_function() -> None:
    fused = {FusedLinear, AddNorm, RopeWrite, GatedLinear}
    assert set(OPS) == {*every_operation(), EmbedPart, *fused}


def test_embed() -> None:
    table = numbers(7, 19)
    op = Embed(Ref("x", 0, 19), "w", scale=3.0)
    got = run_op(op, {}, {"w": table}, one_request(9), x=19)["x"]
    for row, token in enumerate(one_request(9).token_ids):
        np.testing.assert_allclose(got[row], table[token] * 3, rtol=1e-7)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "group"), [(19, 19), (99, 33), (1, 1)])
def test_rms_norm(rows: int, width: int, group: int) -> None:
    x, weight = numbers(rows, width + 5), numbers(group, seed=1)
    op = RmsNorm(Ref("x", 3, width), Ref("y", 0, width), "w", 1e-5, group, offset=1.0)
    got = run_op(op, {"x": x}, {"w": weight}, y=width)["y"]
    for row in range(rows):
        for start in range(0, width, group):
            run = [float(v) for v in x[row, 3 + start : 3 + start + group]]
            rms = math.sqrt(math.fsum(v * v for v in run) / group + 1e-5)
            want = [v / rms * (1 + float(w)) for v, w in zip(run, weight, strict=True)]
            np.testing.assert_allclose(got[row, start : start + group], want, rtol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (19, 99), (99, 19)])
@pytest.mark.parametrize("bias", [None, "b"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear(rows: int, k: int, n: int, bias: str | None, accumulate: bool) -> None:
    x, y = numbers(rows, k + 2), numbers(rows, n + 3, seed=1)
    weights = {"w": numbers(n, k, seed=2), "b": numbers(n, seed=3)}
    op = Linear(Ref("x", 1, k), Ref("y", 2, n), "w", bias, accumulate)
    got = run_op(op, {"x": x, "y": y}, weights)["y"]
    want = np.einsum("tk,nk->tn", x[:, 1 : 1 + k].astype(np.float64), weights["w"])
    want += weights["b"] if bias else 0
    want += y[:, 2 : 2 + n] if accumulate else 0
    np.testing.assert_allclose(got[:, 2 : 2 + n], want, atol=1e-4)
    np.testing.assert_array_equal(got[:, :2], y[:, :2])  # other columns stay
    np.testing.assert_array_equal(got[:, 2 + n :], y[:, 2 + n :])


@pytest.mark.parametrize("rotary_dim", [6, 10])
def test_rope_turns_complex_numbers(rotary_dim: int) -> None:
    x, half = numbers(19, 40), rotary_dim // 2
    frequencies = tuple(10.0**-i for i in range(half))
    op = Rope(Ref("x", 10, 30), 10, RopeSpec(frequencies, scale=1.5))
    got = run_op(op, {"x": x}, step=one_request(19, num_past=1000))["x"]
    for row in range(19):
        for head in range(1, 4):
            before, after = x[row, head * 10 :][:10], got[row, head * 10 :][:10]
            for i, frequency in enumerate(frequencies):
                angle = np.float32(1000 + row) * np.float32(frequency)  # fp32, by definition
                turn = 1.5 * np.exp(1j * float(angle))
                want = complex(before[i], before[i + half]) * turn
                assert after[i] == pytest.approx(want.real, abs=1e-6)
                assert after[i + half] == pytest.approx(want.imag, abs=1e-6)
            np.testing.assert_array_equal(after[rotary_dim:], before[rotary_dim:])
    np.testing.assert_array_equal(got[:, :10], x[:, :10])


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_act(kind: Any) -> None:
    x = numbers(19, 2 * 33) * 60  # far enough for exp to overflow in fp32
    got = run_op(GatedAct(Ref("x", 0, 66), Ref("y", 0, 33), kind), {"x": x}, y=33)["y"]
    for gate, up, value in zip(x[:, :33].flat, x[:, 33:].flat, got.flat, strict=True):
        g = float(gate)
        if kind == "silu":
            act = g / (1 + math.exp(-g))
        else:
            act = g / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        assert value == pytest.approx(act * float(up), rel=1e-5, abs=2e-4)


def test_add_select_and_soft_cap() -> None:
    x, y = numbers(19, 9), numbers(19, 9, seed=1)
    whole = Ref("x", 0, 9)
    got = run_op(Add(whole, Ref("y", 0, 9), whole), {"x": x, "y": y})["x"]
    np.testing.assert_array_equal(got, x + y)
    step = one_request(19, logit_rows=ints([2, 3, 18]))
    got = run_op(SelectRows(whole, Ref("z", 0, 9)), {"x": x}, step=step, z=9)["z"]
    np.testing.assert_array_equal(got, x[[2, 3, 18]])
    got = run_op(SoftCap(whole, 1.5), {"x": x})["x"]
    np.testing.assert_allclose(got, [[1.5 * math.tanh(v / 1.5) for v in row] for row in x], 1e-6)


def attention_op(heads: int, kv_heads: int, dim: int, **changes: Any) -> Attention:
    fields = {"scale": 0.3, "window": None, "softcap": None} | changes
    return Attention(
        Ref("q", 0, heads * dim), Ref("y", 0, heads * dim), 0, heads, kv_heads, dim, **fields
    )


@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (0, 19), (19, 1), (30, 19)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 3), (4, 2, 6), (6, 1, 5), (3, 3, 4)])
@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"window": 17}, {"softcap": 0.7}])
def test_attention(
    num_past: int, num_new: int, heads: int, kv_heads: int, dim: int, changes: dict[str, Any]
) -> None:
    op = attention_op(heads, kv_heads, dim, **changes)
    total = num_past + num_new
    keys, values = numbers(total, kv_heads * dim), numbers(total, kv_heads * dim, seed=1)
    kv = filled_arena(keys, values, kv_heads, dim)
    q = numbers(num_new, heads * dim, seed=2)
    got = run_op(op, {"q": q}, step=one_request(num_new, num_past), kv=kv, y=heads * dim)["y"]

    k3 = keys.reshape(total, kv_heads, dim).astype(np.float64)
    v3 = values.reshape(total, kv_heads, dim).astype(np.float64)
    for row in range(num_new):
        position = num_past + row
        first = 0 if op.window is None else max(0, position - op.window + 1)
        for head in range(heads):
            query = q[row, head * dim : (head + 1) * dim].astype(np.float64)
            kv_head = head * kv_heads // heads
            scores = [float(query @ k3[i, kv_head]) * 0.3 for i in range(first, position + 1)]
            if op.softcap is not None:
                scores = [op.softcap * math.tanh(score / op.softcap) for score in scores]
            shares = [math.exp(score) for score in scores]
            want = sum(
                share * v3[i, kv_head]
                for share, i in zip(shares, range(first, position + 1), strict=True)
            ) / sum(shares)
            np.testing.assert_allclose(got[row, head * dim : (head + 1) * dim], want, atol=2e-6)


def filled_arena(
    keys: NDArray[np.float32], values: NDArray[np.float32], kv_heads: int, dim: int
) -> KVArena:
    """An arena in which one_request()'s slots hold these rows, and all others NaN."""
    kv = allocate((KVSpec(kv_heads, dim),), 99, BLOCK_SIZE, "float32")
    for rows in (*kv.keys, *kv.values):
        rows.numbers[:] = np.nan
    width = kv_heads * dim
    op = WriteKV(Ref("k", 0, width), Ref("v", 0, width), 0)
    run_op(op, {"k": keys, "v": values}, step=one_request(len(keys)), kv=kv)
    return kv


@pytest.mark.parametrize(
    ("dtype", "relative"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_kv_is_rounded_to_the_arena_dtype_and_only_its_slots_are_written(
    dtype: str, relative: float
) -> None:
    kv = allocate((KVSpec(2, 3),) * 2, 5, BLOCK_SIZE, dtype)
    keys, values = numbers(11, 8), numbers(11, 6, seed=1)
    op = WriteKV(Ref("k", 2, 6), Ref("v", 0, 6), layer=1)
    step = one_request(11)
    run_op(op, {"k": keys, "v": values}, step=step, kv=kv)
    got_keys, got_values = kv.read(1, step.block_tables[0], 11)
    np.testing.assert_allclose(got_keys.reshape(11, 6), keys[:, 2:], rtol=relative)
    np.testing.assert_allclose(got_values.reshape(11, 6), values, rtol=relative)
    assert got_keys.dtype == np.float32
    written = np.zeros(5 * BLOCK_SIZE, bool)
    written[step.slots] = True
    assert not kv.keys[1].numbers.reshape(-1, 6)[~written].any()
    assert not kv.keys[0].numbers.any()


@pytest.mark.parametrize("place", [-1, 5])
def test_nothing_outside_the_arena_is_written_or_read(place: int) -> None:
    kv = allocate((KVSpec(2, 3),), 5, BLOCK_SIZE, "float32")
    rows = numbers(1, 6)
    with pytest.raises(AssertionError, match="outside the arena"):
        kv.write(0, ints([place * BLOCK_SIZE]), rows, rows)
    assert not kv.keys[0].numbers.any()
    with pytest.raises(AssertionError, match="outside the arena"):
        kv.read(0, ints([1, place]), BLOCK_SIZE + 1)
    kv.read(0, ints([1, place]), BLOCK_SIZE)  # of which nothing is read


def test_kv_in_int8_has_a_scale_per_token_and_head() -> None:
    kv = allocate((KVSpec(2, 3),), 5, BLOCK_SIZE, "int8")
    keys, values = numbers(11, 6), numbers(11, 6, seed=1)
    keys[4, :3], keys[5] = 0, keys[5] * 1000  # a head of zeros; a row that is far from the others
    op, step = WriteKV(Ref("k", 0, 6), Ref("v", 0, 6), 0), one_request(11)
    run_op(op, {"k": keys, "v": values}, step=step, kv=kv)
    got = [rows.reshape(11, 2, 3) for rows in kv.read(0, step.block_tables[0], 11)]
    for rows, want in zip(got, (keys.reshape(11, 2, 3), values.reshape(11, 2, 3)), strict=True):
        largest = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(rows - want) <= largest * (0.5001 / 127)).all()
        at_most = np.take_along_axis(rows, np.abs(want).argmax(-1)[..., None], -1)
        np.testing.assert_allclose(np.abs(at_most), largest, rtol=1e-6)  # itself keeps its value
    assert kv.keys[0].numbers.dtype == np.int8
    assert not got[0][4, 0].any()


def test_kv_in_fp8_has_a_scale_per_token_and_head() -> None:
    kv = allocate((KVSpec(1, 4),), 1, BLOCK_SIZE, "fp8")
    rows = np.array([[448, -17.5, 17, 0.001], [0, 0, 0, 0], [4480, 1, 19, 21]], np.float32)
    kv.write(0, ints([0, 1, 2]), rows, rows)
    # Three bits after the first: 17.5 and 17 lie between 16 and 18; tiny ones are whole numbers
    # of 2^-9. The last row's scale is 10.
    stored = [[448, -18, 16, 2**-9], [0, 0, 0, 0], [4480, 1.015625, 18.75, 20]]
    np.testing.assert_allclose(kv.read(0, ints([0]), 3)[0][:, 0], stored, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_kv_with_scales_that_is_not_finite_stays_so(dtype: KVDtype) -> None:
    kv = allocate((KVSpec(1, 3),), 2, BLOCK_SIZE, dtype)
    keys = np.array([[1, np.nan, 2], [1, np.inf, 2], [1, 2, 3]], np.float32)
    op, step = WriteKV(Ref("k", 0, 3), Ref("v", 0, 3), 0), one_request(3)
    run_op(op, {"k": keys, "v": keys}, step=step, kv=kv)
    with np.errstate(invalid="ignore"):
        read = kv.read(0, step.block_tables[0], 3)[0]
    assert np.isfinite(read).all(axis=(1, 2)).tolist() == [False, False, True]


def test_weights_of_any_dtype_are_computed_with_in_fp32() -> None:
    x, weight = numbers(3, 8), numbers(4, 8, seed=1).astype(np.float16)
    op = Linear(Ref("x", 0, 8), Ref("y", 0, 4), "w")
    got = run_op(op, {"x": x}, {"w": weight.astype(np.float32)}, y=4)["y"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x @ weight.astype(np.float32).T, rtol=1e-5)
