"""KV brought to another place: what a text alone gave, turned, is what it gives there, where the
text does not see what is before it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from native import pack, pool
from oracle.cases import CASES_BY_NAME, VOCAB_SIZE
from oracle.fixture_io import write_checkpoint

from duetto.backends.backend import Backend, FloatArray, KVMoves, StepArrays
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.models.programs import load_program
from duetto.program.dtype import KVDtype
from duetto.program.program import Program
from duetto.program.rotation import key_rotations

BLOCK_SIZE = 16
CASES = ("llama-mqa", "qwen2-window", "gemma3_text", "phi3-partial-rotary")
BACKENDS = ("reference", *native.isas())


@cache
def model(case: str) -> tuple[Program, Any]:
    with TemporaryDirectory() as name:
        write_checkpoint(CASES_BY_NAME[case], Path(name))
        _, program = load_program(Path(name))
        return program, load_weights(Path(name), program, "float32")


@cache
def backend(case: str, which: str) -> Backend:
    program, weights = model(case)
    if which == "reference":
        return ReferenceBackend(program, weights)
    return CpuBackend(program, pack(program, weights, None), pool(2), which)


def step(token_ids: list[int], first_position: int, first_slot: int) -> StepArrays:
    """Tokens that see only each other: their block table begins at their own first block, and
    nothing is at the positions before."""
    size = len(token_ids)
    i32 = np.int32
    blocks = -(-(first_slot % BLOCK_SIZE + size) // BLOCK_SIZE)
    return StepArrays(
        token_ids=np.array(token_ids, i32),
        positions=np.arange(first_position, first_position + size, dtype=i32),
        slots=np.arange(first_slot, first_slot + size, dtype=i32),
        query_starts=np.array([0, size], i32),
        context_lens=np.array([first_position + size], i32),
        block_tables=np.arange(blocks, dtype=i32)[None] + i32(first_slot // BLOCK_SIZE),
        logit_rows=np.array([size - 1], i32),
    )


def moves(count: int, from_slot: int, to_slot: int, to_position: int) -> KVMoves:
    places = np.arange(count, dtype=np.int32)
    return KVMoves(places + from_slot, places + to_slot, places, places + to_position)


def tokens(count: int) -> list[int]:
    return np.random.RandomState(count).randint(0, VOCAB_SIZE, count).tolist()


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("case", CASES[:3])
@pytest.mark.parametrize("which", BACKENDS)
def test_a_text_that_goes_on_from_moved_kv(which: str, case: str, kv_dtype: KVDtype) -> None:
    """Attention knows only differences of position: so the next token after a text that was moved
    to position d is what it is after the text at 0, if nothing is before it."""
    own, ids = backend(case, which), tokens(21)
    kv = own.allocate_kv(8, BLOCK_SIZE, kv_dtype)
    [expected] = own.run(step(ids, 0, 0), kv)
    own.move_kv(moves(20, 0, 64, 0), kv)  # to its own positions: nothing is turned
    [same] = own.run(part(ids, 64, 20), kv)
    np.testing.assert_array_equal(same, expected)


def part(ids: list[int], first_slot: int, start: int) -> StepArrays:
    """The tokens from `start` on, of a text at position 0 whose blocks begin at a slot."""
    whole = step(ids, 0, first_slot)
    return whole._replace(
        token_ids=whole.token_ids[start:],
        positions=whole.positions[start:],
        slots=whole.slots[start:],
        query_starts=np.array([0, len(ids) - start], np.int32),
        logit_rows=np.array([len(ids) - start - 1], np.int32),
    )


@pytest.mark.parametrize("delta", [1, 7, 16, 1000])
@pytest.mark.parametrize("case", CASES)
def test_turned_keys_are_the_keys_of_that_position(case: str, delta: int) -> None:
    """Layer 0 knows no company: its keys there are its keys here, turned."""
    own, ids = backend(case, "reference"), tokens(20)
    kv = own.allocate_kv(200, BLOCK_SIZE, "float32")
    own.run(step(ids, 0, 1600), kv)
    own.move_kv(moves(20, 1600, 1700, delta), kv)
    there = step(ids, delta, delta)._replace(block_tables=np.arange(66, dtype=np.int32)[None])
    own.run(there, kv)
    keys, values = kv.keys[0], kv.values[0]
    moved, wanted = np.arange(1700, 1720), np.arange(delta, delta + 20)
    np.testing.assert_allclose(keys.at(moved), keys.at(wanted), atol=2e-5)
    np.testing.assert_array_equal(values.at(moved), values.at(wanted))
    assert not np.allclose(keys.at(np.arange(1600, 1620)), keys.at(wanted), atol=1e-2)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("isa", native.isas())
def test_native_moves_as_the_reference_does(isa: str, kv_dtype: KVDtype) -> None:
    """What follows after moved KV, on both: the same within what their arithmetic differs by."""
    logits: list[FloatArray] = []
    ids = tokens(40)
    for which in ("reference", isa):
        own = backend("qwen2-window", which)
        kv = own.allocate_kv(12, BLOCK_SIZE, kv_dtype)
        own.run(step(ids[:30], 0, 0), kv)
        own.run(step(ids[30:], 0, 128), kv)
        own.move_kv(moves(10, 128, 64 + 30, 30), kv)  # behind the first text
        own.move_kv(moves(30, 0, 64, 0), kv)
        logits.append(own.run(part([*ids, 5], 64, 40), kv)[0])
    np.testing.assert_allclose(logits[1], logits[0], atol=3e-2 if kv_dtype != "float32" else 2e-4)


def test_rotations_are_told_by_layer() -> None:
    program, _ = model("gemma3_text")
    specs = key_rotations(program)
    assert len(specs) == len(program.kv) and None not in specs
    assert len(set(specs)) == 2  # local and global layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from_slots": [0, 200]}, "a move from KV slot 200 to 65: must be 0 to 127"),
        ({"to_slots": [64, -1]}, "to -1"),
        ({"to_slots": [64, 64]}, "written twice"),
        ({"to_slots": [64, 0]}, "both read and written"),
        ({"to_slots": [64]}, "2 slots to move from and 1 to move to"),
    ],
)
def test_native_refuses_what_would_write_elsewhere(
    change: dict[str, list[int]], message: str
) -> None:
    own = backend("llama-mqa", native.isas()[0])
    kv = own.allocate_kv(8, BLOCK_SIZE, "float32")
    arrays = {name: np.array(value, np.int32) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        own.move_kv(moves(2, 0, 64, 0)._replace(**arrays), kv)
