"""The native plan: each operation alone against the reference, and what it refuses.

The kernels' own tests (csrc/tests) look at awkward sizes and formats; here it is the bindings, the
sharing out of work, and the promise that neither threads nor company show in the bits.
"""

import ast
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import duetto
from duetto.backends.backend import StepArrays
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.ops import OPS, Run
from duetto.program.ops import (
    Add,
    Attention,
    Embed,
    GatedAct,
    Ref,
    RmsNorm,
    Rope,
    RopeSpec,
    SoftCap,
    WriteKV,
)
from duetto.program.program import KVSpec

native = pytest.importorskip("duetto._native")

ISAS = native.isas()
ROWS = (1, 2, 7, 19, 99)
BLOCK_SIZE = 16
Array = NDArray[np.float32]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.RandomState(seed).uniform(-2, 2, shape).astype(np.float32)


def ints(values: Any) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32)


def one_request(num_rows: int, num_past: int = 0, **changes: Any) -> StepArrays:
    """Rows of one request whose blocks are numbered backwards."""
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


def run(plan: Any, step: StepArrays, result: tuple[int, int, int], kv: Any = None) -> Array:
    logits: Array = plan.run(
        step.token_ids,
        step.positions,
        step.slots,
        step.query_starts,
        step.context_lens,
        step.block_tables,
        step.logit_rows,
        kv,
        result,
    )
    return logits


def pack(format: str, group: int, weight: Array, pool: Any = None) -> Any:
    data_bytes, scale_bytes = native.packed_bytes(format, group, *weight.shape)
    data, scales = native.Arena(data_bytes).array, native.Arena(scale_bytes).array
    pool = pool or native.Pool(1)
    assert native.pack(format, group, [weight], data, scales if scale_bytes else None, pool) is None
    return native.Weight(format, group, *weight.shape, data, scales if scale_bytes else None)


def reference(
    op: Any,
    buffers: dict[str, Array],
    step: StepArrays,
    weights: dict[str, Array] | None = None,
    kv: KVArena | None = None,
    **widths: int,
) -> dict[str, Array]:
    """The buffers after one operation of the reference backend."""
    buffers = {name: array.copy() for name, array in buffers.items()}
    widths |= {name: array.shape[1] for name, array in buffers.items()}
    OPS[type(op)](op, Run(step, kv or KVArena((), ()), weights or {}, widths, buffers))
    return buffers


@pytest.fixture(params=[1, 2, 3], ids="threads{}".format)
def pool(request: pytest.FixtureRequest) -> Any:
    return native.Pool(request.param)


@pytest.fixture(params=ISAS)
def plan(request: pytest.FixtureRequest, pool: Any) -> Any:
    return native.Plan(pool, request.param)


def test_the_stub_names_what_there_is() -> None:
    """mypy believes _native.pyi; nothing else compares it with the module."""
    stub = ast.parse((Path(duetto.__file__).parent / "_native.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert hasattr(native, node.name), node.name
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)} - {"__init__"}
            there = {name for name in vars(getattr(native, node.name)) if not name.startswith("_")}
            assert methods == there, node.name


# -- each operation alone --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_embed(plan: Any, rows: int) -> None:
    table, step = numbers(7, 40), one_request(rows)
    out = (plan.buffer(40), 0, 40)
    plan.embed(out, pack("f32", 0, table), scale=1.5)
    expected = reference(Embed(Ref("out", 0, 40), "w", 1.5), {}, step, {"w": table}, out=40)
    np.testing.assert_array_equal(run(plan, step, out), expected["out"])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", [96, 12])
def test_rms_norm(plan: Any, rows: int, group: int) -> None:
    x, weight, step = numbers(rows, 96), numbers(group, seed=1), one_request(rows)
    buffer = plan.buffer(96)
    out = plan.buffer(100)
    plan.write((buffer, 0, 96), x)
    plan.rms_norm((buffer, 0, 96), (out, 2, 96), weight, 1e-5, group, 1.0)
    op = RmsNorm(Ref("x", 0, 96), Ref("out", 2, 96), "w", 1e-5, group, 1.0)
    expected = reference(op, {"x": x}, step, {"w": weight}, out=100)["out"][:, 2:98]
    np.testing.assert_allclose(run(plan, step, (out, 2, 96)), expected, rtol=2e-6, atol=1e-6)


