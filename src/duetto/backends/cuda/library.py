"""Long prompts' products by torch's library, where it has our bits; and do our own tiles agree?

A library chooses kernels by shape, some of which cut K into parts and add up in another order. So
both are computed at load, for each of the model's matrices' shapes and several numbers of rows, and
the library serves a shape from the number of rows on from which all of them were equal. Whatever
serves, a row's bits are the same. Knows no program.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from duetto.backends.cuda.formats import GpuFormatName
from duetto.backends.cuda.kernels.gated_act import launch_gated_act
from duetto.backends.cuda.kernels.linear import (
    launch_linear,
    linear_by,
    shared_memory_bytes,
)
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import LinearTile, linear_tiles
from duetto.program.ops import Activation

MOST_ROWS = 2048  # of one product of the library: more are cut, so that all were compared
# What is compared: buckets of graphs, and prompts' lengths. Below, our tiles are as fast.
ROW_COUNTS = (
    *(*range(96, 257, 16), 288, 300, 384, 500, 512, 640, 768, 1000, 1024),
    *(1280, 1500, 1792, 2000, MOST_ROWS),
)
_TILE_ROWS = 300  # on which tiles are compared: some of each, and a part of one
_WHOLE: frozenset[GpuFormatName] = frozenset(("float32", "float16", "bfloat16"))


class ProductShape(NamedTuple):
    num_outputs: int  # of the matrix: gates and what they open together
    num_inputs: int
    gate: Activation | None

    def __str__(self) -> str:
        gated = f" with {self.gate}" if self.gate else ""
        return f"{self.num_outputs} x {self.num_inputs}{gated}"


@dataclass(frozen=True, slots=True)
class ProductFacts:
    """What was found at load."""

    # From how many rows on the library has our bits; None: from none of those that were compared.
    least_rows: Mapping[ProductShape, int | None] = field(default_factory=dict)
    # Of a format, gated or not, whose tiles differ in bits: the one that serves any number of rows.
    only_tiles: Mapping[tuple[GpuFormatName, bool], LinearTile] = field(default_factory=dict)

    def in_words(self) -> Iterator[str]:
        """A line for each, for the log and for `doctor`."""
        for shape, rows in sorted(self.least_rows.items(), key=str):
            whose = "ours for any number of rows" if rows is None else f"torch's from {rows} rows"
            yield f"product {shape}: {whose}"
        for kind, gated in sorted(self.only_tiles):
            what = f"{kind}{', gated' if gated else ''}"
            yield f"{what}: tiles differ in bits on this device; one serves any number of rows"


def forbid_reduced_sums() -> None:
    """The library adds up in fp32, as we do."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False


def first_equal(
    row_counts: Sequence[int], ours: Callable[[int], Tensor], library: Callable[[int], Tensor]
) -> int | None:
    """The least of the ascending row counts from which on all give the same bits; None if the last
    does not. Each callable computes that many rows."""
    found: int | None = None
    for rows in row_counts:
        if not torch.equal(ours(rows), library(rows)):
            found = None
        elif found is None:
            found = rows
    return found


def tiles_agree(tiles: Iterable[LinearTile], product: Callable[[LinearTile], Tensor]) -> bool:
    """Whether all of them give the same bits."""
    first, *others = (product(tile) for tile in dict.fromkeys(tiles))
    return all(torch.equal(first, other) for other in others)


def check_products(
    products: Iterable[tuple[Matrix, Activation | None]], dtype: torch.dtype
) -> ProductFacts:
    """Compares a product of each shape, and the tiles of each format, on numbers at random."""
    forbid_reduced_sums()
    least_rows: dict[ProductShape, int | None] = {}
    only_tiles: dict[tuple[GpuFormatName, bool], LinearTile] = {}
    checked: set[tuple[GpuFormatName, bool]] = set()
    for matrix, gate in products:
        key, shape = (matrix.format.kind, gate is not None), ProductShape(*matrix.shape, gate)
        is_new = matrix.format.kind in _WHOLE and shape not in least_rows
        if key in checked and not is_new:
            continue
        trial = _Trial(matrix, gate, dtype)
        if key not in checked:
            checked.add(key)
            tiles = linear_tiles(*key, shared_memory_bytes(matrix.data.device.index))
            if not tiles_agree(tiles.values(), trial.by_tile):
                only_tiles[key] = tiles[64]
        if is_new:
            is_odd = key in only_tiles  # then our own order is not the tensor cores'
            least_rows[shape] = None if is_odd else trial.first_equal()
    return ProductFacts(least_rows, only_tiles)


