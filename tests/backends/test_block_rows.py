"""What links send: blocks where they lie, and which layers of a step are done."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import pytest
from native import pack, pool
from oracle.cases import CASES_BY_NAME
from oracle.fixture_io import write_checkpoint

from duetto.backends.backend import Backend, LayersDone, StepArrays
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference import backend as reference
from duetto.checkpoints.checkpoint import load_weights
from duetto.models.programs import load_program
from duetto.program.dtype import KVDtype
from duetto.program.program import Program

BLOCK_SIZE = 16
DTYPES: dict[str, tuple[KVDtype, ...]] = {
    "reference": ("float32", "int8", "fp8"),
    "cpu": ("float32", "bfloat16", "int8"),
}


@cache
def model() -> tuple[Program, Any]:
    with TemporaryDirectory() as name:
        write_checkpoint(CASES_BY_NAME["gemma3_text"], Path(name))
        _, program = load_program(Path(name))
        return program, load_weights(Path(name), program, "float32")


def backend(which: str) -> Backend:
    program, weights = model()
    if which == "reference":
        return ReferenceBackend(program, weights)
    return CpuBackend(program, pack(program, weights, None), pool(2), native.choose_isa())


def prompt(size: int) -> StepArrays:
    i32 = np.int32
    return StepArrays(
        token_ids=np.array([(7 * i + 3) % 50 for i in range(size)], i32),
        positions=np.arange(size, dtype=i32),
        slots=np.arange(size, dtype=i32),
        query_starts=np.array([0, size], i32),
        context_lens=np.array([size], i32),
        block_tables=np.arange(-(-size // BLOCK_SIZE), dtype=i32)[None],
        logit_rows=np.array([size - 1], i32),
    )


@pytest.mark.parametrize(
    "which, dtype", [(which, dtype) for which, dtypes in DTYPES.items() for dtype in dtypes]
)
def test_rows_are_the_bytes_of_a_block_and_the_arena_itself(which, dtype):
    own = backend(which)
    kv = own.allocate_kv(5, BLOCK_SIZE, dtype)
    own.run(prompt(3 * BLOCK_SIZE), kv)
    rows = own.block_rows(kv)
    assert len(rows) == len(model()[0].kv)
    sizes = [array.shape[1] for layer in rows for array in layer]
    out = np.empty((3, sum(sizes)), np.uint8)
    own.export_blocks(kv, (0, 1, 2), out)
    assert out.any()
    other = own.allocate_kv(7, BLOCK_SIZE, dtype)
    for theirs, ours in zip(own.block_rows(other), rows, strict=True):
        for to_array, array in zip(theirs, ours, strict=True):
            assert array.flags.c_contiguous and array.shape[0] == 5
            to_array[[6, 2, 4]] = array[[0, 1, 2]]
    moved = np.empty_like(out)
    own.export_blocks(other, (6, 2, 4), moved)
    assert np.array_equal(moved, out)


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_steps_and_layers_are_counted(which):
    own = backend(which)
    num_layers = len(model()[0].kv)
    assert own.layers_done == LayersDone(0, 0)
    kv = own.allocate_kv(2, BLOCK_SIZE, "float32")
    own.run(prompt(5), kv)
    own.run(prompt(1), kv)
    assert own.layers_done == LayersDone(2, num_layers)
    own.look_deviation(prompt(3)._replace(logit_rows=np.empty(0, np.int32)), kv)
    assert own.layers_done == LayersDone(3, 2)  # and no further
    if which == "cpu":
        with pytest.raises(ValueError):
            own.run(prompt(5)._replace(slots=np.arange(90, 95, dtype=np.int32)), kv)
        assert own.layers_done == LayersDone(3, 2)


def test_a_layer_that_is_done_stays_as_it_is(monkeypatch):
    own = backend("reference")
    kv = own.allocate_kv(2, BLOCK_SIZE, "float32")
    rows = own.block_rows(kv)
    seen: dict[int, bytes] = {}

    def look() -> None:
        for layer in range(len(seen), own.layers_done.layers):
            seen[layer] = rows[layer][0].tobytes()

    compute = reference.compute_with_others

    def between_looks(op, run, member):
        look()
        compute(op, run, member)
        look()

    monkeypatch.setattr(reference, "compute_with_others", between_looks)
    own.run(prompt(20), kv)
    look()
    assert seen == {layer: arrays[0].tobytes() for layer, arrays in enumerate(rows)}


@pytest.mark.parametrize("num_tokens", [1, 3, 61, 200])
def test_a_layer_that_is_done_is_seen_by_another_thread(num_tokens):
    """Which copies each as soon as it is told, while the next ones are computed."""
    own = backend("cpu")
    num_layers = len(model()[0].kv)
    kv = own.allocate_kv(13, BLOCK_SIZE, "float32")
    (rows,) = zip(*own.block_rows(kv), strict=True)
    for number in range(1, 21):
        for array in rows:
            array[:] = 255
        seen: list[bytes] = []

        def look(number: int = number, seen: list[bytes] = seen) -> None:
            while len(seen) < num_layers:
                done = own.layers_done
                if done.step == number:
                    for layer in range(len(seen), done.layers):
                        seen.append(rows[layer].tobytes())

        thread = Thread(target=look)
        thread.start()
        own.run(prompt(num_tokens), kv)
        thread.join()
        assert seen == [array.tobytes() for array in rows]
