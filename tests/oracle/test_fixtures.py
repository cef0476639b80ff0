"""What transformers computed for each model type and variant, against the reference backend.

Needs neither torch nor transformers: see fixture_io.py. test_live.py compares live.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from oracle.cases import CASES, CASES_BY_NAME, NUM_GREEDY, Case
from oracle.feed import Feed, greedy
from oracle.fixture_io import FIXTURES, Expected, expected, write_checkpoint

from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.checkpoints.config import MODEL_TYPES
from duetto.models.programs import load_program
from duetto.program.ops import (
    Attention,
    Embed,
    GatedAct,
    Linear,
    Op,
    RmsNorm,
    Rope,
    RopeSpec,
    SoftCap,
)
from duetto.program.program import Program

TOLERANCE = 1e-4  # both compute in fp32, in other orders; logits are of size 4

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def backend(case: Case) -> ReferenceBackend:
    return changed_backend(case, lambda program: program)


def changed_backend(case: Case, change: Callable[[Program], Program]) -> ReferenceBackend:
    with TemporaryDirectory() as name:
        write_checkpoint(case, Path(name))
        _, program = load_program(Path(name), case.max_model_len)
        weights = load_weights(Path(name), program, "float32")
    return ReferenceBackend(change(program), weights)


@cache
def whole(case: Case) -> list[np.ndarray]:
    """Logits of every token of every prompt, computed in one step."""
    prompts = expected(case).prompts
    return Feed(backend(case), len(prompts)).in_chunks(prompts, chunk=10**6)


def largest_difference(logits: list[np.ndarray], want: Expected) -> float:
    last = np.stack([rows[-1] for rows in logits])
    return float(np.abs(last - want.last_logits).max())


@cases
def test_one_batch_of_mixed_lengths(case: Case) -> None:
    assert largest_difference(whole(case), expected(case)) <= TOLERANCE


@cases
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_same_bits(case: Case, chunk: int) -> None:
    prompts = expected(case).prompts
    chunked = Feed(backend(case), len(prompts)).in_chunks(prompts, chunk)
    for got, want in zip(chunked, whole(case), strict=True):
        np.testing.assert_array_equal(got, want)


@cases
def test_greedy_tokens(case: Case) -> None:
    want = expected(case)
    feed = Feed(backend(case), len(want.prompts))
    last = [rows[-1] for rows in feed.in_chunks(want.prompts, 64)]
    assert greedy(feed, last, NUM_GREEDY) == want.greedy


def each(kind: type, /, **changes: object) -> Callable[[Program], Program]:
    """A fault: every operation of one kind is changed."""

    def change(program: Program) -> Program:
        ops: list[Op] = [
            dataclasses.replace(op, **changes) if isinstance(op, kind) else op for op in program.ops
        ]
        assert ops != list(program.ops), "this fault changes nothing"
        return dataclasses.replace(program, ops=tuple(ops))

    return change


def without(kind: type) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        ops = tuple(op for op in program.ops if not isinstance(op, kind))
        assert len(ops) < len(program.ops), "this fault changes nothing"
        return dataclasses.replace(program, ops=ops)

    return change


def without_rope_scale(program: Program) -> Program:
    ops = tuple(
        dataclasses.replace(op, spec=dataclasses.replace(op.spec, scale=1.0))
        if isinstance(op, Rope)
        else op
        for op in program.ops
    )
    assert ops != program.ops
    return dataclasses.replace(program, ops=ops)


def without_interpolation(program: Program) -> Program:
    plain = tuple(10_000.0 ** (-i / 8) for i in range(8))
    return each(Rope, spec=RopeSpec(plain))(program)


def one_rope(program: Program) -> Program:
    first = next(op.spec for op in program.ops if isinstance(op, Rope))
    return each(Rope, spec=first)(program)


def without_head_norms(program: Program) -> Program:
    hidden = program.buffers["hidden"]
    ops = tuple(op for op in program.ops if not (isinstance(op, RmsNorm) and op.group < hidden))
    assert len(ops) < len(program.ops)
    return dataclasses.replace(program, ops=ops)


FAULTS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "no rope": ("llama", without(Rope)),
    "other activation": ("llama", each(GatedAct, act="gelu_tanh")),
    "no bias": ("llama-biases", each(Linear, bias=None)),
    "no qkv bias": ("qwen2", each(Linear, bias=None)),
    "window one short": ("mistral-window", each(Attention, window=47)),
    "window one long": ("mistral-window", each(Attention, window=49)),
    "window on full layers": ("qwen2-window", each(Attention, window=48)),
    "no window at all": ("gemma2", each(Attention, window=None)),
    "no head norms": ("qwen3", without_head_norms),
    "no position interpolation": ("llama-linear", without_interpolation),
    "no yarn attention factor": ("llama-yarn", without_rope_scale),
    "no longrope attention factor": ("phi3-longrope-long", without_rope_scale),
    "no score cap": ("gemma2", each(Attention, softcap=None)),
    "no logit cap": ("gemma2", without(SoftCap)),
    "norm weights as stored": ("gemma2", each(RmsNorm, offset=0.0)),
    "embeddings not scaled": ("gemma2", each(Embed, scale=1.0)),
    "one rope for all layers": ("gemma3_text", one_rope),
    "scale by head_dim": ("gemma3_text", each(Attention, scale=24**-0.5)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str) -> None:
    """The fixtures reach what they are there for: each of these faults is seen in them."""
    name, change = FAULTS[fault]
    case = CASES_BY_NAME[name]
    want = expected(case)
    feed = Feed(changed_backend(case, change), len(want.prompts))
    assert largest_difference(feed.in_chunks(want.prompts, 10**6), want) > 10 * TOLERANCE


def test_every_model_type_has_a_case_and_every_case_a_fixture() -> None:
    assert {case.model_type for case in CASES} == set(MODEL_TYPES)
    assert {file.stem for file in FIXTURES.iterdir()} == {case.name for case in CASES}


def test_fixtures_stay_small() -> None:
    assert sum(file.stat().st_size for file in FIXTURES.iterdir()) < 300_000
