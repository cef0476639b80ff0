"""The GPU backend: equal to the reference, and the same bits in any company, recorded or not."""

from functools import cache

import numpy as np
import pytest
from kernels.models import backend_of
from kernels.recorder import LaunchRecorder
from oracle.cases import CASES, CASES_BY_NAME, Case
from program.rewrites.models import of_case

from duetto.backends.backend import AttentionLook, Backend, StepArrays
from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.device import NOT_FINITE, SampleArrays
from duetto.backends.reference import ReferenceBackend

BLOCK_SIZE, NUM_BLOCKS = 8, 48
GEMMA, QWEN = CASES_BY_NAME["gemma2"], CASES_BY_NAME["qwen3"]
SOME = pytest.mark.parametrize("case", [GEMMA, QWEN], ids=lambda case: case.name)
NO_ROWS = np.zeros(0, np.int32)
Chunks = list[tuple[int, list[int]]]  # of requests: the first position, and the tokens


def step_of(chunks: Chunks, wanted: str = "last") -> StepArrays:
    """Request r of the chunks has every fourth block from block r on; logits of all tokens, or of
    each one's last."""
    token_ids, positions, slots, starts, contexts, tables, rows = [], [], [], [0], [], [], []
    for request, (start, ids) in enumerate(chunks):
        table = list(range(request, NUM_BLOCKS, 4))
        places = range(start, start + len(ids))
        token_ids += ids
        positions += places
        slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places]
        starts.append(len(token_ids))
        contexts.append(start + len(ids))
        tables.append(table)
        rows += range(starts[-2], starts[-1]) if wanted == "all" else [starts[-1] - 1]
    lists = (token_ids, positions, slots, starts, contexts, tables, rows)
    return StepArrays(*(np.array(each, np.int32) for each in lists))


def logits_of(backend: Backend, *steps: Chunks, dtype: str = "float32") -> list[np.ndarray]:
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, dtype)
    return [backend.run(step_of(chunks, "all"), kv) for chunks in steps]


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 199, count).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_as_on_the_reference(case: Case) -> None:
    """In fp32, past the windows, in two chunks beside another request."""
    program, weights = of_case(case)
    long, short = tokens(60), tokens(3, 1)
    steps = [(0, long[:50]), (0, short[:2])], [(50, long[50:]), (2, short[2:])]
    got = logits_of(backend_of(program, weights), *steps)
    want = logits_of(ReferenceBackend(program, weights), *steps)
    for ours, twin in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, twin, rtol=0, atol=5e-5)  # sums in fp32, of up to 10


@SOME
def test_half_precision_is_near(case: Case) -> None:
    program, weights = of_case(case)
    steps = ([(0, tokens(30))], [(30, [7])])
    got = logits_of(backend_of(program, weights, "float16"), *steps, dtype="float16")
    want = logits_of(ReferenceBackend(program, weights), *steps)
    for ours, twin in zip(got, want, strict=True):
        assert np.abs(ours - twin).max() < 0.06 * np.abs(twin).max()  # fp16 has 11 bits


@pytest.mark.parametrize(
    ("case", "dtype"), [(GEMMA, "float16"), (QWEN, "float32")], ids=["gemma2-fp16", "qwen3-fp32"]
)
def test_the_same_bits_whole_in_chunks_and_in_company(case: Case, dtype: str) -> None:
    program, weights = of_case(case)
    backend = backend_of(program, weights, dtype)
    ids = tokens(70)
    (whole,) = logits_of(backend, [(0, ids)], dtype=dtype)
    one_by_one = logits_of(backend, [(0, ids[:69])], [(69, ids[69:])], dtype=dtype)
    np.testing.assert_array_equal(np.concatenate(one_by_one), whole)
    chunks = [(0, 33), (33, 34), (34, 66), (66, 70)]
    for company in (0, 3):
        steps = []
        for start, end in chunks:
            others = [(0, tokens(1 + 7 * other, other)) for other in range(1, company + 1)]
            steps.append([(start, ids[start:end]), *others])
        found = logits_of(backend, *steps, dtype=dtype)
        mine = [rows[: end - start] for rows, (start, end) in zip(found, chunks, strict=True)]
        np.testing.assert_array_equal(np.concatenate(mine), whole)


def greedy(count: int) -> SampleArrays:
    zeros = np.zeros(count)
    keys, top_ks = np.zeros(count, np.uint64), np.zeros(count, np.int32)
    return SampleArrays(zeros, keys, top_ks, zeros + 1, zeros - np.inf)


