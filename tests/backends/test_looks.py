"""Looks: what a step tells of its attention and of its keys and values, against slow loops; and
that neither chunks, nor company, nor threads change it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from native import pack, pool
from numpy.typing import NDArray
from oracle.cases import CASES_BY_NAME, VOCAB_SIZE
from oracle.fixture_io import write_checkpoint
from program.rewrites.models import odd

from duetto.backends.backend import Backend, ScoreArray
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.ops import Run, compute
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.batch import ATTENTION_UNIT, Look, SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.core.reuse import TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.models.programs import load_program
from duetto.program.dtype import KVDtype
from duetto.program.ops import Attention
from duetto.program.program import Program
from duetto.runner.step_arrays import build_looks, build_step_arrays

BLOCK_SIZE = 16
LENGTH = 99
NUM_LAST = 20  # tokens that look
RANGES = (TokenRange(3, 18), TokenRange(20, 21), TokenRange(40, 90))
PLACES = [p for start, end in RANGES for p in range(start, end)]
SAMPLED = (SamplingInput(SamplingParams(), seed=0, num_output_tokens=0),)
# Windows, soft caps, norms of heads, rotations of a part, one KV head for all, tied embeddings.
CASES = ("llama-mqa", "llama-tied", "gemma2", "gemma3_text", "qwen2-window", "phi3-partial-rotary")
KV_DTYPES = ("float32", "float16", "bfloat16", "int8")
BACKENDS = ("reference", *native.isas())
each_backend = pytest.mark.parametrize("which", BACKENDS)
each_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
each_case = pytest.mark.parametrize("case", CASES)


@cache
def model(case: str) -> tuple[Program, Any]:
    if case == "one-layer":
        return odd(num_hidden_layers=1)
    with TemporaryDirectory() as name:
        write_checkpoint(CASES_BY_NAME[case], Path(name))
        _, program = load_program(Path(name))
        return program, load_weights(Path(name), program, "float32")


@cache
def backend(case: str, which: str, threads: int = 2) -> Backend:
    program, weights = model(case)
    if which == "reference":
        return ReferenceBackend(program, weights)
    return CpuBackend(program, pack(program, weights, None), pool(threads), which)


def whole(name: str, first_block: int, *, seed: int = 0, length: int = LENGTH) -> ScheduledRequest:
    ids = np.random.RandomState(seed + 1).randint(0, VOCAB_SIZE, length).tolist()
    table = tuple(range(first_block, first_block + -(-length // BLOCK_SIZE)))
    return ScheduledRequest(name, tuple(ids), 0, table, SAMPLED)


MINE, OTHER = whole("mine", 2), whole("other", 10, seed=5)


def part(request: ScheduledRequest, positions: range | tuple[int, ...]) -> ScheduledRequest:
    """Some tokens of a whole request, the last of which is sampled if it is the request's."""
    return request._replace(
        token_ids=tuple([request.token_ids[p] for p in positions]),
        num_computed_tokens=positions[0],
        positions=tuple(positions),
        rows=SAMPLED if positions[-1] == len(request.token_ids) - 1 else (),
    )


def looking(request: ScheduledRequest, positions: range | tuple[int, ...]) -> ScheduledRequest:
    return part(request, positions)._replace(look=Look("attention", RANGES))


def run(own: Backend, kv: Any, *requests: ScheduledRequest) -> Any:
    step, _ = build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)
    return own.run(step, kv)


def look(own: Backend, kv: Any, *requests: ScheduledRequest) -> tuple[Any, list[ScoreArray]]:
    step, _ = build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)
    return own.look_attention(step, kv, build_looks(requests))


def deviation(own: Backend, kv: Any, *requests: ScheduledRequest) -> ScoreArray:
    requests = tuple([r._replace(rows=(), look=Look("deviation")) for r in requests])
    step, _ = build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)
    return own.look_deviation(step, kv)


@dataclass
class World:
    """An arena in which MINE is computed up to its last tokens, and OTHER whole."""

    own: Backend
    kv: Any

    @classmethod
    def make(cls, case: str, which: str, kv_dtype: KVDtype, threads: int = 2) -> "World":
        own = backend(case, which, threads)
        kv = own.allocate_kv(24, BLOCK_SIZE, kv_dtype)
        run(own, kv, part(MINE, range(LENGTH - NUM_LAST)), OTHER)
        return cls(own, kv)


LAST = range(LENGTH - NUM_LAST, LENGTH)


# -- attention -----------------------------------------------------------------------------------


