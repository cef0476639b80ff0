"""The KV arena of the GPU backend: for each layer one tensor of keys and one of values, by slot.

A block more than the scheduler knows is scratch, where rows of padding are written. Blocks leave as
bytes (layer by layer: keys, values, and their scales in int8 and fp8) and come back the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duetto.backends.backend import FloatArray, IntArray, KVMoves
from duetto.backends.blocks import Bytes
from duetto.backends.cuda.tensors import LayerKV
from duetto.backends.moves import Turn, turns
from duetto.program.dtype import KVDtype
from duetto.program.ops import RopeSpec
from duetto.program.program import KVSpec

_KV_TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # numbers of types that have scales
_AT_A_TIME = 64  # blocks that are brought together on the device before they are copied


@dataclass(frozen=True, slots=True)
class CudaArena:
    layers: tuple[LayerKV, ...]
    num_blocks: int  # without the one for padding
    block_size: int

    def blocks(self) -> Iterator[Tensor]:
        """All that is stored, as bytes: [num_blocks + 1, bytes of a block's part] each."""
        for layer in self.layers:
            for stored in layer:
                if stored is not None:
                    yield stored.view(self.num_blocks + 1, -1).view(torch.uint8)


def allocate_arena(
    layers: Sequence[KVSpec],
    num_blocks: int,
    block_size: int,
    dtype: KVDtype,
    device: torch.device,
) -> CudaArena:
    slots, kept = (num_blocks + 1) * block_size, _KV_TYPES[dtype]

    def layer(kv: KVSpec) -> LayerKV:
        shape = (slots, kv.num_kv_heads, kv.head_dim)
        keys, values = (torch.zeros(shape, dtype=kept, device=device) for _ in range(2))
        if kept not in LARGEST:
            return LayerKV(keys, values)
        scales = [torch.zeros(shape[:2], dtype=torch.float32, device=device) for _ in range(2)]
        return LayerKV(keys, values, *scales)

    return CudaArena(tuple(map(layer, layers)), num_blocks, block_size)


def export_blocks(
    arena: CudaArena, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
) -> None:
    """Into `out`, [len(blocks), bytes of a block]; zeros behind a block's num_tokens."""
    _check_blocks(arena, blocks, out)
    for first in range(0, len(blocks), _AT_A_TIME):
        own = blocks[first : first + _AT_A_TIME]
        rows = _index(own, arena)
        parts = []
        for stored in arena.blocks():
            part = stored[rows]
            if num_tokens:
                by_token = part.view(len(own), arena.block_size, -1)
                counts = _index(num_tokens[first : first + _AT_A_TIME], arena)
                token = torch.arange(arena.block_size, device=part.device)
                by_token[token[None] >= counts[:, None]] = 0
            parts.append(part)
        out[first : first + len(own)] = torch.cat(parts, 1).cpu().numpy()


def import_blocks(arena: CudaArena, blocks: Sequence[int], data: Bytes) -> None:
    """What `export_blocks` gave, into blocks of the arena."""
    _check_blocks(arena, blocks, data)
    assert len(set(blocks)) == len(blocks), "a block is written twice"
    for first in range(0, len(blocks), _AT_A_TIME):
        own = blocks[first : first + _AT_A_TIME]
        rows, start = _index(own, arena), 0
        moved = torch.from_numpy(np.array(data[first : first + len(own)])).to(rows.device)
        for stored in arena.blocks():
            stored[rows] = moved[:, start : start + stored.shape[1]]
            start += stored.shape[1]


def read_kv(arena: CudaArena, layer: int, slots: IntArray) -> tuple[FloatArray, FloatArray]:
    """The keys and values in some slots, [N, kv_heads, head_dim] each, in fp32."""
    keys, values = kv_numbers(arena.layers[layer], _index(slots, arena))
    return keys.cpu().numpy(), values.cpu().numpy()


def kv_numbers(kv: LayerKV, slots: Tensor) -> tuple[Tensor, Tensor]:
    """As read_kv, on the device."""
    keys = _numbers(kv.keys, kv.key_scales, slots)
    return keys, _numbers(kv.values, kv.value_scales, slots)


def move_kv(arena: CudaArena, moves: KVMoves, rotations: Sequence[RopeSpec | None]) -> None:
    """Tokens' KV to other slots: as it is stored, but keys turned in fp32 and stored again."""
    assert not np.intersect1d(moves.from_slots, moves.to_slots).size, "read and written"
    assert len(np.unique(moves.to_slots)) == len(moves.to_slots), "written twice"
    source, target = _index(moves.from_slots, arena), _index(moves.to_slots, arena)
    on_device: dict[int, tuple[Tensor, Tensor]] = {}
    for kv, turn in zip(arena.layers, turns(rotations, moves), strict=True):
        for stored in kv:
            if stored is not None:
                by_byte = stored.view(len(stored), -1).view(torch.uint8)
                by_byte[target] = by_byte[source]
        if turn is not None:
            if id(turn) not in on_device:
                on_device[id(turn)] = _on(turn, source.device)
            rows = _turned(_numbers(kv.keys, kv.key_scales, source), *on_device[id(turn)])
            store_heads(kv.keys, kv.key_scales, target, rows)


def store_heads(stored: Tensor, scales: Tensor | None, slots: Tensor, rows: Tensor) -> None:
    """Rows [N, kv_heads, head_dim] in fp32 into slots, rounded to what the arena holds: in int8 and
    fp8 by a scale for each, 0 for a row of zeros (backends/reference/kv.quantize_rows)."""
    if scales is None:
        stored[slots] = rows.to(stored.dtype)
        return
    scale = rows.abs().amax(-1) / LARGEST[stored.dtype]
    steps = rows / torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    if stored.dtype == torch.int8:
        steps = steps.round()
    scales[slots] = scale
    bytes_of = steps.to(stored.dtype).view(torch.uint8)
    stored.view(torch.uint8)[slots] = bytes_of


def _numbers(stored: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    if scales is None:
        return stored[slots].float()
    kept = stored.view(torch.uint8)[slots].view(stored.dtype)
    return kept.float() * scales[slots][..., None]


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """backends/moves.turned, with the same operations."""
    half = cos.shape[-1]
    first, second = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    heads[..., :half] = first * cos - second * sin
    heads[..., half : 2 * half] = second * cos + first * sin
    return heads


def _on(turn: Turn, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.from_numpy(each)[:, None].to(device) for each in turn)
    return cos, sin


def _index(places: Sequence[int] | IntArray, arena: CudaArena) -> Tensor:
    device = arena.layers[0].keys.device
    return torch.from_numpy(np.array(places, np.int64)).to(device)


def _check_blocks(arena: CudaArena, blocks: Sequence[int], data: Bytes) -> None:
    block_bytes = sum(stored.shape[1] for stored in arena.blocks())
    assert data.shape == (len(blocks), block_bytes), f"{data.shape}: not these blocks' bytes"
    assert all(0 <= block < arena.num_blocks for block in blocks), "a block outside the arena"
