"""Ranks on the native backend: near their slow twin, and bit for bit the same however they run."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from backends.test_cpu_logits import LIMITS, TOLERANCE, divergence
from backends.test_cpu_logits import loaded as loaded_case
from native import cpu_backend, cpu_ranks, pack, pack_rank, pool
from numpy.typing import NDArray
from oracle.cases import CASES, CASES_BY_NAME, VOCAB_SIZE, Case, prompts
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint
from program.rewrites.models import odd

from duetto.backends.backend import AttentionLook, KVMoves
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.formats import choose_formats
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import TILE_ROWS, NotCut, degrees_that_fit, lay_out
from duetto.backends.reference.backend import part_of
from duetto.backends.reference.ranks import ReferenceRanks
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.core.errors import CheckpointError, ConfigError
from duetto.program.cut import WHOLE, Span, WeightPart
from duetto.program.rewrites.shard import possible_degrees, shard

Kind = tuple[str, Any, Any, str]  # case, dtype, quantization, KV dtype
KINDS: list[Kind] = [
    ("llama-mqa", "bfloat16", None, "bfloat16"),
    ("gemma2", "float32", "int8", "int8"),
    ("qwen3-biases-window", "bfloat16", "int4", "float16"),
    ("phi3", "float32", None, "float32"),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
degrees = pytest.mark.parametrize("ranks", [2, 4])
LENGTHS = (1, 19, 99, 530)
MAX_TOKENS = 600


def programs_of(program: Any, ranks: int) -> list[Any]:
    return [shard(program, ranks, rank) for rank in range(ranks)]


@cache
def ranks_of(kind: Kind, ranks: int, threads: tuple[int, ...], slot_numbers: int = 1 << 16) -> Any:
    case, dtype, quantization, _ = kind
    program, weights = loaded_case(CASES_BY_NAME[case], dtype)
    return cpu_ranks(
        program, weights, ranks, quantization, threads=threads, slot_numbers=slot_numbers
    )


# -- what they compute -----------------------------------------------------------------------------


@degrees
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_is_the_twins(case: Case, ranks: int) -> None:
    program, weights = loaded_case(case)
    assert ranks in possible_degrees(program)
    texts = [prompt[:70] for prompt in prompts()[:3]]
    mine, twin = (
        Feed(backend, len(texts), max_tokens=96).in_chunks(texts, 50)
        for backend in (
            cpu_ranks(program, weights, ranks),
            ReferenceRanks(programs_of(program, ranks), weights),
        )
    )
    for own, other in zip(mine, twin, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 12])
def test_widths_that_the_ranks_do_not_divide(ranks: int) -> None:
    """An MLP of 31, 41 tokens: the last ranks have less, or nothing, which is refused."""
    program, weights = odd(num_key_value_heads=12)
    if ranks == 12:
        with pytest.raises(NotCut, match="nothing of it is left for a rank"):
            cpu_ranks(program, weights, ranks)
        return
    texts = [[5, 9, 2, 7, 1, 8, 30, 11, 4, 40], [3, 17, 6]]
    mine, twin = (
        np.concatenate(Feed(backend, 2, max_tokens=64).in_chunks(texts, 4))
        for backend in (
            cpu_ranks(program, weights, ranks, slot_numbers=16),
            ReferenceRanks(programs_of(program, ranks), weights),
        )
    )
    np.testing.assert_allclose(mine, twin, rtol=0, atol=1e-5)


@degrees
@pytest.mark.parametrize("kind", LIMITS, ids=str)
def test_narrow_formats_stay_near_the_exact_twin(kind: Any, ranks: int) -> None:
    dtype, quantization, kv_dtype = kind
    program, weights = loaded_case(CASES_BY_NAME["qwen3"], dtype)
    texts = prompts()
    mine = Feed(cpu_ranks(program, weights, ranks, quantization), len(texts), kv_dtype)
    exact = Feed(ReferenceRanks(programs_of(program, ranks), weights), len(texts))
    kl, agreement = divergence(mine.in_chunks(texts, 10**6), exact.in_chunks(texts, 10**6))
    most, least = LIMITS[kind]
    assert 0 < kl < most
    assert agreement > least


# -- the same bits ---------------------------------------------------------------------------------


def prompt(length: int) -> list[int]:
    return np.random.RandomState(length).randint(0, VOCAB_SIZE, length).tolist()


@cache
def alone(kind: Kind, ranks: int, length: int) -> NDArray[np.float32]:
    """Whole, by itself, one thread for each rank."""
    feed = Feed(ranks_of(kind, ranks, (1,) * ranks), 1, kind[-1], MAX_TOKENS)
    return feed.in_chunks([prompt(length)], 10**6)[0]


@kinds
@pytest.mark.parametrize(
    ("threads", "slot_numbers"),
    [((1, 1), 1 << 16), ((3, 1), 1 << 16), ((2, 2), 80), ((1, 2, 1, 3), 1 << 12)],
    ids=str,
)
def test_any_threads_chunks_and_company_give_the_same_bits(
    kind: Kind, threads: tuple[int, ...], slot_numbers: int
) -> None:
    backend = ranks_of(kind, len(threads), threads, slot_numbers)
    expected = [alone(kind, len(threads), length) for length in LENGTHS]
    texts = [prompt(length) for length in LENGTHS]
    for chunk in (10**6, 61):
        found = Feed(backend, len(texts), kind[-1], MAX_TOKENS).in_chunks(texts, chunk)
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(own, other)
    feed = Feed(backend, 1, kind[-1], MAX_TOKENS)  # token by token at the end
    rows = [feed.step({0: texts[2][:90]})[0], *(feed.step({0: [t]})[0] for t in texts[2][90:])]
    np.testing.assert_array_equal(np.concatenate(rows), expected[2])


def test_degrees_have_bits_of_their_own() -> None:
    kind = KINDS[-1]
    two, four = alone(kind, 2, 99), alone(kind, 4, 99)
    assert (two != four).any()
    np.testing.assert_allclose(two, four, atol=TOLERANCE)


# -- weights ---------------------------------------------------------------------------------------


@degrees
@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3"])
def test_a_rank_has_the_numbers_of_the_whole_weight(
    case: str, quantization: Any, dtype: Any, ranks: int
) -> None:
    """Though its columns begin within a group that is quantized together."""
    program, weights = loaded_case(CASES_BY_NAME[case], dtype)
    isa, num_cut = choose_isa(), 0
    whole = pack(program, weights, quantization)
    for own in programs_of(program, ranks):
        packed = pack_rank(program, own, weights, quantization)
        for name, matrix in packed.matrices.items():
            part = own.parts.get(name, WHOLE)
            num_cut += part.columns is not None
            exact = part_of(whole.matrices[name].unpack(isa), part)
            np.testing.assert_array_equal(matrix.unpack(isa), exact)
        for name, vector in packed.vectors.items():
            exact = part_of(whole.vectors[name], own.parts.get(name, WHOLE))
            np.testing.assert_array_equal(vector, exact)
    assert num_cut == 2 * ranks * len(program.kv)


def test_columns_that_cannot_be_cut_are_told_and_which_degrees_can() -> None:
    program, _ = odd(num_key_value_heads=12)  # an MLP of 31 by 3 ranks: 11 columns each
    formats = choose_formats(program, "float32", "int8")
    with pytest.raises(NotCut, match="quantized together") as raised:
        lay_out(shard(program, 3), formats)
    assert raised.value.name == "model.layers.0.mlp.down_proj.weight"
    assert possible_degrees(program) == (1, 2, 3, 4, 6, 12)
    assert degrees_that_fit(program, formats) == [1, 2]
    assert degrees_that_fit(program, choose_formats(program, "float32")) == [1, 2, 3, 4, 6]


def test_the_key_names_the_rank() -> None:
    program, _ = loaded_case(CASES_BY_NAME["llama"])
    formats = choose_formats(program, "float32", "int8")
    keys = {
        lay_out(own, formats).key(pool(1), "fingerprint")
        for ranks in (1, 2, 4)
        for own in programs_of(program, ranks)
    }
    assert len(keys) == 1 + 2 + 4


@pytest.mark.parametrize("part_bytes", [1, 1 << 30])
def test_parts_of_a_checkpoint_are_the_ranks_rows(tmp_path: Any, part_bytes: int) -> None:
    case = CASES_BY_NAME["phi3"]
    write_checkpoint(case, tmp_path)
    program, weights = loaded_case(case)
    own = shard(program, 4, 3)
    found: dict[str, list[Any]] = {}
    with Checkpoint(tmp_path, own) as checkpoint:
        for rows in checkpoint.parts("float32", TILE_ROWS, part_bytes):
            numbers = rows.read(np.empty(rows.num_bytes, np.uint8))
            assert rows.first_row == sum(map(len, found.setdefault(rows.name, [])))
            found[rows.name].append(numbers)
        name = "model.layers.0.self_attn.qkv_proj.weight"
        broken = found[name][-1].copy()
        broken[-1, 0] = np.inf
        last = own.parts[name].rows[-1].end - 1
        with pytest.raises(CheckpointError, match=rf"holds inf at \[{last}, 0\]"):
            checkpoint.check_finite(name, sum(map(len, found[name][:-1])), broken)
    for name in own.weights:
        part = WeightPart(rows=own.parts.get(name, WHOLE).rows)
        np.testing.assert_array_equal(np.concatenate(found[name]), part_of(weights[name], part))


def test_rows_of_a_part() -> None:
    part = WeightPart(rows=(Span(10, 5), Span(30, 4)))
    assert part.shape((50, 7)) == (9, 7)
    assert part.rows_of(50, 0, 9) == (Span(10, 5), Span(30, 4))
    assert part.rows_of(50, 3, 4) == (Span(13, 2), Span(30, 2))
    assert part.rows_of(50, 6, 2) == (Span(31, 2),)
    assert WHOLE.rows_of(50, 6, 2) == (Span(6, 2),)


# -- the rest of a backend -------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["llama", "llama-mqa"])
def test_heads_of_all_ranks_are_the_wholes(case: str, ranks: int) -> None:
    """What was read, moved and taken out of an arena, and how much attention positions get."""
    program, weights = loaded_case(CASES_BY_NAME[case])
    text, slots = prompt(60), np.arange(20, dtype=np.int32)
    found: list[list[Any]] = []
    for backend in (cpu_backend(program, weights), cpu_ranks(program, weights, ranks)):
        feed = Feed(backend, 2, max_tokens=96)
        feed.step({0: text})
        arena, own = feed._kv, []
        arrays = feed._arrays({1: text}, np.arange(60))
        looks = [AttentionLook(0, 1, np.arange(5, 40, dtype=np.int32))]
        logits, scores = backend.look_attention(arrays, arena, looks)
        own += [logits, *scores, backend.look_deviation(arrays, arena)]
        from_slots, to_slots = feed._tables[0][0] * 32 + slots, feed._tables[0][2] * 32 + slots
        backend.move_kv(KVMoves(from_slots, to_slots, slots, slots + np.int32(7)), arena)
        own += [*backend.read_kv(0, to_slots, arena), *backend.read_kv(1, from_slots, arena)]
        found.append(own)
    for whole, joined in zip(*found, strict=True):
        assert whole.shape == joined.shape
        np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=40)  # scores: units of 2^-20
    for whole, joined in [(w, j) for w, j in zip(*found, strict=True) if w.dtype == np.float32]:
        np.testing.assert_allclose(joined, whole, rtol=0, atol=TOLERANCE)


def test_blocks_leave_and_come_back() -> None:
    backend = ranks_of(KINDS[1], 2, (1, 1))
    kv, again = (backend.allocate_kv(8, 32, "int8") for _ in range(2))
    feed = Feed(backend, 1, "int8", 96)
    feed._kv = kv
    feed.step({0: prompt(80)})
    assert backend.layers_done.layers == len(backend.block_rows(kv)) == 4
    blocks = feed._tables[0][:3].tolist()
    out = np.zeros((3, sum(arena.num_bytes // 8 for arena in kv)), np.uint8)
    backend.export_blocks(kv, blocks, out, (32, 32, 16))
    backend.import_blocks(again, blocks, out)
    slots = (feed._tables[0][:3, None] * 32 + np.arange(32)).reshape(-1)[:80].astype(np.int32)
    for one, other in zip(
        backend.read_kv(1, slots, kv), backend.read_kv(1, slots, again), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert one.any()


def test_what_is_refused_is_refused_by_all_and_the_next_step_runs() -> None:
    kind = KINDS[-1]
    feed = Feed(ranks_of(kind, 2, (1, 1)), 1, "float32", MAX_TOKENS)
    with pytest.raises(ValueError, match=rf"token_ids\[1\] is {VOCAB_SIZE}"):
        feed.step({0: [1, VOCAB_SIZE]})
    [rows] = feed.in_chunks([prompt(19)], 10**6)
    np.testing.assert_array_equal(rows, alone(kind, 2, 19))


def test_a_group_that_ends_fails_the_step() -> None:
    program, weights = loaded_case(CASES_BY_NAME["llama"])
    own = shard(program, 2, 1)
    group = native.Group(2, timeout_s=0.1)
    packed = pack_rank(program, own, weights)
    rank = CpuBackend(
        program=own, weights=packed, pool=pool(2), isa=choose_isa(), member=native.Member(group, 1)
    )
    feed = Feed(rank, 1)
    with pytest.raises(native.GroupEnded, match=r"^rank 0 did not come within 0\.1 s$"):
        feed.step({0: prompt(9)})


def test_a_rank_alone_is_refused() -> None:
    program, weights = loaded_case(CASES_BY_NAME["llama"])
    own = shard(program, 2, 1)
    with pytest.raises(ConfigError, match="--backend cpu: runs no part of a program"):
        CpuBackend(own, pack_rank(program, own, weights), pool(1), choose_isa())