def attention_by_loops(case: str, kv: Any, request: ScheduledRequest) -> ScoreArray:
    """Softmax in double precision of the queries and keys that the operations themselves made."""
    program, weights = model(case)
    step, _ = build_step_arrays(ScheduledBatch((request,)), BLOCK_SIZE)
    run = Run(step, kv, {n: np.asarray(w, np.float32) for n, w in weights.items()}, program.buffers)
    sums = np.zeros(LENGTH)
    for op in program.ops:
        if isinstance(op, Attention) and op.layer >= len(program.kv) // 2:
            keys, _ = kv.read(op.layer, np.array(request.block_table), LENGTH)
            for q, position in zip(run.read(op.q), step.positions, strict=True):
                add_weights(op, q, keys, position, sums)
        compute(op, run)
    return sums


def add_weights(op: Attention, q: Any, keys: Any, position: int, sums: ScoreArray) -> None:
    first = 0 if op.window is None else max(0, position + 1 - op.window)
    for head in range(op.num_heads):
        own = q[head * op.head_dim : (head + 1) * op.head_dim].astype(float)
        kv_head = head // (op.num_heads // op.num_kv_heads)
        scores = keys[first : position + 1, kv_head].astype(float) @ own * op.scale
        if op.softcap is not None:
            scores = np.tanh(scores / op.softcap) * op.softcap
        weights = np.exp(scores - scores.max())
        sums[first : position + 1] += np.rint(weights / weights.sum() / ATTENTION_UNIT)


def num_weights(case: str) -> int:
    """(layer, head, token) triples that a look sums up."""
    program, _ = model(case)
    looked_at = [
        op.num_heads
        for op in program.ops
        if isinstance(op, Attention) and op.layer >= len(program.kv) // 2
    ]
    return sum(looked_at) * NUM_LAST


@each_dtype
@each_case
def test_reference_tells_the_attention_that_loops_find(case: str, kv_dtype: KVDtype) -> None:
    world = World.make(case, "reference", kv_dtype)
    _, [scores] = look(world.own, world.kv, looking(MINE, LAST))
    expected = attention_by_loops(case, world.kv, part(MINE, LAST))
    # A weight in fp32 has an error of some 1e-6, so it may round to the next unit.
    np.testing.assert_allclose(scores, expected[PLACES], rtol=1e-5, atol=num_weights(case) / 2)
    assert scores.max() > 1000 * num_weights(case)
    is_seen = expected * ATTENTION_UNIT
    assert 0.9 * num_weights(case) < is_seen.sum() < 1.1 * num_weights(case)


@each_dtype
@each_case
@pytest.mark.parametrize("isa", native.isas())
def test_native_tells_the_attention_that_the_reference_does(
    isa: str, case: str, kv_dtype: KVDtype
) -> None:
    scores = []
    for which in ("reference", isa):
        world = World.make(case, which, kv_dtype)
        scores.append(look(world.own, world.kv, looking(MINE, LAST))[1][0])
    # Sums of products in another order give weights that differ by some 1e-4, each then rounded to
    # whole units; KV that is rounded may round to the other neighbour, which is more.
    rtol = 5e-4 if kv_dtype == "float32" else 3e-2
    np.testing.assert_allclose(scores[1], scores[0], rtol=rtol, atol=num_weights(case))


def in_chunks(world: World, count: int, *company: ScheduledRequest) -> NDArray[np.int64]:
    """What the last tokens tell together, so many at a time, in company."""
    total = np.zeros(len(PLACES), np.int64)
    for start in range(LAST.start, LENGTH, count):
        mine = looking(MINE, range(start, min(start + count, LENGTH)))
        logits, scores = look(world.own, world.kv, *company, mine)
        total += scores[-1].astype(np.int64)
        assert len(logits) == sum(len(request.rows) for request in (*company, mine))
    return total


@each_dtype
@pytest.mark.parametrize("case", CASES[1:4])
@each_backend
def test_chunks_company_and_threads_change_no_sum(which: str, case: str, kv_dtype: KVDtype) -> None:
    expected = in_chunks(World.make(case, which, kv_dtype, 1), NUM_LAST)
    assert expected.all()
    company = (looking(OTHER, (2, 9, 31, 97)), part(OTHER, (98,))._replace(request_id="more"))
    for threads in (1, 3) if which != "reference" else (1,):
        for count in (1, 3, 7, NUM_LAST):
            world = World.make(case, which, kv_dtype, threads)
            np.testing.assert_array_equal(in_chunks(world, count), expected)
            world = World.make(case, which, kv_dtype, threads)
            np.testing.assert_array_equal(in_chunks(world, count, *company), expected)


