"""One look beside a step: whose attention, to which positions, and what it comes to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duetto.backends.backend import AttentionLook, IntArray, ScoreArray, StepArrays
from duetto.backends.cuda.kernels.look import look_units
from duetto.backends.cuda.ops import DeviceRun
from duetto.backends.cuda.query_tiles import tiles_of_runs
from duetto.backends.cuda.sizes import FEW_ROWS
from duetto.backends.cuda.tensors import QueryTiles
from duetto.backends.looks import attention_scores
from duetto.program.ops import Attention


@dataclass(frozen=True, slots=True)
class SeenBy:
    """Whole units of attention that a look's tokens have given so far."""

    positions: IntArray
    tiles: QueryTiles
    units: Tensor  # [up to the last position, and one more: weights that are no numbers]

    @classmethod
    def of(
        cls, look: AttentionLook, step: StepArrays, group: int, device: torch.device
    ) -> "SeenBy":
        runs, tiles = (
            torch.from_numpy(each).to(device)
            for each in tiles_of_runs(step, look.first, look.last, group)
        )
        size = int(look.positions[-1]) + 2
        units = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(look.positions, QueryTiles(runs, tiles, FEW_ROWS), units)

    def add(self, op: Attention, q: Tensor, run: DeviceRun) -> None:
        """What one layer's queries give."""
        look_units(
            q,
            run.kv.layers[op.layer],
            run.step,
            self.tiles,
            self.units,
            block_size=run.kv.block_size,
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            head_dim=op.head_dim,
            scale=op.scale,
            window=op.window,
            softcap=op.softcap,
        )

    def scores(self) -> ScoreArray:
        """Of the look's positions; waits."""
        units = self.units.cpu().numpy()
        return attention_scores(units[self.positions], int(units[-1]))
