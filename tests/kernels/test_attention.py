"""Paged attention: its twin, on awkward sizes; and the same bits in any company."""

from collections.abc import Sequence

import pytest
import torch
from kernels.attention_cases import MAX_MODEL_LEN, Shape, TextRun, World, world
from torch import Tensor

from duetto.backends.cuda.kernels import attention
from duetto.backends.cuda.kernels.attention import attend, attend_twin
from duetto.backends.cuda.tensors import StepTensors

CONTEXTS = (1, 19, 63, 64, 65, 511, 512, 513, 1100)
# Of numbers around 1, in fp32: an exponent of up to 10 is rounded, which its power shows, and sums
# have another order. In fp16 a result is rounded, and so are powers, relative to the largest one so
# far rather than to the largest of all.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
MIXED = (TextRun(0, 19, 19), TextRun(1, 65), TextRun(2, 130, 99), TextRun(3, 600, 19))
LENGTHS = (19, 65, 130, 600)


def check(made: World, runs: Sequence[TextRun], few: Sequence[int], rows: int = 64) -> None:
    got = torch.cat(made.attended(runs, few, rows))
    want = torch.cat(made.attended(runs, few, rows, by=attend_twin))
    tolerance = TOLERANCES[made.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_next_tokens_of_contexts_around_blocks_and_splits(dtype: str) -> None:
    made = world(Shape(), CONTEXTS, getattr(torch, dtype), dtype)
    runs = [TextRun(text, end) for text, end in enumerate(CONTEXTS)]
    check(made, runs, range(len(runs)))


@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_groups_of_heads_in_chunks_and_drafts(group: int) -> None:
    made = world(Shape(group, 1), LENGTHS, torch.float16, "float16")
    check(made, MIXED, (1, 3), rows=64 if group < 7 else 128)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    made = world(Shape(2, 1, head_dim), (65, 130), torch.float16, "float16")
    check(made, (TextRun(0, 65, 19), TextRun(1, 130)), (1,))


@pytest.mark.parametrize("window", [1, 63, 64, 65, 100, 512, 513])
def test_edges_of_windows(window: int) -> None:
    made = world(Shape(2, 1, window=window), (577, 1100))
    check(made, (TextRun(0, 577, 70), TextRun(1, 1100), TextRun(1, 513, 3)), (1, 2))


@pytest.mark.parametrize("block_size", [7, 8, 32])
def test_sizes_of_blocks_under_a_soft_cap(block_size: int) -> None:
    made = world(Shape(block_size=block_size, softcap=3.0), (65, 600), torch.float16, "float16")
    check(made, (TextRun(0, 65, 19), TextRun(1, 600, 2)), (1,))


@pytest.mark.parametrize(
    ("dtype", "kv"),
    [
        ("float16", "int8"),
        ("float16", "fp8"),
        ("float16", "float32"),
        ("float32", "int8"),
        ("float32", "float16"),
    ],
)
def test_narrow_kv_is_widened(dtype: str, kv: str) -> None:
    made = world(Shape(head_dim=32), (65, 600), getattr(torch, dtype), kv)
    check(made, (TextRun(0, 65, 19), TextRun(1, 600, 2)), (1,))


KINDS = {
    "fp32": (Shape(), torch.float32, "float32"),
    "fp16, groups of 3, window": (Shape(3, 1, window=130), torch.float16, "float16"),
    "fp16, int8 KV, soft-cap": (Shape(2, 1, softcap=2.0), torch.float16, "int8"),
}
END, NUM_NEW = 525, 21  # the chunk crosses an edge of splits


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunk_tile_or_company_changes_a_bit(kind: str) -> None:
    made = world(KINDS[kind][0], (END, 600), *KINDS[kind][1:])
    chunk, company = TextRun(0, END, NUM_NEW), (TextRun(1, 130, 23), TextRun(1, 600))
    (whole,) = made.attended([chunk])
    for rows in (16, 32, 128):
        assert torch.equal(made.attended([chunk], rows=rows)[0], whole)
    assert torch.equal(made.attended([chunk], few=[0])[0], whole)
    beside = made.attended([company[0], chunk, company[1]], few=[2], rows=16)
    assert torch.equal(beside[1], whole)
    other = made.attended([*company, chunk], few=[0, 2])
    assert torch.equal(other[2], whole)
    assert torch.equal(other[0], beside[0]) and torch.equal(other[1], beside[2])
    for middle in (END - 20, END - 13, END - 1):
        parts = [TextRun(0, middle, middle - END + NUM_NEW), TextRun(0, END, END - middle)]
        assert torch.equal(torch.cat(made.attended(parts, few=[1])), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_no_share_of_splits_changes_a_bit(
    kind: str, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(KINDS[kind][0], (1100, 520), *KINDS[kind][1:])
    runs = (TextRun(0, 1100, 9), TextRun(1, 520))
    whole = torch.cat(made.attended(runs))
    monkeypatch.setattr(attention, "num_shares", lambda *_: shares)
    assert torch.equal(torch.cat(made.attended(runs, few=[0, 1])), whole)


def test_one_launch_serves_any_context() -> None:
    """As a graph has it: the same tensors, with other numbers in them."""
    made = world(Shape(), (1300, 700))
    runs = [[TextRun(0, 5), TextRun(1, 1)], [TextRun(0, 1300), TextRun(1, 513)]]
    steps = [made.step(r, few=[0, 1], padding=p) for r, p in zip(runs, (3, 9), strict=True)]
    room = max(len(step.block_tables) for step in steps)
    shared = steps[0]._replace(block_tables=torch.zeros(room, dtype=torch.int32))
    q, partials = made.queries(runs[0]), made.partials(runs[0])
    for own, step in zip(runs, steps, strict=True):
        q.copy_(made.queries(own))
        put(shared, step)
        out = torch.empty_like(q)
        attend(q, out, made.kv, shared, partials, **made.shape.options)
        assert torch.equal(out[:, : q.shape[1] - 8], torch.cat(made.attended(own)))


def put(shared: StepTensors, step: StepTensors) -> None:
    shared.context_lens.copy_(step.context_lens)
    shared.table_width.copy_(step.table_width)
    shared.block_tables[: len(step.block_tables)] = step.block_tables


def test_rows_that_pad_a_graph_leave_others_alone() -> None:
    """They have a context of one token, in the scratch block, whatever lies there."""
    made = world(Shape(), (600,))
    (alone,) = made.attended([TextRun(0, 600)])
    step = made.step([TextRun(0, 600), TextRun(0, 1)], few=[0, 1])
    blocks = range(len(made.kv.keys) // made.shape.block_size)
    scratch = next(block for block in blocks if block not in made.tables[0])
    width = int(step.table_width)
    step.block_tables[width:] = scratch
    q = torch.cat([made.queries([TextRun(0, 600)]), torch.zeros(1, 72)])
    out = torch.empty_like(q)
    attend(q, out, made.kv, step, made.partials([TextRun(0, 2, 2)]), **made.shape.options)
    assert torch.equal(out[:1, :64], alone)


def test_numbers_that_are_none_stay_in_their_own_run() -> None:
    made = world(Shape(), (600, 600))
    runs = [TextRun(0, 600, 3), TextRun(1, 600)]
    good = made.attended(runs, few=[1])
    slot = made.tables[0][3] * made.shape.block_size
    made.kv.keys[slot] = float("nan")
    bad = made.attended(runs, few=[1])
    assert bad[0].isnan().all() and torch.equal(bad[1], good[1])


def test_the_longest_context() -> None:
    made = world(Shape(2, 1), (MAX_MODEL_LEN,))
    check(made, [TextRun(0, MAX_MODEL_LEN)], [0])


def test_the_twin_sees_what_it_should() -> None:
    """Two keys, by hand: the twin itself stands on something."""
    made = world(Shape(1, 1), (2,))
    text = made.all_texts[0]
    weights = torch.softmax(text.k[:, 0] @ text.q[1, 0] / 4, 0)
    (got,) = made.attended([TextRun(0, 2)], by=attend_twin)
    torch.testing.assert_close(got[0], weights @ text.v[:, 0])


def heads_of(out: Tensor, shape: Shape) -> Tensor:
    return out.view(len(out), shape.num_heads, shape.head_dim)


def test_a_window_of_one_is_the_value_itself() -> None:
    made = world(Shape(2, 2, window=1), (130,))
    (got,) = made.attended([TextRun(0, 130, 70)])
    torch.testing.assert_close(heads_of(got, made.shape), made.all_texts[0].v[60:])