@each_backend
def test_positions_with_gaps_tell_what_each_tells(which: str) -> None:
    """Computed again, so that each reads what the others have written too."""
    world = World.make("gemma2", which, "float32")
    run(world.own, world.kv, part(MINE, LAST))
    places = (91, 92, 95, 97, 98)
    _, [together] = look(world.own, world.kv, looking(MINE, places))
    apart = [look(world.own, world.kv, looking(MINE, (p,)))[1][0] for p in places]
    np.testing.assert_array_equal(together, np.sum(apart, axis=0))


@each_dtype
@pytest.mark.parametrize("case", CASES[2:4])
@each_backend
def test_who_looks_computes_the_same_bits(which: str, case: str, kv_dtype: KVDtype) -> None:
    world, other = (World.make(case, which, kv_dtype) for _ in range(2))
    logits, _ = look(world.own, world.kv, looking(MINE, LAST), part(OTHER, (98,)))
    expected = run(other.own, other.kv, part(MINE, LAST), part(OTHER, (98,)))
    np.testing.assert_array_equal(logits, expected)
    again = run(world.own, world.kv, part(MINE, (98,)))
    np.testing.assert_array_equal(again[0], expected[0])
    # and a step after one that looked tells nothing, and is what it was
    np.testing.assert_array_equal(run(world.own, world.kv, part(OTHER, (98,)))[0], expected[1])


@each_backend
def test_keys_that_are_no_numbers_spoil_their_own_look_only(which: str) -> None:
    world = World.make("llama-mqa", which, "float32")
    _, expected = look(world.own, world.kv, looking(OTHER, (98,)))
    spoil(world, MINE.block_table[2] * BLOCK_SIZE)
    _, [mine, other] = look(world.own, world.kv, looking(MINE, LAST), looking(OTHER, (98,)))
    assert np.isnan(mine).all()
    np.testing.assert_array_equal(other, expected[0])


