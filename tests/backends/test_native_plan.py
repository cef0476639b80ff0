"""The native plan: each operation alone against the reference, and the same bits in company.

The kernels' own tests (csrc/tests) look at awkward sizes and formats; here it is the bindings, the
sharing out of work, and the promise that neither threads nor company show in the bits.
"""

import gc
from typing import Any

import numpy as np
import pytest
from backends.native_cases import (
    BLOCK_SIZE,
    ISAS,
    Array,
    ints,
    native,
    numbers,
    one_request,
    pack,
    reference,
    run,
)
from numpy.typing import NDArray

from duetto.backends.backend import StepArrays
from duetto.backends.reference.kv import allocate
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

ROWS = (1, 2, 7, 19, 99)


@pytest.fixture(params=[1, 2, 3], ids="threads{}".format)
def pool(request: pytest.FixtureRequest) -> Any:
    return native.Pool(request.param)


@pytest.fixture(params=ISAS)
def plan(request: pytest.FixtureRequest, pool: Any) -> Any:
    return native.Plan(pool, request.param)


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
        rounding = np.abs(x) * (2.0**-8 if weight.format in ("bf16", "bf12") else 0)
    slack: Array = rounding @ magnitudes + np.abs(x) @ magnitudes * 2.0**-20
    return slack


FORMATS = [("f32", 0), ("bf16", 0), ("bf12", 0), ("int8", 0), ("int8", 128), ("int4", 64)]


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
    ("format", "group"), [("f32", 0), ("bf16", 0), ("bf12", 0), ("int8", 128), ("int4", 64)]
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
