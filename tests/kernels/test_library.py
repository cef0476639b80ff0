"""When the library may serve: what is compared, what is concluded, and what is then computed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from duetto.backends.cuda import library
from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import launch_linear
from duetto.backends.cuda.library import (
    ProductFacts,
    Products,
    ProductShape,
    check_products,
    first_equal,
    multiply_by_library,
    scratch_numbers,
    tiles_agree,
)
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import LinearTile

COUNTS = (10, 20, 30, 40)
TILE = LinearTile(64, 16, 128, 1, 1)


def products_that_differ_at(*counts: int) -> tuple[Callable[[int], Tensor], ...]:
    def library(rows: int) -> Tensor:
        out = torch.ones(rows, 3)
        if rows in counts:
            out[-1, -1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        return out

    return lambda rows: torch.ones(rows, 3), library


@pytest.mark.parametrize(
    ("differing", "wanted"),
    [((), 10), ((10,), 20), ((20,), 30), ((10, 30), 40), ((40,), None), (COUNTS, None)],
)
def test_from_where_on_all_are_equal(differing: tuple[int, ...], wanted: int | None) -> None:
    assert first_equal(COUNTS, *products_that_differ_at(*differing)) == wanted


def test_one_bit_is_a_difference_between_tiles() -> None:
    tiles = [TILE, replace(TILE, tokens=32), replace(TILE, tokens=64)]
    assert tiles_agree(tiles, lambda tile: torch.ones(2))
    assert tiles_agree(tiles[:1], lambda tile: torch.rand(2))
    next_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert not tiles_agree(tiles, lambda tile: next_one if tile.tokens == 64 else torch.tensor(1.0))


def matrix_of(num_outputs: int, num_inputs: int) -> Matrix:
    """Multiples of a sixteenth: any order of adding up is exact, so the library has our bits."""
    data = torch.randint(-4, 5, (num_outputs, num_inputs)).half() / 16
    return Matrix(GpuFormat("float16"), (num_outputs, num_inputs), data)


def rows_of(num_rows: int, num_inputs: int) -> Tensor:
    return torch.randint(-4, 5, (num_rows, num_inputs)).half() / 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that the library computes."""
    counts: list[int] = []

    def counted(x: Tensor, *rest: object, **options: object) -> None:
        counts.append(len(x))
        multiply_by_library(x, *rest, **options)

    monkeypatch.setattr(library, "multiply_by_library", counted)
    monkeypatch.setattr(library, "MOST_ROWS", 16)
    return counts


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_whoever_computes_the_result_is_the_same(
    gate: str | None, accumulate: bool, calls: list[int]
) -> None:
    if gate and accumulate:
        return  # is asked of nobody
    torch.manual_seed(1)
    matrix = matrix_of(48, 70)
    facts = ProductFacts({ProductShape(48, 70, gate): 5})
    products = Products(facts, torch.empty(16 * 48, dtype=torch.float16))
    width = 48 if gate is None else 24
    wanted_calls = {1: [], 4: [], 5: [5], 16: [16], 20: [16], 37: [16, 16, 5]}
    for num_rows, wanted in wanted_calls.items():
        x, before = rows_of(num_rows, 70), rows_of(num_rows, 2 * width)
        for columns in (slice(0, width), slice(7, 7 + width)):
            out, by_ours = before.clone(), before.clone()
            calls.clear()
            products(x, matrix, out[:, columns], accumulate=accumulate, gate=gate)
            launch_linear(x, matrix, by_ours[:, columns], accumulate=accumulate, gate=gate)
            assert calls == wanted
            assert torch.equal(out, by_ours)


def test_what_was_not_compared_is_ours(calls: list[int]) -> None:
    matrix, x, bias = matrix_of(48, 70), rows_of(16, 70), torch.ones(48)
    scratch = torch.empty(16 * 48, dtype=torch.float16)
    facts = ProductFacts({ProductShape(48, 70, None): 5})
    out = torch.empty(16, 48, dtype=torch.float16)
    Products(facts, scratch)(x, matrix, out, bias=bias)
    Products(facts, scratch)(x, matrix, torch.empty(16, 48))  # logits
    Products(facts, scratch)(torch.cat((x, x), dim=1)[:, :70], matrix, out)
    Products(facts, None)(x, matrix, out)
    Products(ProductFacts({ProductShape(48, 70, "silu"): 5}), scratch)(x, matrix, out)
    Products(ProductFacts({ProductShape(48, 70, None): None}), scratch)(x, matrix, out)
    assert calls == []
    Products(facts, scratch)(x, matrix, out)
    assert calls == [16]


def test_one_tile_serves_all_where_tiles_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[LinearTile] = []
    monkeypatch.setattr(library, "linear_by", lambda tile, *rest, **options: used.append(tile))
    facts = ProductFacts(only_tiles={("float16", False): TILE})
    Products(facts, None)(rows_of(3, 70), matrix_of(48, 70), torch.empty(3, 48))
    assert used == [TILE]


def test_the_check_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers at random: the interpreter adds up in parts of 128, as the library does not."""
    monkeypatch.setattr(library, "ROW_COUNTS", (2, 5))
    monkeypatch.setattr(library, "_TILE_ROWS", 5)
    short, long = matrix_of(32, 70), matrix_of(32, 600)
    int8 = Matrix(
        GpuFormat("int8", 128), (32, 70), torch.ones(32, 70, dtype=torch.int8), torch.ones(32, 1)
    )
    found = check_products([(short, None), (long, "silu"), (int8, None)], torch.float16)
    assert found.only_tiles == {}
    assert found.least_rows.keys() == {ProductShape(32, 70, None), ProductShape(32, 600, "silu")}
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    monkeypatch.setattr(library, "tiles_agree", lambda tiles, product: False)
    monkeypatch.setattr(library, "linear_tiles", lambda *_: {64: TILE})
    found = check_products([(short, None)], torch.float16)
    assert found == ProductFacts({ProductShape(32, 70, None): None}, {("float16", False): TILE})


def test_facts_in_words() -> None:
    shapes = {ProductShape(48, 70, None): None, ProductShape(96, 70, "silu"): 300}
    facts = ProductFacts(shapes, {("int4", True): TILE})
    assert list(facts.in_words()) == [
        "product 48 x 70: ours for any number of rows",
        "product 96 x 70 with silu: torch's from 300 rows",
        "int4, gated: tiles differ in bits on this device; one serves any number of rows",
    ]


def test_scratch_is_for_the_widest() -> None:
    listed = [(matrix_of(48, 7), None), (matrix_of(96, 7), "silu")]
    int8 = Matrix(GpuFormat("int8", 128), (999, 7), torch.ones(999, 7).to(torch.int8))
    assert scratch_numbers([*listed, (int8, None)], 512) == 512 * 96
    assert scratch_numbers(listed, 1 << 20) == 2048 * 96
    assert scratch_numbers([(int8, None)], 512) == 0
