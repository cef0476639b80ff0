"""Steps over a paged arena, made small and awkward, for tests of attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duetto.backends.cuda.arena import store_heads
from duetto.backends.cuda.kernels.attention import attend
from duetto.backends.cuda.kernels.merge import Partials, allocate_partials
from duetto.backends.cuda.sizes import FEW_ROWS
from duetto.backends.cuda.tensors import LayerKV, QueryTiles, StepTensors

MAX_MODEL_LEN = 2048
STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


class Shape(NamedTuple):
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def options(self) -> dict[str, Any]:
        return self._asdict() | {"scale": self.head_dim**-0.5}


class Text(NamedTuple):
    """A request's queries, keys and values at all of its positions, in fp32."""

    q: Tensor  # [length, num_heads, head_dim]
    k: Tensor
    v: Tensor


class TextRun(NamedTuple):
    text: int
    end: int
    num_new: int = 1


def texts(shape: Shape, lengths: Sequence[int], seed: int = 1) -> list[Text]:
    random = torch.Generator().manual_seed(seed)

    def numbers(length: int, heads: int) -> Tensor:
        return torch.randn(length, heads, shape.head_dim, generator=random)

    return [
        Text(*(numbers(length, heads) for heads in (shape.num_heads, *[shape.num_kv_heads] * 2)))
        for length in lengths
    ]


@dataclass(frozen=True)
class World:
    """Texts whose KV lies in an arena, in shuffled blocks."""

    shape: Shape
    dtype: torch.dtype
    all_texts: list[Text]
    kv: LayerKV
    tables: list[list[int]]

    def step(
        self, runs: Sequence[TextRun], few: Sequence[int] = (), rows: int = 64, *, padding: int = 3
    ) -> StepTensors:
        """Of `runs`, those of these places in `few`; tables are wider than they need be."""
        starts = [0]
        for run in runs:
            starts.append(starts[-1] + run.num_new)
        width = max(len(table) for table in self.tables) + padding
        tables = [
            self.tables[run.text] + [0] * (width - len(self.tables[run.text])) for run in runs
        ]
        many = [place for place in range(len(runs)) if place not in few]
        nothing = torch.zeros(1, dtype=torch.int32)
        return StepTensors(
            *[nothing] * 4,
            query_starts=as_int32(starts),
            context_lens=as_int32([run.end for run in runs]),
            block_tables=as_int32(tables).flatten(),
            table_width=as_int32([width]),
            logit_rows=nothing,
            few=self.tiles(runs, few, FEW_ROWS),
            many=self.tiles(runs, many, rows),
        )

    def tiles(self, runs: Sequence[TextRun], places: Sequence[int], rows: int) -> QueryTiles | None:
        found, first = [], 0
        for place in places:
            count = runs[place].num_new * self.shape.group
            for tile in range(-(-count // rows)):
                found.append((place, tile, first))
                first += min(rows, count - tile * rows)
        if not found:
            return None
        by_run, by_tile, firsts = (as_int32(column) for column in zip(*found, strict=True))
        return QueryTiles(by_run, by_tile, rows, firsts)

    def queries(self, runs: Sequence[TextRun]) -> Tensor:
        """[T, wider than the heads], as after the projection of queries, keys and values."""
        rows = [self.all_texts[r.text].q[r.end - r.num_new : r.end] for r in runs]
        q = torch.cat(rows).flatten(1).to(self.dtype)
        return torch.cat([q, torch.full((len(q), 8), float("nan"), dtype=self.dtype)], 1)

    def attended(
        self, runs: Sequence[TextRun], few: Sequence[int] = (), rows: int = 64, by: Any = attend
    ) -> list[Tensor]:
        """Of each run, [num_new, heads * head_dim]."""
        q = self.queries(runs)
        out = torch.full_like(q, float("nan"))
        step = self.step(runs, few, rows)
        by(q, out, self.kv, step, self.partials(runs), **self.shape.options)
        out, beside = out.split([q.shape[1] - 8, 8], 1)
        assert beside.isnan().all(), "written beside its columns"
        return list(out.split([run.num_new for run in runs]))

    def partials(self, runs: Sequence[TextRun]) -> Partials:
        rows = sum(run.num_new for run in runs)
        shape = self.shape
        sizes = rows, shape.num_heads, shape.head_dim, MAX_MODEL_LEN
        return allocate_partials(*sizes, torch.get_default_device())


def world(
    shape: Shape,
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    kv: str = "float32",
    seed: int = 1,
) -> World:
    made = texts(shape, lengths, seed)
    counts = [-(-length // shape.block_size) for length in lengths]
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(counts) + 2, generator=random).tolist()
    tables, start = [], 0
    for count in counts:
        tables.append(order[start : start + count])
        start += count
    stored = empty_kv(shape, len(order), kv)
    for text, table in zip(made, tables, strict=True):
        slots = [b * shape.block_size + i for b in table for i in range(shape.block_size)]
        own = torch.tensor(slots[: len(text.k)])
        store_heads(stored.keys, stored.key_scales, own, text.k)
        store_heads(stored.values, stored.value_scales, own, text.v)
    return World(shape, dtype, made, stored, tables)


def empty_kv(shape: Shape, num_blocks: int, kv: str) -> LayerKV:
    """Of no numbers: what is read of a slot that nobody wrote shows."""
    rows = (num_blocks * shape.block_size, shape.num_kv_heads)
    scales = [None, None]
    if kv in ("int8", "fp8"):
        scales = [torch.full(rows, float("nan")) for _ in range(2)]
    if kv == "int8":
        numbers = [torch.full((*rows, shape.head_dim), 77, dtype=torch.int8) for _ in range(2)]
    else:
        nan = torch.full((*rows, shape.head_dim), float("nan"))
        numbers = [nan.to(STORED[kv], copy=True) for _ in range(2)]
    return LayerKV(*numbers, *scales)


def as_int32(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