def spoil(world: World, slot: int) -> None:
    """Every number of a slot's block in layer 0 becomes NaN."""
    if isinstance(world.own, ReferenceBackend):
        world.kv.keys[0].numbers[slot // BLOCK_SIZE] = np.nan
    else:
        world.kv.blocks(0)[slot // BLOCK_SIZE] = 0xFF


# -- deviation -----------------------------------------------------------------------------------


def wrong(request: ScheduledRequest) -> ScheduledRequest:
    """The same tokens behind another first one: KV as it was computed in other company."""
    return request._replace(
        token_ids=((request.token_ids[0] + 1) % VOCAB_SIZE, *request.token_ids[1:])
    )


def slots_of(request: ScheduledRequest) -> NDArray[np.int32]:
    first = request.block_table[0] * BLOCK_SIZE  # blocks lie side by side here
    return np.arange(first, first + LENGTH, dtype=np.int32)


@each_dtype
@each_case
@each_backend
def test_a_deviation_is_that_of_what_is_stored(which: str, case: str, kv_dtype: KVDtype) -> None:
    own, slots = backend(case, which), slots_of(MINE)
    num_layers = len(model(case)[0].kv)
    kv, right = (own.allocate_kv(24, BLOCK_SIZE, kv_dtype) for _ in range(2))
    run(own, kv, wrong(MINE))
    run(own, right, MINE)
    before = [own.read_kv(layer, slots, kv) for layer in range(num_layers)]
    scores = deviation(own, kv, MINE)
    for layer in range(num_layers):
        wanted = own.read_kv(layer, slots, right) if layer < 2 else before[layer]
        for found, expected in zip(own.read_kv(layer, slots, kv), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
    for token in range(LENGTH):
        expected = sum(
            float(np.sum((new[token].astype(float) - old[token].astype(float)) ** 2))
            for old, new in zip(before[1], own.read_kv(1, slots, right), strict=True)
        )
        assert scores[token] == pytest.approx(expected, rel=1e-5)
    assert scores[0] > 0
    assert not deviation(own, kv, MINE).any()  # now it lies there


@each_dtype
@each_case
@pytest.mark.parametrize("isa", native.isas())
def test_native_deviates_as_the_reference_does(isa: str, case: str, kv_dtype: KVDtype) -> None:
    scores = []
    for which in ("reference", isa):
        own = backend(case, which)
        kv = own.allocate_kv(24, BLOCK_SIZE, kv_dtype)
        run(own, kv, wrong(MINE))
        scores.append(deviation(own, kv, MINE))
    # As far as keys and values do: in fp32 by 1e-4 of their size, else by steps of their format.
    size = scores[0].max()
    rtol, atol = (1e-3, 1e-6) if kv_dtype == "float32" else (0.2, 0.02)
    np.testing.assert_allclose(scores[1], scores[0], rtol=rtol, atol=atol * size)


@each_dtype
@pytest.mark.parametrize("case", CASES[1:4])
@each_backend
def test_chunks_and_company_change_no_deviation(which: str, case: str, kv_dtype: KVDtype) -> None:
    positions = (*range(5, 40), *range(50, LENGTH))
    found = []
    for count, threads, has_company in (
        (200, 1, False),
        (1, 1, False),
        (9, 3, True),
        (30, 2, True),
    ):
        own = backend(case, which, threads)
        kv = own.allocate_kv(24, BLOCK_SIZE, kv_dtype)
        run(own, kv, wrong(MINE), OTHER)
        scores: list[float] = []
        for start in range(0, len(positions), count):
            mine = part(MINE, positions[start : start + count])
            company = (part(OTHER, (7, 8, 60)),) if has_company else ()
            scores += deviation(own, kv, *company, mine)[3 * len(company) :].tolist()
        found.append(scores)
    assert all(scores == found[0] for scores in found)


@each_backend
def test_a_model_of_one_layer_has_no_second_to_look_at(which: str) -> None:
    own = backend("one-layer", which)
    kv = own.allocate_kv(24, BLOCK_SIZE, "float32")
    mine = MINE._replace(token_ids=(1, 2, 3), rows=SAMPLED)
    with pytest.raises(EngineError, match="second layer; this model has 1"):
        deviation(own, kv, mine)
    slots = slots_of(MINE)
    assert not np.any(own.read_kv(0, slots, kv))  # nothing was computed
    _, [scores] = look(own, kv, mine._replace(look=Look("attention", (TokenRange(0, 2),))))
    assert scores.all()


# -- KV as numbers -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("isa", native.isas())
def test_kv_as_numbers_is_that_of_the_reference(isa: str, kv_dtype: KVDtype) -> None:
    slots = slots_of(OTHER)[::-7].copy()
    read = []
    for which in ("reference", isa):
        world = World.make("gemma3_text", which, kv_dtype)
        read.append([world.own.read_kv(layer, slots, world.kv) for layer in range(4)])
    for layer in range(4):
        for native_rows, rows in zip(read[1][layer], read[0][layer], strict=True):
            assert native_rows.shape == rows.shape == (len(slots), 2, 24)
            assert native_rows.dtype == rows.dtype == np.float32
            step = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3, "int8": 1.6e-2}[kv_dtype]
            np.testing.assert_allclose(native_rows, rows, atol=step * np.abs(rows).max())


@pytest.mark.parametrize(
    ("layer", "slots", "message"),
    [
        (2, [0], "no layer 2"),
        (-1, [0], "no layer -1"),
        (0, [0, 24 * BLOCK_SIZE], "KV slot 384 is not there: must be 0 to 383"),
        (0, [-1], "KV slot -1"),
    ],
)
def test_native_reads_no_other_memory(layer: int, slots: list[int], message: str) -> None:
    world = World.make("llama-mqa", native.isas()[0], "float32")
    with pytest.raises(ValueError, match=message):
        world.own.read_kv(layer, np.array(slots, np.int32), world.kv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"looks": [(0, 2, 0, 5)]}, r"looks\[0\] is of requests 0 to 2: there are 1"),
        ({"looks": [(-1, 1, 0, 5)]}, "of requests -1 to 1"),
        ({"looks": [(0, 1, -1, 4)]}, "at positions -1 to 4"),
        ({"looks": [(0, 1, 6, 5)], "looked": 0}, "at positions 6 to 5"),
        ({"looks": [(0, 1, 0, 5)], "looked": 5}, "looked has 5 places: must have 6"),
        ({"looks": [(0, 1, 0, 5)], "looked": None}, "looked has 0 places: must have 6"),
        ({"num_ops": -1}, "num_ops must be at least 0"),
    ],
)
def test_native_refuses_looks_that_cannot_be(change: dict[str, Any], message: str) -> None:
    own = backend("llama-mqa", native.isas()[0])
    assert isinstance(own, CpuBackend)
    kv = own.allocate_kv(24, BLOCK_SIZE, "float32")
    step, _ = build_step_arrays(ScheduledBatch((MINE,)), BLOCK_SIZE)
    arguments: dict[str, Any] = {"looks": [], "looked": 6} | change
    if not arguments["looks"]:
        arguments["looked"] = None
    elif arguments["looked"] is not None:
        arguments["looked"] = np.zeros(arguments["looked"], np.int64)
    with pytest.raises(ValueError, match=message):
        own._plan.run(*step, kv, own._logits, **arguments)
