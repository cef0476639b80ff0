"""What attention some tokens give: its twin, whole units in any company, numbers that are none."""

import pytest
import torch
from kernels.attention_cases import Shape, TextRun, World, world
from torch import Tensor

from duetto.backends.cuda.kernels.look import look_units, look_units_twin
from duetto.backends.cuda.sizes import FEW_ROWS
from duetto.core.batch import ATTENTION_UNIT

END = 140
KINDS = {
    "fp32": (Shape(), torch.float32, "float32"),
    "fp16, groups of 3, window": (Shape(3, 1, window=70), torch.float16, "float16"),
    "fp16, int8 KV, soft-cap": (Shape(4, 2, 80, softcap=2.0), torch.float16, "int8"),
    "fp16, fp8 KV": (Shape(2, 1, 32, block_size=7), torch.float16, "fp8"),
}


def units_of(
    made: World, runs: list[TextRun], looked: list[int], num_told: int = END, by=look_units
) -> Tensor:
    q, units = made.queries(runs), torch.zeros(num_told + 1, dtype=torch.int64)
    tiles = made.tiles(runs, looked, FEW_ROWS)
    by(q, made.kv, made.step(runs), tiles, units, **made.shape.options)
    return units


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_the_twins(kind: str) -> None:
    """But for weights that lie near the middle between two units, and for rounded exponents, of
    which a weight shows a few 2^-23."""
    made = world(KINDS[kind][0], (END, 65), *KINDS[kind][1:])
    runs = [TextRun(1, 65), TextRun(0, END, 19)]
    mine, twins = (units_of(made, runs, [1], by=by) for by in (look_units, look_units_twin))
    torch.testing.assert_close(mine.double(), twins.double(), rtol=1e-5, atol=20)
    given = 19 * made.shape.num_heads / ATTENTION_UNIT
    assert abs(int(mine[:END].sum()) - given) < given * 1e-4
    assert mine[END] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunk_or_company_changes_a_unit(kind: str) -> None:
    made = world(KINDS[kind][0], (END, 65), *KINDS[kind][1:])
    whole = units_of(made, [TextRun(0, END, 19)], [0])
    beside = [TextRun(1, 65, 3), TextRun(0, END - 12, 7), TextRun(0, END, 12), TextRun(1, 9, 9)]
    assert torch.equal(units_of(made, beside, [1, 2]), whole)
    assert torch.equal(units_of(made, beside, [2, 1]), whole)
    alone = [TextRun(0, end) for end in range(END - 18, END + 1)]
    assert torch.equal(units_of(made, alone, list(range(19))), whole)


def test_positions_behind_the_last_that_is_asked_for_are_not_told() -> None:
    made = world(Shape(), (END,))
    runs = [TextRun(0, END, 19)]
    some = units_of(made, runs, [0], num_told=90)
    assert torch.equal(some[:90], units_of(made, runs, [0])[:90])
    assert some[90] == 0


def test_what_is_there_already_stays() -> None:
    """Layers are summed up in one array."""
    made = world(Shape(), (65,))
    runs = [TextRun(0, 65, 2)]
    once = units_of(made, runs, [0])
    units = torch.arange(END + 1)
    tiles = made.tiles(runs, [0], FEW_ROWS)
    look_units(made.queries(runs), made.kv, made.step(runs), tiles, units, **made.shape.options)
    assert torch.equal(units - torch.arange(END + 1), once)


@pytest.mark.parametrize("by", [look_units, look_units_twin])
def test_weights_that_are_no_numbers_are_counted(by) -> None:
    """A token sees a key that is none, a later one does: pairs of it and its KV head's heads."""
    made = world(Shape(4, 2), (65,))
    good = units_of(made, [TextRun(0, 61, 1)], [0])
    position = 61
    block = made.tables[0][position // made.shape.block_size]
    made.kv.keys[block * made.shape.block_size + position % made.shape.block_size, 1] = torch.nan
    units = units_of(made, [TextRun(0, 65, 5)], [0], by=by)
    assert units[END] == 4 * 2  # of five tokens the last four see it, in one of two KV heads
    assert units_of(made, [TextRun(0, 61, 1)], [0])[END] == good[END] == 0
