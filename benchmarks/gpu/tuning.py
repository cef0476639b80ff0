"""Part `tuning`: other tiles of projections and of attention, and the best of each shape: what the
tables of tiles should say. All tiles give the same bits; what does not is left out, and said."""

from collections.abc import Iterator
from itertools import product
from time import monotonic
from typing import Any

import torch

from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import launch_linear, linear_by, shared_memory_bytes
from duetto.backends.cuda.random_weights import random_matrix
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import UNIT, LinearTile
from duetto.models.programs import build_program
from duetto.program.ops import Linear
from gpu.bench import Bench
from gpu.tuning_attention import sweep_attention

MARGIN_S = 15.0  # of the part's time: of a tile that compiles for long
UNCACHED_BYTES = 256 << 20
FORMATS = ("int4", "int8", "fp8", "bfloat16")  # those that were never tried come first
ROWS = (1, 16, 32, 64, 512, 2048)


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    start = monotonic()
    tried, best, odd = sweep_attention(bench, start + 0.35 * (bench.limit_s - MARGIN_S))
    bench.tidy()
    limit_s = monotonic() - start + 3.0 if bench.rehearse else bench.limit_s - MARGIN_S
    for format, name, outputs, inputs, rows in _cases(bench):
        if monotonic() - start > limit_s:
            break
        sweep = _Sweep(bench, format, outputs, inputs, rows)
        seconds, tile, count, other_bits = sweep.run(start + limit_s)
        tried += count
        odd += [f"{format} {name} {rows} rows: {each}" for each in other_bits]
        best.append(
            {
                "kernel": f"linear, {format}",
                "shape": f"{name} {outputs} x {inputs}",
                "rows": rows,
                "now_s": sweep.now_s,
                "best_s": seconds,
                "best": tile,
            }
        )
    return {"tried": tried, "seconds": monotonic() - start, "best": best, "other_bits": odd}


def _cases(bench: Bench) -> Iterator[tuple[str, str, int, int, int]]:
    """By worth: what a decode step reads most of, then the rest."""
    program = build_program(bench.config("llama-3-8b"))
    shapes = {
        op.label(program): (op.out.width, op.x.width)
        for op in program.ops
        if isinstance(op, Linear)
    }
    formats = (bench.dtype_name, "int8") if bench.rehearse else FORMATS
    for rows, format in product((1, 3) if bench.rehearse else ROWS, formats):
        for name, (outputs, inputs) in shapes.items():
            if name != "lm_head" or rows <= 64:
                yield format, name, outputs, inputs, rows


class _Sweep:
    """One projection with so many rows, by the tiles of today and by others."""

    def __init__(self, bench: Bench, format: str, outputs: int, inputs: int, rows: int) -> None:
        self._bench, self._format, self._rows = bench, format, rows
        kind = GpuFormat(format, UNIT.get(format, 0))  # type: ignore[arg-type]
        copies = 1 if bench.rehearse else max(1, -(-UNCACHED_BYTES // (outputs * inputs)))
        copies = min(copies, 8)
        self._matrices = [random_matrix(kind, outputs, inputs, bench.device) for _ in range(copies)]
        self._x = torch.randn(rows, inputs, device=bench.device).to(bench.dtype)
        self._out = torch.empty(rows, outputs, device=bench.device, dtype=bench.dtype)
        self.now_s = self._seconds(None)
        self._bits = self._result(None)

    def run(self, until: float) -> tuple[float, str, int, list[str]]:
        """The best time and its tile, how many were tried, and those with other bits."""
        best_s, best, count, odd = self.now_s, "as now", 0, []
        for tile in self._tiles():
            if monotonic() > until:
                break
            count += 1
            try:
                seconds = self._seconds(tile)
            except Exception as error:  # too much shared memory, too many registers
                print(f"{tile}: {type(error).__name__}: {error}")
                continue
            if not torch.equal(self._result(tile), self._bits):
                odd.append(repr(tile))
            elif seconds < 0.99 * best_s:
                best_s, best = seconds, repr(tile)
        return best_s, best, count, odd

    def _tiles(self) -> Iterator[LinearTile]:
        """That have room, in about the number of tokens."""
        if self._bench.rehearse:
            yield LinearTile(32, 16, 128, 1, 1)
            return
        is_few = self._rows <= 64
        tokens = [max(16, self._rows)] if is_few else [128, 256]
        depths = (64, 128, 256) if self._format == "bfloat16" else (128, 256)
        most = shared_memory_bytes(self._bench.device.index or 0)
        choices = product((32, 64, 128), tokens, depths, (4,) if is_few else (4, 8), (3, 5))
        for outputs, number, inputs, warps, stages in choices:
            tile = LinearTile(outputs, number, inputs, warps, stages)
            if stages * tile.stage_bytes(self._format, False) < most:  # type: ignore[arg-type]
                yield tile

    def _seconds(self, tile: LinearTile | None) -> float:
        launches = [lambda m=matrix: self._launch(tile, m) for matrix in self._matrices]  # type: ignore[misc]
        return self._bench.watch.each(launches, 1 if self._bench.rehearse else 5)

    def _launch(self, tile: LinearTile | None, matrix: Matrix) -> None:
        if tile is None:
            launch_linear(self._x, matrix, self._out)
        else:
            linear_by(tile, self._x, matrix, self._out)

    def _result(self, tile: LinearTile | None) -> torch.Tensor:
        self._launch(tile, self._matrices[0])
        return self._out.clone()
