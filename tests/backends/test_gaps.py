"""Positions with gaps: tokens of a prompt computed again, some of them, are the same bits again."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from native import pack, pool
from oracle.cases import CASES_BY_NAME, VOCAB_SIZE
from oracle.fixture_io import write_checkpoint

from duetto.backends.backend import Backend, FloatArray
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.sampling_params import SamplingParams
from duetto.models.programs import load_program
from duetto.program.dtype import KVDtype
from duetto.runner.step_arrays import build_step_arrays

BLOCK_SIZE = 16
LENGTH = 99
SAMPLED = (SamplingInput(SamplingParams(), seed=0, num_output_tokens=0),)
CASES = ("llama-mqa", "gemma2", "qwen2-window")
# First tokens, ends of blocks, single ones and runs; the last token gives the logits.
POSITIONS = (0, 1, 15, 16, 17, 40, 63, 64, 70, 71, 72, 97, 98)


@cache
def backend(case: str, which: str) -> Backend:
    with TemporaryDirectory() as name:
        write_checkpoint(CASES_BY_NAME[case], Path(name))
        _, program = load_program(Path(name))
        weights = load_weights(Path(name), program, "float32")
    if which == "reference":
        return ReferenceBackend(program, weights)
    return CpuBackend(program, pack(program, weights, None), pool(2), which)


def tokens(seed: int) -> list[int]:
    return np.random.RandomState(seed).randint(0, VOCAB_SIZE, LENGTH).tolist()


def run(backend: Backend, kv: Any, *requests: ScheduledRequest) -> FloatArray:
    step, _ = build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)
    return backend.run(step, kv)


def whole(name: str, first_block: int) -> ScheduledRequest:
    table = tuple(range(first_block, first_block + 7))
    return ScheduledRequest(name, tuple(tokens(first_block)), 0, table, SAMPLED)


def part(request: ScheduledRequest, positions: tuple[int, ...]) -> ScheduledRequest:
    ids = tuple([request.token_ids[p] for p in positions])
    return request._replace(token_ids=ids, num_computed_tokens=positions[0], positions=positions)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["reference", *native.isas()])
def test_what_is_computed_again_with_gaps_is_the_same(
    which: str, case: str, kv_dtype: KVDtype
) -> None:
    own = backend(case, which)
    kv = own.allocate_kv(20, BLOCK_SIZE, kv_dtype)
    mine, other = whole("mine", 3), whole("other", 11)
    [expected] = run(own, kv, mine)
    run(own, kv, other)
    for positions in (POSITIONS, (*POSITIONS[1::2], 98), (98,)):
        again = part(mine, tuple(dict.fromkeys(positions)))
        [alone] = run(own, kv, again)
        np.testing.assert_array_equal(alone, expected)
        beside = run(own, kv, part(other, (2, 9, 31, 98)), again)
        np.testing.assert_array_equal(beside[1], expected)
    [after] = run(own, kv, mine)  # nothing else was written
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("which", ["reference", *native.isas()])
def test_a_token_sees_what_its_step_wrote_before_it(which: str) -> None:
    """KV that is wrong at some positions is right once they are computed: in one step, each run
    reading what those before it have just written."""
    own = backend("llama-mqa", which)
    kv = own.allocate_kv(20, BLOCK_SIZE, "float32")
    mine = whole("mine", 3)
    [expected] = run(own, kv, mine)
    wrong = list(mine.token_ids)
    for position in (20, 50):
        wrong[position] = (wrong[position] + 1) % VOCAB_SIZE
    [spoiled] = run(own, kv, mine._replace(token_ids=tuple(wrong)))
    assert not np.array_equal(spoiled, expected)
    # All that follows the first wrong token depends on it; what comes before it does not.
    right = tuple(range(20, LENGTH))
    [some] = run(own, kv, part(mine, (0, 5, *right)))
    np.testing.assert_array_equal(some, expected)