class _Trial:
    """One matrix, and rows at random that are multiplied by it."""

    def __init__(self, matrix: Matrix, gate: Activation | None, dtype: torch.dtype) -> None:
        device = matrix.data.device
        generator = torch.Generator(device).manual_seed(1)
        size = (MOST_ROWS, matrix.shape[1])
        self._matrix, self._gate = matrix, gate
        self._x = torch.randn(size, generator=generator, device=device).to(dtype)

    def first_equal(self) -> int | None:
        return first_equal(ROW_COUNTS, self._ours, self._library)

    def _ours(self, rows: int) -> Tensor:
        out = self._out(rows)
        launch_linear(self._x[:rows], self._matrix, out, gate=self._gate)
        return out

    def _library(self, rows: int) -> Tensor:
        out = self._out(rows)
        scratch = torch.empty(rows * self._matrix.shape[0], dtype=out.dtype, device=out.device)
        multiply_by_library(self._x[:rows], self._matrix, out, scratch, gate=self._gate)
        return out

    def by_tile(self, tile: LinearTile) -> Tensor:
        out = self._out(_TILE_ROWS)
        linear_by(tile, self._x[:_TILE_ROWS], self._matrix, out, gate=self._gate)
        return out

    def _out(self, rows: int) -> Tensor:
        width = self._matrix.shape[0] // (1 if self._gate is None else 2)
        return torch.empty(rows, width, dtype=self._x.dtype, device=self._x.device)


class Products:
    """kernels/linear.launch_linear, or what has its bits; called as that is.

    scratch: what the library's results need on their way, scratch_numbers() of x's dtype; None: the
    library is not used.
    """

    def __init__(self, facts: ProductFacts, scratch: Tensor | None) -> None:
        self._facts, self._scratch = facts, scratch

    def __call__(
        self,
        x: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        accumulate: bool = False,
        gate: Activation | None = None,
    ) -> None:
        least = self._facts.least_rows.get(ProductShape(*matrix.shape, gate))
        # A bias is added before the product is rounded; other strides were not compared.
        is_usual = bias is None and x.is_contiguous() and out.dtype == x.dtype
        if self._scratch is None or least is None or len(x) < least or not is_usual:
            self._by_ours(x, matrix, out, bias=bias, accumulate=accumulate, gate=gate)
            return
        for rows, results in zip(x.split(MOST_ROWS), out.split(MOST_ROWS), strict=True):
            if len(rows) < least:
                self._by_ours(rows, matrix, results, accumulate=accumulate, gate=gate)
            else:
                multiply_by_library(
                    rows, matrix, results, self._scratch, accumulate=accumulate, gate=gate
                )

    def _by_ours(
        self,
        x: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        accumulate: bool = False,
        gate: Activation | None = None,
    ) -> None:
        tile = self._facts.only_tiles.get((matrix.format.kind, gate is not None))
        if tile is None:
            launch_linear(x, matrix, out, bias=bias, accumulate=accumulate, gate=gate)
        else:
            linear_by(tile, x, matrix, out, bias=bias, accumulate=accumulate, gate=gate)


def scratch_numbers(products: Iterable[tuple[Matrix, Activation | None]], most_rows: int) -> int:
    """Of a step of `most_rows`: what the library's widest result takes."""
    widest = max((m.shape[0] for m, _ in products if m.format.kind in _WHOLE), default=0)
    return min(most_rows, MOST_ROWS) * widest


def multiply_by_library(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    scratch: Tensor,
    *,
    accumulate: bool = False,
    gate: Activation | None = None,
) -> None:
    """As launch_linear, without a bias, by torch's product, rounded where launch_linear rounds."""
    weight = matrix.data.t()
    if not accumulate and gate is None and out.is_contiguous():
        torch.mm(x, weight, out=out)
        return
    num_rows, width = len(x), matrix.shape[0]
    product = scratch[: num_rows * width].view(num_rows, width)
    torch.mm(x, weight, out=product)
    if gate is not None:
        launch_gated_act(product, out, gate)
    elif accumulate:
        out += product
    else:
        out.copy_(product)