def product_error(x: Array, weight: Any, isa: str) -> Array:
    """By how much a product may be off: by what rounding x costs at most, and by fp32 sums."""
    magnitudes = np.abs(weight.unpack(isa)).T
    if weight.format in ("int8", "int4"):  # by half a step of each group's scale
        group = weight.group or weight.k
        cuts = np.arange(0, weight.k, group)
        steps = np.maximum.reduceat(np.abs(x), cuts, axis=1) / 127
        rounding = np.repeat(steps, np.diff([*cuts, weight.k]), axis=1) / 2
    else:
        rounding = np.abs(x) * (2.0**-8 if weight.format == "bf16" else 0)
    slack: Array = rounding @ magnitudes + np.abs(x) @ magnitudes * 2.0**-20
    return slack


FORMATS = [("f32", 0), ("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 64)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_linear(plan: Any, rows: int, format: str, group: int) -> None:
    n, k = 200, 264
    x, bias, before = numbers(rows, k), numbers(n, seed=1), numbers(rows, n, seed=2)
    weight = pack(format, group, numbers(n, k, seed=3))
    buffer, out = plan.buffer(k + 3), plan.buffer(n + 1)
    plan.write((buffer, 3, k), x)
    plan.write((out, 1, n), before)
    plan.linear((buffer, 3, k), (out, 1, n), weight, bias, accumulate=True)
    expected = x.astype(np.float64) @ weight.unpack(plan.isa).T + bias + before
    found = run(plan, one_request(rows), (out, 1, n))
    assert (np.abs(found - expected) <= product_error(x, weight, plan.isa) + 1e-5).all()


@pytest.mark.parametrize("rows", ROWS)
def test_linear_normalises_first(plan: Any, rows: int) -> None:
    x, norm, step = numbers(rows, 96), numbers(96, seed=1), one_request(rows)
    weight = pack("f32", 0, numbers(130, 96, seed=2))
    buffer, normed, apart, fused = (plan.buffer(w) for w in (96, 96, 130, 130))
    plan.write((buffer, 0, 96), x)
    plan.rms_norm((buffer, 0, 96), (normed, 0, 96), norm, 1e-6, 96, 1.0)
    plan.linear((normed, 0, 96), (apart, 0, 130), weight)
    plan.linear((buffer, 0, 96), (fused, 0, 130), weight, norm=(norm, 1e-6, 1.0))
    found = run(plan, step, (fused, 0, 130))
    np.testing.assert_array_equal(found, plan.read((apart, 0, 130)))
    assert np.abs(found).max() > 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_linear_joins_gate_and_up(plan: Any, rows: int, kind: Any) -> None:
    x, step = numbers(rows, 144), one_request(rows)
    weight = pack("f32", 0, numbers(65, 72, seed=2))
    buffer, joined, apart, fused = (plan.buffer(w) for w in (144, 72, 65, 65))
    plan.write((buffer, 0, 144), x)
    plan.gated_act((buffer, 0, 144), (joined, 0, 72), kind)
    plan.linear((joined, 0, 72), (apart, 0, 65), weight)
    plan.linear((buffer, 0, 144), (fused, 0, 65), weight, gated_act=kind)
    found = run(plan, step, (fused, 0, 65))
    np.testing.assert_array_equal(found, plan.read((apart, 0, 65)))
    op = GatedAct(Ref("x", 0, 144), Ref("out", 0, 72), kind)
    expected = reference(op, {"x": x}, step, out=72)["out"]
    np.testing.assert_allclose(plan.read((joined, 0, 72)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_rope(plan: Any, rows: int) -> None:
    x, step = numbers(rows, 2 * 24), one_request(rows, num_past=5000)
    inv_freq = (1e4 ** -(np.arange(8) / 8)).astype(np.float32)  # rotates 16 of 24
    ref = (plan.buffer(48), 0, 48)
    plan.write(ref, x)
    plan.rope(ref, 24, plan.rope_spec(inv_freq, 1.2))
    op = Rope(Ref("x", 0, 48), 24, RopeSpec(tuple(inv_freq.tolist()), 1.2))
    expected = reference(op, {"x": x}, step)["x"]
    np.testing.assert_allclose(run(plan, step, ref), expected, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_add_soft_cap_and_select_rows(plan: Any, rows: int) -> None:
    x, y = numbers(rows, 30), numbers(rows, 30, seed=1)
    step = one_request(rows, logit_rows=ints(np.arange(0, rows, 3)))
    a, b, c, selected = (plan.buffer(30) for _ in range(4))
    plan.write((a, 0, 30), x)
    plan.write((b, 0, 30), y)
    plan.add((a, 0, 30), (b, 0, 30), (c, 0, 30))
    plan.select_rows((c, 0, 30), (selected, 0, 30))
    plan.soft_cap((selected, 0, 30), 3.0)
    found = run(plan, step, (selected, 0, 30))
    whole = Ref("x", 0, 30)
    added = reference(Add(whole, Ref("y", 0, 30), whole), {"x": x, "y": y}, step)["x"]
    np.testing.assert_array_equal(plan.read((c, 0, 30)), added)
    capped = reference(SoftCap(whole, 3.0), {"x": added[::3]}, step)["x"]
    np.testing.assert_allclose(found, capped, rtol=2e-6, atol=1e-6)


def attention_case(
    plan: Any, step: StepArrays, rows: int, kv: Any, window: int = 0, softcap: float = 0.0
) -> Array:
    """4 query heads over 2 KV heads of 40 numbers; q, k and v in one buffer."""
    buffer, out = plan.buffer(8 * 40), plan.buffer(160)
    plan.write((buffer, 0, 320), numbers(rows, 320, seed=4))
    plan.write_kv((buffer, 160, 80), (buffer, 240, 80), 1)
    plan.attention((buffer, 0, 160), (out, 0, 160), 1, 4, 2, 40, 0.2, window, softcap)
    return run(plan, step, (out, 0, 160), kv)


@pytest.mark.parametrize("rows", [1, 19, 600])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (33, 5.0)])
def test_write_kv_and_attention(plan: Any, rows: int, window: int, softcap: float) -> None:
    step = one_request(rows)
    kv = native.KvArena(40, BLOCK_SIZE, [(2, 40), (2, 40)], "f32", plan.isa)
    found = attention_case(plan, step, rows, kv, window, softcap)
    x = {"x": numbers(rows, 320, seed=4)}
    arena = allocate((KVSpec(2, 40), KVSpec(2, 40)), 40, BLOCK_SIZE, "float32")
    reference(WriteKV(Ref("x", 160, 80), Ref("x", 240, 80), 1), x, step, kv=arena)
    op = Attention(
        Ref("x", 0, 160), Ref("out", 0, 160), 1, 4, 2, 40, 0.2, window or None, softcap or None
    )
    expected = reference(op, x, step, kv=arena, out=160)["out"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# -- the same bits ---------------------------------------------------------------------------------


def two_layers(pool: Any, isa: str, weights: dict[str, Any]) -> tuple[Any, tuple[int, int, int]]:
    """A plan with every operation whose work is shared out, and where its result lies."""
    plan = native.Plan(pool, isa)
    x, qkv, attended, gate_up = (plan.buffer(w) for w in (128, 256, 128, 512))
    selected, logits = plan.buffer(128), plan.buffer(200)
    plan.embed((x, 0, 128), weights["embed"])
    spec = plan.rope_spec(np.float32(1e4) ** -(np.arange(16, dtype=np.float32) / 16))
    for layer in range(2):
        norm = (np.ones(128, np.float32), 1e-6, 0.0)
        plan.linear((x, 0, 128), (qkv, 0, 256), weights["qkv"], norm=norm)
        plan.rope((qkv, 0, 192), 32, spec)
        plan.write_kv((qkv, 128, 64), (qkv, 192, 64), layer)
        plan.attention((qkv, 0, 128), (attended, 0, 128), layer, 4, 2, 32, 0.18)
        plan.linear((attended, 0, 128), (x, 0, 128), weights["out"], accumulate=True)
        plan.linear((x, 0, 128), (gate_up, 0, 512), weights["gate_up"], norm=norm)
        plan.linear(
            (gate_up, 0, 512), (x, 0, 128), weights["down"], accumulate=True, gated_act="silu"
        )
    plan.select_rows((x, 0, 128), (selected, 0, 128))
    plan.linear((selected, 0, 128), (logits, 0, 200), weights["head"])
    return plan, (logits, 0, 200)


SHAPES = {
    "embed": (50, 128),
    "qkv": (256, 128),
    "out": (128, 128),
    "gate_up": (512, 128),
    "down": (128, 256),
    "head": (200, 128),
}


def chunks_of(
    requests: dict[int, tuple[int, int]], tables: dict[int, NDArray[np.int32]]
) -> StepArrays:
    """One step. `requests`: number -> (first position, one behind the last)."""
    positions = [np.arange(begin, end) for begin, end in requests.values()]
    slots = [
        tables[r][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for r, p in zip(requests, positions, strict=True)
    ]
    ids = [(p * 7 + r * 13) % 50 for r, p in zip(requests, positions, strict=True)]
    return StepArrays(
        token_ids=ints(np.concatenate(ids)),
        positions=ints(np.concatenate(positions)),
        slots=ints(np.concatenate(slots)),
        query_starts=ints([0, *np.cumsum([len(p) for p in positions])]),
        context_lens=ints([end for _, end in requests.values()]),
        block_tables=ints([tables[r] for r in requests]),
        logit_rows=ints(np.arange(sum(len(p) for p in positions))),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("format", "group"), [("f32", 0), ("bf16", 0), ("int8", 128), ("int4", 64)]
)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_threads_and_company_do_not_show(isa: str, format: str, group: int, kv_format: Any) -> None:
    """600 tokens whole and alone, against chunks of them beside others, on 1, 2 and 3 threads."""
    weights = {name: numbers(*shape, seed=len(name)) * 0.1 for name, shape in SHAPES.items()}
    packed = {name: pack(format, group, weight) for name, weight in weights.items()}
    tables = {r: ints(np.arange(40) * 3 + r) for r in range(3)}
    ends = {0: 600, 1: 77, 2: 3}

    def logits_of(threads: int, steps: list[dict[int, tuple[int, int]]]) -> dict[int, list[Array]]:
        plan, result = two_layers(native.Pool(threads), isa, packed)
        kv = native.KvArena(120, BLOCK_SIZE, [(2, 32)] * 2, kv_format, isa)
        found: dict[int, list[Array]] = {r: [] for r in ends}
        for requests in steps:
            step = chunks_of(requests, tables)
            logits = run(plan, step, result, kv)
            for i, r in enumerate(requests):
                found[r].append(logits[step.query_starts[i] : step.query_starts[i + 1]])
        return found

    alone = logits_of(1, [{r: (0, end)} for r, end in ends.items()])
    mixed = [
        {0: (0, 100), 1: (0, 70)},
        {2: (0, 1), 1: (70, 77), 0: (100, 101)},
        {0: (101, 530), 2: (1, 2)},
        {0: (530, 533), 2: (2, 3)},
        {0: (533, 600)},
    ]
    for threads in (1, 2, 3):
        found = logits_of(threads, mixed)
        for r in ends:
            np.testing.assert_array_equal(np.concatenate(found[r]), alone[r][0])
    assert np.ptp(alone[0][0]) > 0.1


def test_results_are_not_overwritten_while_held() -> None:
    plan = native.Plan(native.Pool(1), ISAS[0])
    out = (plan.buffer(8), 0, 8)
    plan.embed(out, pack("f32", 0, numbers(7, 8)))
    first = run(plan, one_request(3), out)
    kept = first.copy()
    run(plan, one_request(3, token_ids=ints([4, 5, 6])), out)
    np.testing.assert_array_equal(first, kept)
    address = run(plan, one_request(3), out).ctypes.data  # nobody holds this one
    assert run(plan, one_request(3), out).ctypes.data == address
    del plan
    gc.collect()
    np.testing.assert_array_equal(first, kept)


def test_times_are_of_the_last_run() -> None:
    plan = native.Plan(native.Pool(2), ISAS[0])
    out = (plan.buffer(64), 0, 64)
    assert plan.embed(out, pack("f32", 0, numbers(7, 64))) == 0
    assert plan.soft_cap(out, 2.0) == 1
    run(plan, one_request(99), out)
    times = plan.times()
    assert len(times) == plan.num_ops + 1 == 3
    assert all(0 < spent < 1 for spent in times)


def test_buffers_hold_the_largest_step() -> None:
    plan = native.Plan(native.Pool(1), ISAS[0])
    out = (plan.buffer(1000), 0, 1000)
    plan.embed(out, pack("f32", 0, numbers(7, 1000)))
    run(plan, one_request(300), out)
    held = plan.num_bytes
    run(plan, one_request(1), out)
    assert plan.num_bytes == held
    assert 300 * 1000 * 4 <= held < 2 * 300 * 1000 * 4


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packing_takes_stacked_sources_of_every_type(isa: str, dtype: str, pool: Any) -> None:
    from_f32 = numbers(100, 24)
    if dtype == "bfloat16":
        bits = (from_f32.view(np.uint32) >> 16).astype(np.uint16)
        stored, expected = bits, (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = from_f32.astype(dtype)
        expected = stored.astype(np.float32)
    data = native.Arena(native.packed_bytes("f32", 0, 100, 24)[0]).array
    sources = [stored[:1], stored[1:70], stored[70:]]
    assert native.pack("f32", 0, sources, data, None, pool) is None
    weight = native.Weight("f32", 0, 100, 24, data)
    np.testing.assert_array_equal(weight.unpack(isa), expected)


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_row_that_is_not_finite_is_named(
    format: Any, group: int, bad: float, pool: Any
) -> None:
    weight = numbers(300, 64)
    weight[[211, 130, 290], 63] = bad
    data_bytes, scale_bytes = native.packed_bytes(format, group, 300, 64)
    data, scales = native.Arena(data_bytes).array, native.Arena(scale_bytes).array
    found = native.pack(format, group, [weight], data, scales if scale_bytes else None, pool)
    assert found == 130


def test_quantized_weights_are_near() -> None:
    weight = numbers(64, 256)
    for format, group, most in (("int8", 128, 0.006), ("int4", 64, 0.1)):
        error = pack(format, group, weight).unpack(ISAS[-1]) - weight
        assert 0 < np.sqrt((error**2).mean()) / weight.std() < most


def test_arrays_may_go_before_the_weight() -> None:
    weight = pack("f32", 0, numbers(64, 64))  # nothing else holds its arena
    gc.collect()
    np.testing.assert_array_equal(weight.unpack(ISAS[0]), numbers(64, 64))


def test_checksum_is_xxh64() -> None:
    def of(text: bytes) -> int:
        return int(native.checksum(np.frombuffer(text, np.uint8)))

    assert of(b"") == 0xEF46DB3751D8E999
    assert of(b"abc") == 0x44BC2CF5AD770999
    assert of(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1
    assert native.checksum(numbers(5, 7)) == of(numbers(5, 7).tobytes())


# -- refusals --------------------------------------------------------------------------------------


def small_plan() -> tuple[Any, Any, tuple[int, int, int]]:
    plan = native.Plan(native.Pool(2), ISAS[0])
    buffer = plan.buffer(48)
    plan.embed((buffer, 0, 48), pack("f32", 0, numbers(7, 48)))
    plan.write_kv((buffer, 16, 16), (buffer, 32, 16), 0)
    plan.attention((buffer, 0, 16), (buffer, 0, 16), 0, 2, 2, 8, 0.3)
    return plan, native.KvArena(4, BLOCK_SIZE, [(2, 8)], "f32", ISAS[0]), (buffer, 0, 48)


BAD_STEPS = {
    "token_ids[1] is 7": {"token_ids": [0, 7, 1]},
    "token_ids[2] is -1": {"token_ids": [0, 1, -1]},
    "equally long": {"token_ids": [0, 1]},
    "positions[0] is negative": {"positions": [-1, 1, 2]},
    "positions[2] is 3: beyond": {"positions": [0, 1, 3]},
    "slots[0] is 64": {"slots": [64, 1, 2]},
    "slots[2] is -5": {"slots": [1, 2, -5]},
    "query_starts must begin with 0": {"query_starts": [0, 2]},
    "query_starts must have one entry": {"query_starts": [0, 2, 3]},
    "context_lens[0] is 17": {"context_lens": [17]},
    "block_tables[0, 0] is 4": {"block_tables": [[4]]},
    "block_tables[0, 0] is -1": {"block_tables": [[-1]]},
    "logit_rows[0] is 3": {"logit_rows": [3]},
    "logit_rows[1] is 1": {"logit_rows": [1, 1]},
    "an empty step": {"token_ids": [], "positions": [], "slots": [], "query_starts": [0, 0]},
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_bad_steps_are_refused_before_anything_is_written(message: str) -> None:
    plan, kv, result = small_plan()
    changes = {name: ints(values) for name, values in BAD_STEPS[message].items()}
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        run(plan, one_request(3, **changes), result, kv)
    assert not kv.blocks(0).any()
    run(plan, one_request(3), result, kv)
    assert kv.blocks(0).any()


def test_a_falling_query_start_is_refused() -> None:
    plan, kv, result = small_plan()
    step = one_request(3, query_starts=ints([0, 4, 3]), context_lens=ints([3, 3]))
    with pytest.raises(ValueError, match="must not fall"):
        run(plan, StepArrays(**fields_of(step) | {"block_tables": ints([[1], [1]])}), result, kv)


def fields_of(step: StepArrays) -> dict[str, Any]:
    return {name: getattr(step, name) for name in StepArrays.__slots__}


def test_a_kv_arena_must_fit_the_plan() -> None:
    plan, _, result = small_plan()
    with pytest.raises(ValueError, match="needs a KV arena"):
        run(plan, one_request(3), result)
    for layers, message in (([], "no layer 0"), ([(1, 16)], "1 heads of 16"), ([(2, 4)], "not 8")):
        kv = native.KvArena(4, BLOCK_SIZE, layers, "f32", ISAS[0])
        with pytest.raises(ValueError, match=message):
            run(plan, one_request(3), result, kv)
    if len(ISAS) > 1:
        other = native.KvArena(4, BLOCK_SIZE, [(2, 8)], "f32", ISAS[1])
        with pytest.raises(ValueError, match="was made for"):
            run(plan, one_request(3), result, other)


def bad_operations() -> dict[str, Any]:
    weight = pack("f32", 0, numbers(8, 16))
    ones = np.ones(16, np.float32)
    return {
        "no buffer 3": lambda p: p.soft_cap((3, 0, 16), 1.0),
        "not in a buffer of 16": lambda p: p.soft_cap((0, 4, 16), 1.0),
        "cap must be positive": lambda p: p.soft_cap((0, 0, 16), 0.0),
        "x is 15 columns wide, not 16": lambda p: p.linear((0, 0, 15), (1, 0, 8), weight),
        "x is 16 columns wide, not 32": lambda p: p.linear(
            (0, 0, 16), (1, 0, 8), weight, gated_act="silu"
        ),
        "out is 7 columns wide, not 8": lambda p: p.linear((0, 0, 16), (1, 0, 7), weight),
        "overlap": lambda p: p.linear((0, 0, 16), (0, 8, 8), weight),
        "bias has 16 numbers": lambda p: p.linear((0, 0, 16), (1, 0, 8), weight, ones),
        "norm has 8 numbers": lambda p: p.linear(
            (0, 0, 16), (1, 0, 8), weight, norm=(ones[:8].copy(), 1e-6, 0.0)
        ),
        "activation 'relu'": lambda p: p.gated_act((0, 0, 16), (1, 0, 8), "relu"),
        "multiple of the group": lambda p: p.rms_norm((0, 0, 10), (1, 0, 10), ones, 1e-6, 16),
        "no such spec": lambda p: p.rope((0, 0, 16), 8, 0),
        "multiple of num_kv_heads": lambda p: p.attention((0, 0, 16), (1, 0, 16), 0, 4, 3, 4, 1.0),
        "a buffer of 0 columns": lambda p: p.buffer(0),
    }


@pytest.mark.parametrize("message", bad_operations())
def test_bad_operations_are_refused(message: str) -> None:
    plan = native.Plan(native.Pool(1), ISAS[0])
    for _ in range(2):
        plan.buffer(16)
    with pytest.raises(ValueError, match=message):
        bad_operations()[message](plan)
    assert plan.num_ops == 0


def test_bad_weights_are_refused() -> None:
    data_bytes, scale_bytes = native.packed_bytes("int8", 128, 8, 256)
    data, scales = native.Arena(data_bytes + 64).array, native.Arena(scale_bytes).array
    with pytest.raises(ValueError, match="must have"):
        native.Weight("int8", 128, 8, 256, data, scales)
    with pytest.raises(ValueError, match="aligned to 64"):
        native.Weight("int8", 128, 8, 256, data[1 : data_bytes + 1], scales)
    with pytest.raises(ValueError, match="need scales"):
        native.Weight("int8", 128, 8, 256, data[:data_bytes])
    with pytest.raises(ValueError, match="must be one of f32, bf16, int8, int4"):
        native.packed_bytes("fp8", 0, 8, 256)
    with pytest.raises(ValueError, match="multiple of 8"):
        native.packed_bytes("int8", 100, 8, 256)
    with pytest.raises(ValueError, match="must have 16 columns"):
        sources = [numbers(4, 16), numbers(4, 8)]
        native.pack("f32", 0, sources, data, None, native.Pool(1))


def test_an_unknown_instruction_set_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=f"can run {', '.join(ISAS)}"):
        native.choose_isa("sse9")
    for isa in set(native.built_isas()) - set(ISAS):
        with pytest.raises(
            ValueError, match=f"it has no {', '.join(native.missing_features(isa))}"
        ):
            native.choose_isa(isa)
    assert native.choose_isa(ISAS[0]) == ISAS[0]


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "import duetto._native as n; print(n.choose_isa())"
    for value, expected in (
        ("baseline", "baseline"),
        ("", ISAS[-1]),
        ("sse9", "DUETTO_ISA: no in"),
    ):
        environment = os.environ | {"DUETTO_ISA": value}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert expected in found.stdout + found.stderr


def test_available_threads_respect_affinity() -> None:
    code = (
        "import os, duetto._native as n; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "assert n.available_threads() == 1 == n.Pool().num_threads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 1 <= native.available_threads() <= len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="1 to 4096 threads"):
        native.Pool(-1)


def test_probes_measure_something() -> None:
    pool = native.Pool(1)
    assert native.read_bandwidth(pool, 1 << 22, 2) > 1e8
    for isa in ISAS:
        assert native.int8_peak(pool, isa) > native.fp32_peak(pool, isa) > 1e8
        assert native.bf16_peak(pool, isa) > 1e8
    assert native.Pool(2).barrier_ns(100) > 0