def generate(backend: CudaBackend, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers: whole prompts in one step, then next tokens, each known to the device only
    when its step is started."""
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    number = len(prompts)
    started = [backend.start(step_of([(0, p) for p in prompts]), kv, greedy(number))]
    for more in range(count - 1):
        step = step_of([(len(p) + more, [-1]) for p in prompts])
        feedback = np.arange(number, dtype=np.int32)
        started.append(backend.start(step, kv, greedy(number), feedback, wants_logits=True))
        assert started[-1].logits().shape == (number, 199)
    return np.array([step.tokens() for step in started[-2:]]).T.tolist()


@cache
def recorded(case: Case) -> tuple[CudaBackend, LaunchRecorder]:
    program, weights = of_case(case)
    recorder = LaunchRecorder()
    return backend_of(program, weights, recorder=recorder, num_rows=4), recorder


@SOME
def test_recorded_steps_give_the_same_tokens(case: Case) -> None:
    program, weights = of_case(case)
    backend, recorder = recorded(case)
    prompts = [tokens(5), tokens(20, 1), tokens(9, 2)]
    got = generate(backend, prompts, 4)
    assert recorder.num_replays == 3
    assert len(recorder.num_launches) == 3  # of 1, 2 and 4 requests
    assert got == generate(backend_of(program, weights), prompts, 4)
    for prompt, answer in zip(prompts, got, strict=True):
        assert generate(backend_of(program, weights), [prompt], 4) == [answer]


def test_a_recorded_step_has_the_bits_of_a_launched_one() -> None:
    backend, recorder = recorded(GEMMA)
    plain = backend_of(*of_case(GEMMA))
    before = recorder.num_replays
    ids, other = tokens(61), tokens(9, 3)
    found = []
    for each in (backend, plain):
        kv = each.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
        each.run(step_of([(0, ids[:60]), (0, other[:8])]), kv)
        step = step_of([(60, ids[60:]), (8, other[8:])])
        found.append(each.start(step, kv, greedy(2), wants_logits=True).logits().copy())
    assert recorder.num_replays == before + 1
    np.testing.assert_array_equal(*found)


def test_more_rows_than_logits_are_held_of() -> None:
    program, weights = of_case(QWEN)
    backend, wide = (
        backend_of(program, weights, num_rows=3),
        backend_of(program, weights, num_rows=30),
    )
    ids = tokens(20)
    (got,), (want,) = (logits_of(each, [(0, ids)]) for each in (backend, wide))
    np.testing.assert_array_equal(got, want)
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    started = backend.start(step_of([(0, ids)], "all"), kv, greedy(20), wants_logits=True)
    assert started.tokens().tolist() == want.argmax(axis=1).tolist()
    np.testing.assert_array_equal(started.logits(), want)


def test_logits_that_are_not_finite_have_no_token() -> None:
    program, weights = of_case(QWEN)
    broken = dict(weights)
    name = next(name for name in broken if name.endswith("embed_tokens.weight"))
    broken[name] = np.array(broken[name])
    broken[name][7] = np.nan
    backend = backend_of(program, broken)
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    started = backend.start(step_of([(0, [5, 7]), (0, [5, 6])]), kv, greedy(2))
    first, second = started.tokens().tolist()
    assert first == NOT_FINITE
    assert second != NOT_FINITE


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("slots", NUM_BLOCKS * BLOCK_SIZE, "slot"),
        ("slots", -1, "slot"),
        ("block_tables", NUM_BLOCKS, "block"),
        ("positions", 512, "position"),
        ("token_ids", 199, "token"),
        ("token_ids", -1, "token"),
        ("logit_rows", 1, "row"),
    ],
)
def test_what_lies_outside_is_refused(field: str, value: int, named: str) -> None:
    backend = backend_of(*of_case(QWEN))
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    step = step_of([(0, [5])])
    wrong = getattr(step, field).copy()
    wrong.reshape(-1)[0] = value
    with pytest.raises(AssertionError, match=f"a {named} outside"):
        backend.start(step._replace(**{field: wrong}), kv, greedy(1))


def look_at(last: int) -> AttentionLook:
    return AttentionLook(0, 1, np.array([0, 3, 4, *range(9, last)], np.int32))


@pytest.mark.parametrize("name", ["gemma2", "qwen2-window"])
def test_what_tokens_look_at(name: str) -> None:
    """As on the reference, to what roundings of weights make; the same in chunks and company."""
    program, weights = of_case(CASES_BY_NAME[name])
    ids, other = tokens(40), [(0, tokens(5, 1))]
    found = []
    for backend in (backend_of(program, weights), ReferenceBackend(program, weights)):
        kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
        logits, scores = backend.look_attention(step_of([(0, ids)], "all"), kv, [look_at(40)])
        np.testing.assert_array_equal(logits, backend.run(step_of([(0, ids)], "all"), kv))
        found.append(scores[0])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=100)  # units of 2^-20, of 40 tokens
    backend = backend_of(program, weights)
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    total = np.zeros(len(found[0]))
    for start, end in ((0, 15), (15, 16), (16, 40)):
        step = step_of([(start, ids[start:end]), *other])
        total += backend.look_attention(step, kv, [look_at(40)])[1][0]
    np.testing.assert_array_equal(total, found[0])


def test_how_far_keys_and_values_are_from_what_lay_there() -> None:
    program, weights = of_case(CASES_BY_NAME["gemma2"])
    ids, found = tokens(20), []
    for backend in (backend_of(program, weights), ReferenceBackend(program, weights)):
        kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
        backend.run(step_of([(0, tokens(20, 4))]), kv)
        found.append(backend.look_deviation(step_of([(0, ids)])._replace(logit_rows=NO_ROWS), kv))
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_step_of_many_runs() -> None:
    """Positions with gaps are many runs of one request: more than there may be
    requests, and more tables than there was room for."""
    program, weights = of_case(QWEN)
    backend, ids = backend_of(program, weights, num_tokens=64), tokens(50)
    (whole,) = logits_of(backend, [(0, ids)])
    step = step_of([(0, ids)], "all")
    ends = np.arange(51, dtype=np.int32)
    tables = np.repeat(step.block_tables, 50, axis=0)
    apart = step._replace(query_starts=ends, context_lens=ends[1:], block_tables=tables)
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    np.testing.assert_array_equal(backend.run(apart, kv), whole)


def test_a_part_of_a_prompt_of_which_nothing_is_wanted() -> None:
    backend = backend_of(*of_case(QWEN))
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "float32")
    step = step_of([(0, [5, 6])])._replace(logit_rows=NO_ROWS)
    started = backend.start(step, kv, greedy(0), wants_logits=True)
    assert started.tokens().shape == (0,)
    assert started.logits().shape == (0, 199)
