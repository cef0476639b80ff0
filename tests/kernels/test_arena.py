"""The GPU's KV arena: what is stored, moved, taken out and brought back, as on the reference."""

import numpy as np
import pytest
import torch
from kernels.device import DEVICE
from oracle.cases import CASES_BY_NAME
from program.rewrites.models import of_case

from duetto.backends.backend import KVMoves
from duetto.backends.cuda.arena import (
    CudaArena,
    allocate_arena,
    export_blocks,
    import_blocks,
    move_kv,
    read_kv,
    store_heads,
)
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.kv import KVArena
from duetto.program.rotation import key_rotations

BLOCK_SIZE, NUM_BLOCKS = 4, 10
SLOTS = NUM_BLOCKS * BLOCK_SIZE
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "fp8"])
PROGRAM, WEIGHTS = of_case(CASES_BY_NAME["phi3-partial-rotary"])


def filled(dtype: str, seed: int = 0) -> tuple[CudaArena, KVArena]:
    """The same numbers in an arena of the GPU's and one of the reference's."""
    ours = allocate_arena(PROGRAM.kv, NUM_BLOCKS, BLOCK_SIZE, dtype, DEVICE)
    twin = ReferenceBackend(PROGRAM, WEIGHTS).allocate_kv(NUM_BLOCKS, BLOCK_SIZE, dtype)
    random = np.random.default_rng(seed)
    slots = np.arange(SLOTS, dtype=np.int32)
    for layer, kv in enumerate(ours.layers):
        shape = (SLOTS, *kv.keys.shape[1:])
        keys, values = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        keys[3, 0] = 0
        twin.write(layer, slots, keys.reshape(SLOTS, -1), values.reshape(SLOTS, -1))
        places = torch.from_numpy(slots.astype(np.int64)).to(DEVICE)
        store_heads(kv.keys, kv.key_scales, places, torch.from_numpy(keys).to(DEVICE))
        store_heads(kv.values, kv.value_scales, places, torch.from_numpy(values).to(DEVICE))
    return ours, twin


def assert_equal(ours: CudaArena, twin: KVArena) -> None:
    slots = np.arange(SLOTS, dtype=np.int32)
    for layer in range(len(ours.layers)):
        found = read_kv(ours, layer, slots)
        wanted = twin.keys[layer].at(slots), twin.values[layer].at(slots)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(got, want)


@DTYPES
def test_numbers_are_stored_as_on_the_reference(dtype):
    assert_equal(*filled(dtype))


@DTYPES
def test_moved_kv_is_the_reference_s(dtype):
    ours, twin = filled(dtype)
    moves = KVMoves(
        *(
            np.array(a, np.int32)
            for a in ([0, 3, 9, 17], [20, 21, 30, 38], [0, 3, 9, 17], [90, 1, 9, 2])
        )
    )
    move_kv(ours, moves, key_rotations(PROGRAM))
    ReferenceBackend(PROGRAM, WEIGHTS).move_kv(moves, twin)
    assert_equal(ours, twin)


@pytest.mark.parametrize("dtype", ["float16", "int8", "fp8"])
def test_blocks_leave_and_come_back_the_same(dtype):
    ours, _ = filled(dtype) if dtype != "fp8" else (filled_with_fp8(), None)
    block_bytes = sum(stored.shape[1] for stored in ours.blocks())
    out = np.empty((3, block_bytes), np.uint8)
    export_blocks(ours, [7, 0, 4], out)
    other = allocate_arena(PROGRAM.kv, NUM_BLOCKS, BLOCK_SIZE, dtype, DEVICE)
    import_blocks(other, [1, 9, 0], out)
    again = np.empty_like(out)
    export_blocks(other, [1, 9, 0], again)
    np.testing.assert_array_equal(out, again)
    for got, want in zip(other.blocks(), ours.blocks(), strict=True):
        assert torch.equal(got[[1, 9, 0]], want[[7, 0, 4]])
        assert not got[NUM_BLOCKS].any()


def filled_with_fp8() -> CudaArena:
    arena = allocate_arena(PROGRAM.kv, NUM_BLOCKS, BLOCK_SIZE, "fp8", DEVICE)
    rows = torch.randn(SLOTS, *arena.layers[0].keys.shape[1:], device=DEVICE)
    for kv in arena.layers:
        for stored, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
            store_heads(stored, scales, torch.arange(SLOTS, device=DEVICE), rows)
    keys, _ = read_kv(arena, 0, np.arange(SLOTS, dtype=np.int32))
    error = np.abs(keys - rows.cpu().numpy())
    assert (error <= np.abs(rows.cpu().numpy()) / 16 + 0.01).all()  # 3 bits behind the first
    return arena


@pytest.mark.parametrize("dtype", ["float16", "int8", "fp8"])
def test_zeros_behind_the_last_token(dtype):
    ours, _ = filled(dtype)
    block_bytes = sum(stored.shape[1] for stored in ours.blocks())
    out = np.empty((2, block_bytes), np.uint8)
    export_blocks(ours, [2, 3], out, [1, BLOCK_SIZE])
    other = allocate_arena(PROGRAM.kv, NUM_BLOCKS, BLOCK_SIZE, dtype, DEVICE)
    import_blocks(other, [2, 3], out)
    slots = np.arange(8, 16, dtype=np.int32)
    for got, want in zip(read_kv(other, 0, slots), read_kv(ours, 0, slots), strict=True):
        np.testing.assert_array_equal(got[0], want[0])
        assert not got[1:4].any()
        np.testing.assert_array_equal(got[4:], want[4:])


def test_other_blocks_are_refused():
    ours, _ = filled("float16")
    block_bytes = sum(stored.shape[1] for stored in ours.blocks())
    out = np.empty((1, block_bytes), np.uint8)
    with pytest.raises(AssertionError, match="outside"):
        export_blocks(ours, [NUM_BLOCKS], out)
    with pytest.raises(AssertionError, match="not these blocks"):
        import_blocks(ours, [0], out[:, 1:])
    with pytest.raises(AssertionError, match="written twice"):
        import_blocks(ours, [0, 0], np.concatenate((out, out)))
