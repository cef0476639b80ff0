"""The native backend's logits: against transformers' in fp32, against the reference in the rest."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from native import cpu_backend
from numpy.typing import NDArray
from oracle.cases import CASES, CASES_BY_NAME, NUM_GREEDY, VOCAB_SIZE, Case, prompts
from oracle.feed import Feed, greedy
from oracle.fixture_io import expected, write_checkpoint

from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import Weights, load_weights
from duetto.models.programs import load_program
from duetto.program.program import Program

TOLERANCE = 1e-4  # all compute in fp32, in other orders; logits are of size 4
ISAS = native.isas()

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def loaded(case: Case, dtype: Any = "float32") -> tuple[Program, Weights]:
    with TemporaryDirectory() as name:
        write_checkpoint(case, Path(name))
        _, program = load_program(Path(name), case.max_model_len)
        return program, load_weights(Path(name), program, dtype)


def logits(backend: Any, kv_dtype: str = "float32") -> list[NDArray[np.float32]]:
    return Feed(backend, len(prompts()), kv_dtype).in_chunks(prompts(), 10**6)


@cases
@isas
def test_fp32_is_what_transformers_computed(case: Case, isa: str) -> None:
    last = np.stack([rows[-1] for rows in logits(cpu_backend(*loaded(case), isa=isa))])
    assert np.abs(last - expected(case).last_logits).max() <= TOLERANCE


@cases
def test_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    want = expected(case)
    feed = Feed(cpu_backend(*loaded(case)), len(want.prompts))
    last = [rows[-1] for rows in feed.in_chunks(want.prompts, 64)]
    assert greedy(feed, last, NUM_GREEDY) == want.greedy


@cases
def test_every_row_in_fp32_is_the_references(case: Case) -> None:
    program, weights = loaded(case)
    got = logits(cpu_backend(program, weights))
    want = logits(ReferenceBackend(program, weights))
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=TOLERANCE)


def divergence(mine: list[Any], exact: list[Any]) -> tuple[float, float]:
    """Mean KL to the exact distributions in nats, and how often the likeliest token is the same."""
    p, q = (log_softmax(np.concatenate(rows).astype(np.float64)) for rows in (exact, mine))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    return float(kl.mean()), float((p.argmax(-1) == q.argmax(-1)).mean())


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# Mean KL and top-1 agreement on models of random weights, 64 wide: a wider or a trained model does
# far better, as errors even out and likeliest tokens stand clear. Twice what is measured.
LIMITS = {
    ("bfloat16", None, "bfloat16"): (0.001, 0.97),
    ("float32", None, "float16"): (1e-5, 0.99),
    ("float32", None, "int8"): (0.005, 0.9),
    ("float32", "int8", "float32"): (0.005, 0.9),
    ("float32", "int4", "float32"): (0.3, 0.5),
}


@isas
@pytest.mark.parametrize("kind", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "llama-tied"])
def test_narrow_formats_stay_near_the_exact_model(name: str, kind: Any, isa: str) -> None:
    dtype, quantization, kv_dtype = kind
    program, weights = loaded(CASES_BY_NAME[name], dtype)
    mine = logits(cpu_backend(program, weights, quantization, isa=isa), kv_dtype)
    kl, agreement = divergence(mine, exact(name, dtype))
    most, least = LIMITS[kind]
    assert 0 < kl < most
    assert agreement > least


@cache
def exact(name: str, dtype: str) -> list[NDArray[np.float32]]:
    return logits(ReferenceBackend(*loaded(CASES_BY_NAME[name], dtype)))


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8"])
def test_a_narrow_cache_is_as_narrow_as_the_references(kv_dtype: str) -> None:
    """The slow twin rounds to the same numbers, so what is left is fp32's order of adding up.

    Nearly: a number that fp32 puts on the other side of a rounding border is one step away.
    """
    program, weights = loaded(CASES_BY_NAME["llama-mqa"])
    mine = logits(cpu_backend(program, weights), kv_dtype)
    twin = logits(ReferenceBackend(program, weights), kv_dtype)
    whole = logits(ReferenceBackend(program, weights))
    apart = divergence(mine, twin)[0]
    assert apart < divergence(twin, whole)[0] / 4


AWKWARD = [  # hidden, heads, KV heads, head_dim, intermediate, vocabulary
    (33, 3, 1, 6, 50, 51),
    (8, 1, 1, 2, 3, 5),
    (100, 5, 5, 20, 111, 499),
    (96, 12, 2, 8, 99, 65),
    (64, 2, 1, 256, 64, 64),
]


@isas
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_no_dimension_needs_to_be_round(shape: tuple[int, ...], isa: str, tmp_path: Path) -> None:
    hidden, heads, kv_heads, head_dim, intermediate, vocabulary = shape
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    program, random = load_program(tmp_path)[1], np.random.default_rng(0)
    weights = {
        name: (random.standard_normal(spec.shape) / spec.shape[-1] ** 0.5).astype(np.float32)
        for name, spec in program.weights.items()
    }
    texts = [random.integers(0, vocabulary, length).tolist() for length in (1, 19, 99)]

    def rows(backend: Any) -> NDArray[np.float32]:
        return np.concatenate(Feed(backend, 3).in_chunks(texts, 10**6))

    want = rows(ReferenceBackend(program, weights))
    np.testing.assert_allclose(rows(cpu_backend(program, weights, isa=isa)), want, atol=1e-5)
    for quantization in ("int8", "int4"):
        assert np.isfinite(rows(cpu_backend(program, weights, quantization, isa=isa))).all()


def test_a_step_that_wants_no_logits() -> None:
    feed = Feed(cpu_backend(*loaded(CASES_BY_NAME["gemma2"])), 1)
    arrays = feed._arrays({0: prompts()[4]}, np.zeros(0, np.int64))
    assert feed.backend.run(arrays, feed._kv).shape == (0, VOCAB_SIZE)
