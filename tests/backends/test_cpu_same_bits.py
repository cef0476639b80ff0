"""The native backend, bit for bit: any batch, any chunks, any number of threads, each kernel set.

tests/test_same_answer.py has the engine's side (cache, preemption, policies). Here steps are made
by hand and drawn at random, over contexts that attention splits (kSplit is 512 positions).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import pack, pool
from numpy.typing import NDArray
from oracle.cases import CASES_BY_NAME, VOCAB_SIZE
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.checkpoints.checkpoint import load_weights
from duetto.models.programs import load_program

THREADS = (1, 2, 3)
LENGTHS = (1, 19, 99, 530, 1100)
MAX_TOKENS = max(LENGTHS)


@dataclass(frozen=True)
class Kind:
    case: str
    dtype: Any
    quantization: Any
    kv_dtype: str

    def __str__(self) -> str:
        return f"{self.case}, {self.dtype}, {self.quantization}, KV {self.kv_dtype}"


KINDS = (
    Kind("llama-mqa", "bfloat16", None, "bfloat16"),
    Kind("llama-head-dim", "float32", None, "float32"),
    Kind("gemma2", "float32", "int8", "int8"),
    Kind("qwen2-window", "bfloat16", "int4", "float16"),
)
each = pytest.mark.parametrize("isa", native.isas())
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@cache
def backend(kind: Kind, isa: str, threads: int) -> CpuBackend:
    program, packed = packed_model(kind)
    return CpuBackend(program, packed, pool(threads), isa)


@cache
def packed_model(kind: Kind) -> Any:
    with TemporaryDirectory() as name:
        write_checkpoint(CASES_BY_NAME[kind.case], Path(name))
        _, program = load_program(Path(name))
        weights = load_weights(Path(name), program, kind.dtype)
    return program, pack(program, weights, kind.quantization)


def prompt(length: int) -> list[int]:
    return np.random.RandomState(length).randint(0, VOCAB_SIZE, length).tolist()


@cache
def alone(kind: Kind, isa: str, length: int) -> NDArray[np.float32]:
    """Every row's logits, whole, by itself, on one thread."""
    feed = Feed(backend(kind, isa, 1), 1, kind.kv_dtype, MAX_TOKENS)
    [rows] = feed.in_chunks([prompt(length)], 10**6)
    return rows


chunks = st.sampled_from([1, 1, 2, 5, 8, 9, 32, 64, 300, 512, 1100])
steps = st.lists(  # of each step: per request, how many tokens, if it takes part at all
    st.lists(st.one_of(st.just(0), chunks), min_size=4, max_size=4), min_size=1, max_size=8
)


@each
@kinds
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    steps=steps,
    threads=st.sampled_from(THREADS),
)
def test_any_steps_give_the_bits_of_each_request_alone(
    isa: str, kind: Kind, lengths: list[int], order: list[int], steps: Any, threads: int
) -> None:
    feed = Feed(backend(kind, isa, threads), 4, kind.kv_dtype, MAX_TOKENS)
    prompts = [prompt(length) for length in lengths]
    found: list[list[Any]] = [[] for _ in prompts]
    for sizes in [*steps, [MAX_TOKENS] * 4]:  # the last step takes what is left
        batch = {
            request: prompts[request][feed.past[request] : feed.past[request] + sizes[request]]
            for request in order
            if sizes[request] and feed.past[request] < lengths[request]
        }
        if batch:
            for request, rows in feed.step(batch).items():
                found[request].append(rows)
    for request, length in enumerate(lengths):
        np.testing.assert_array_equal(np.concatenate(found[request]), alone(kind, isa, length))


@each
@kinds
@pytest.mark.parametrize("threads", THREADS)
def test_token_by_token(isa: str, kind: Kind, threads: int) -> None:
    """Decodes around the first split's end read what whole prompts read."""
    feed = Feed(backend(kind, isa, threads), 1, kind.kv_dtype, MAX_TOKENS)
    tokens = prompt(530)
    rows = [feed.step({0: tokens[:505]})[0]]
    rows += [feed.step({0: [token]})[0] for token in tokens[505:]]
    np.testing.assert_array_equal(np.concatenate(rows), alone(kind, isa, 530))


@kinds
def test_selected_rows_are_the_rows_of_all(kind: Kind) -> None:
    isa = native.choose_isa(None)
    feed = Feed(backend(kind, isa, 2), 2, kind.kv_dtype, MAX_TOKENS)
    last = feed.step({1: prompt(99), 0: prompt(19)}, last_row_only=True)
    np.testing.assert_array_equal(last[0], alone(kind, isa, 19)[-1:])
    np.testing.assert_array_equal(last[1], alone(kind, isa, 99)[-1:])
