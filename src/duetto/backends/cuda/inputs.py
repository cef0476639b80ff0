"""A step's numbers on their way to the device: one block of bytes, one copy.

The block's fields stand at fixed places, so that a recorded graph finds them again. There are as
many blocks in pinned memory as steps may be on their way, and each waits for its own last copy.
Knows no program.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duetto.backends.backend import IntArray, StepArrays
from duetto.backends.cuda.kernels.sampler import SampleTensors
from duetto.backends.cuda.query_tiles import TilePlan
from duetto.backends.cuda.tensors import QueryTiles, StepTensors
from duetto.backends.device import SampleArrays

_ALIGNMENT = 16  # bytes: kernels are compiled for pointers that are multiples of it
_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "i4": torch.int32,
    "i8": torch.int64,
    "f8": torch.float64,
}


class InputSizes(NamedTuple):
    """How many numbers there is room for."""

    num_tokens: int
    num_runs: int
    num_rows: int
    num_tiles: int  # of each kind
    num_table_entries: int


class _Field(NamedTuple):
    dtype: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length * np.dtype(self.dtype).itemsize


class StepInputs:
    def __init__(self, sizes: InputSizes, device: torch.device, num_in_flight: int) -> None:
        self._fields = _lay_out(sizes)
        num_bytes = self._fields["block_tables"].end
        is_cuda = device.type == "cuda"
        self._here = [
            torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
            for _ in range(num_in_flight)
        ]
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._copied = [torch.cuda.Event() if is_cuda else None for _ in range(num_in_flight)]
        self._next = 0
        self.sizes = sizes

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return len(self._there)

    def send(
        self,
        step: StepArrays,
        feedback: IntArray | None,
        sampling: SampleArrays | None,
        tiles: TilePlan,
    ) -> None:
        """Begin to copy a step. `tensors` has it on the device, for all that is launched later."""
        here, copied = self._here[self._next], self._copied[self._next]
        self._next = (self._next + 1) % len(self._here)
        if copied is not None:
            copied.synchronize()  # done long ago, unless too many steps are on their way
        block = here.numpy()
        for name, numbers in _numbers(step, feedback, sampling, tiles).items():
            self._write(block, name, numbers)
        used = self._fields["block_tables"].start + step.block_tables.size * 4
        self._there[:used].copy_(here[:used], non_blocking=True)
        if copied is not None:
            copied.record()

    def tensors(
        self, num_tokens: int, num_runs: int, num_rows: int, tiles: TilePlan
    ) -> StepTensors:
        """Where a step of these sizes lies on the device."""
        few, many = len(tiles.few_runs), len(tiles.many_runs)
        few_tiles = QueryTiles(
            self._tensor("few_runs", few),
            self._tensor("few_tiles", few),
            tiles.few_rows,
            self._tensor("few_first_rows", few),
        )
        many_tiles = QueryTiles(
            self._tensor("many_runs", many), self._tensor("many_tiles", many), tiles.many_rows
        )
        return StepTensors(
            self._tensor("token_ids", num_tokens),
            self._tensor("feedback", num_tokens),
            self._tensor("positions", num_tokens),
            self._tensor("slots", num_tokens),
            self._tensor("query_starts", num_runs + 1),
            self._tensor("context_lens", num_runs),
            self._tensor("block_tables", self.sizes.num_table_entries),
            self._tensor("table_width", 1),
            self._tensor("logit_rows", num_rows),
            few_tiles if few else None,
            many_tiles if many else None,
        )

    def sample_tensors(self, num_rows: int) -> SampleTensors:
        """How the rows are sampled, on the device."""
        return SampleTensors(*(self._tensor(name, num_rows) for name in SampleArrays._fields))

    def _tensor(self, name: str, count: int) -> Tensor:
        field = self._fields[name]
        assert count <= field.length, f"{count} {name}: there is room for {field.length}"
        return self._there[field.start : field.end].view(_TORCH_DTYPES[field.dtype])[:count]

    def _write(self, block: NDArray[np.uint8], name: str, numbers: NDArray[Any]) -> None:
        field = self._fields[name]
        count = numbers.size
        assert count <= field.length, f"{count} {name}: there is room for {field.length}"
        place = block[field.start : field.end].view(field.dtype)
        place[:count] = numbers.reshape(-1).view("i8" if name == "keys" else numbers.dtype)


def _numbers(
    step: StepArrays,
    feedback: IntArray | None,
    sampling: SampleArrays | None,
    tiles: TilePlan,
) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = dict(step._asdict())
    found["feedback"] = np.full(len(step.token_ids), -1, np.int32) if feedback is None else feedback
    found["table_width"] = np.array([step.block_tables.shape[1]], np.int32)
    found |= tiles.arrays()
    if sampling is not None:
        found |= sampling._asdict()
    return found


def _lay_out(sizes: InputSizes) -> dict[str, _Field]:
    counts: Sequence[tuple[str, str, int]] = (
        ("temperatures", "f8", sizes.num_rows),
        ("keys", "i8", sizes.num_rows),
        ("top_ps", "f8", sizes.num_rows),
        ("min_gaps", "f8", sizes.num_rows),
        ("top_ks", "i4", sizes.num_rows),
        ("logit_rows", "i4", sizes.num_rows),
        ("token_ids", "i4", sizes.num_tokens),
        ("feedback", "i4", sizes.num_tokens),
        ("positions", "i4", sizes.num_tokens),
        ("slots", "i4", sizes.num_tokens),
        ("query_starts", "i4", sizes.num_runs + 1),
        ("context_lens", "i4", sizes.num_runs),
        ("table_width", "i4", 1),
        ("few_runs", "i4", sizes.num_tiles),
        ("few_tiles", "i4", sizes.num_tiles),
        ("few_first_rows", "i4", sizes.num_tiles),
        ("many_runs", "i4", sizes.num_tiles),
        ("many_tiles", "i4", sizes.num_tiles),
        ("block_tables", "i4", sizes.num_table_entries),  # last: only what is used is copied
    )
    fields: dict[str, _Field] = {}
    start = 0
    for name, dtype, count in counts:
        fields[name] = _Field(dtype, start, count)
        start = -(-fields[name].end // _ALIGNMENT) * _ALIGNMENT
    return fields
