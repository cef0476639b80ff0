"""Bit for bit the same, whatever else is in the step: each operation's rows, and whole models."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from oracle.cases import CASES_BY_NAME, VOCAB_SIZE
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint

from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.ops import gelu_tanh, multiply_rows, silu
from duetto.checkpoints.checkpoint import load_weights
from duetto.models.programs import load_program

CASES = ("llama-mqa", "llama-mha", "llama-head-dim", "qwen2-window", "gemma2", "gemma3_text")


@cache
def backend(name: str) -> ReferenceBackend:
    case = CASES_BY_NAME[name]
    with TemporaryDirectory() as directory:
        write_checkpoint(case, Path(directory))
        _, program = load_program(Path(directory), case.max_model_len)
        return ReferenceBackend(program, load_weights(Path(directory), program, "float32"))


def prompt(length: int, seed: int) -> list[int]:
    return np.random.RandomState(seed).randint(0, VOCAB_SIZE, length).tolist()


@pytest.mark.parametrize(("k", "n"), [(1, 1), (19, 99), (64, 64), (99, 19), (896, 300)])
def test_a_row_of_a_product_depends_on_nothing_but_itself(k: int, n: int) -> None:
    random = np.random.RandomState(k)
    weight = random.standard_normal((n, k)).astype(np.float32)
    x = random.standard_normal((99, k)).astype(np.float32)
    whole = multiply_rows(x, weight)
    for rows in (1, 2, 19):
        for start in range(0, 99 - rows, 7):
            part = multiply_rows(x[start : start + rows], weight)  # another address, too
            np.testing.assert_array_equal(part, whole[start : start + rows])
    strided = np.zeros((99, k + 13), np.float32)
    strided[:, 5 : 5 + k] = x
    np.testing.assert_array_equal(multiply_rows(strided[:, 5 : 5 + k], weight), whole)


@pytest.mark.parametrize("function", [silu, gelu_tanh, np.exp, np.tanh])
def test_an_elementwise_result_does_not_depend_on_its_place(function: np.ufunc) -> None:
    x = np.random.RandomState(0).uniform(-9, 9, 1999).astype(np.float32)
    whole = function(x)
    for start in range(40):
        for length in (1, 3, 7, 16, 99):
            part = function(np.array(x[start : start + length]))
            np.testing.assert_array_equal(part, whole[start : start + length])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 19, 99])
def test_alone_and_in_company(name: str, length: int) -> None:
    mine = prompt(length, seed=1)
    [alone] = Feed(backend(name), 1).in_chunks([mine], 10**6)
    others = [prompt(5, 2), prompt(120, 3), prompt(1, 4)]
    for place in range(4):
        batch = [*others[:place], mine, *others[place:]]
        together = Feed(backend(name), 4).in_chunks(batch, 10**6)
        np.testing.assert_array_equal(together[place], alone)


@pytest.mark.parametrize("name", CASES)
def test_uneven_chunks_beside_others(name: str) -> None:
    mine, other = prompt(99, seed=1), prompt(200, seed=2)
    [alone] = Feed(backend(name), 1).in_chunks([mine], 10**6)
    feed, parts = Feed(backend(name), 2), []
    for chunk in (1, 2, 31, 1, 17, 40, 7):
        past = feed.past[0]
        start = feed.past[1]
        step = {1: other[start : start + 11], 0: mine[past : past + chunk]}
        parts.append(feed.step(step)[0])
    np.testing.assert_array_equal(np.concatenate(parts), alone)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8", "fp8"])
def test_chunks_with_a_narrow_cache(kv_dtype: str) -> None:
    """A step reads back even its own keys as they are stored, so chunks cannot show."""
    prompts = [prompt(99, 1), prompt(33, 2)]
    whole = Feed(backend("llama-mqa"), 2, kv_dtype).in_chunks(prompts, 10**6)
    exact = Feed(backend("llama-mqa"), 2).in_chunks(prompts, 10**6)
    chunked = Feed(backend("llama-mqa"), 2, kv_dtype).in_chunks(prompts, 7)
    for got, want, fp32 in zip(chunked, whole, exact, strict=True):
        np.testing.assert_array_equal(got, want)
        # It is narrow, and near: fp8 keeps three bits after the first.
        assert 0 < np.abs(want - fp32).max() < (1 if kv_dtype == "fp8" else 0.5)


def test_selected_rows_are_the_rows_of_all() -> None:
    mine = prompt(40, seed=1)
    everything = Feed(backend("gemma2"), 1).step({0: mine})[0]
    last = Feed(backend("gemma2"), 1).step({0: mine}, last_row_only=True)[0]
    np.testing.assert_array_equal(last, everything[-1:])


def test_a_step_that_wants_no_logits() -> None:
    feed = Feed(backend("qwen2-window"), 1)
    mine = prompt(40, seed=1)
    arrays = feed._arrays({0: mine[:20]}, np.zeros(0, np.int64))
    assert feed.backend.run(arrays, feed._kv).shape == (0, VOCAB_SIZE)
    feed.past[0] = 20
    [whole] = Feed(backend("qwen2-window"), 1).in_chunks([mine], 10**6)
    np.testing.assert_array_equal(feed.step({0: mine[20:]})[0], whole[20:])
