"""Which query rows attention computes together. Knows no tensors.

A run of few rows is cut into tiles of 16, whose keys programs share out split by split; a longer
one into large tiles, each of which one program walks, the longest first. Bits are the same.
"""

from dataclasses import dataclass, field

import numpy as np

from duetto.backends.backend import IntArray, StepArrays
from duetto.backends.cuda.sizes import FEW_ROWS

_MOST_FEW = 64  # packed rows of a run that is cut into such tiles


def _none() -> IntArray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of a step: of run few_runs[i], the tile few_tiles[i], and so on."""

    few_rows: int  # rows of a tile
    many_rows: int
    few_runs: IntArray = field(default_factory=_none)
    few_tiles: IntArray = field(default_factory=_none)
    few_first_rows: IntArray = field(default_factory=_none)  # packed rows of the tiles before
    many_runs: IntArray = field(default_factory=_none)
    many_tiles: IntArray = field(default_factory=_none)

    def arrays(self) -> dict[str, IntArray]:
        return {
            "few_runs": self.few_runs,
            "few_tiles": self.few_tiles,
            "few_first_rows": self.few_first_rows,
            "many_runs": self.many_runs,
            "many_tiles": self.many_tiles,
        }


def plan_tiles(step: StepArrays, group: int, many_rows: int, num_few_tokens: int) -> TilePlan:
    """group: query heads that share a KV head. num_few_tokens: of all `few` runs, at most."""
    counts = np.diff(step.query_starts).astype(np.int64)
    is_few = counts * group <= _MOST_FEW
    is_few &= np.cumsum(np.where(is_few, counts, 0)) <= num_few_tokens
    few_runs, few_tiles = _tiles(np.flatnonzero(is_few), counts * group, FEW_ROWS)
    rows = np.minimum(FEW_ROWS, counts[few_runs] * group - few_tiles.astype(np.int64) * FEW_ROWS)
    first_rows = np.concatenate(([0], np.cumsum(rows)[:-1])) if len(rows) else rows
    many_runs, many_tiles = _tiles(np.flatnonzero(~is_few), counts * group, many_rows)
    ends = step.context_lens[many_runs] - counts[many_runs] + (many_tiles + 1) * many_rows // group
    order = np.argsort(-ends, kind="stable")
    return TilePlan(
        FEW_ROWS,
        many_rows,
        few_runs,
        few_tiles,
        first_rows.astype(np.int32),
        many_runs[order],
        many_tiles[order],
    )


def _tiles(runs: np.ndarray, num_rows: np.ndarray, size: int) -> tuple[IntArray, IntArray]:
    """Of each of these runs, every tile."""
    counts = -(-num_rows[runs] // size)
    each = np.repeat(runs, counts).astype(np.int32)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return each, (np.arange(len(each)) - starts).astype(np.int32)


def tiles_of_runs(step: StepArrays, first: int, last: int, group: int) -> tuple[IntArray, IntArray]:
    """Runs first ... last, whole, in tiles of FEW_ROWS: of each tile its run and its number."""
    counts = np.diff(step.query_starts).astype(np.int64)
    return _tiles(np.arange(first, last), counts * group, FEW_ROWS)


def most_tiles(num_tokens: int, group: int) -> int:
    """That a step may have of one kind: each token may be a run by itself."""
    return num_tokens * group // FEW_ROWS + num_tokens
