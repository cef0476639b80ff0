"""What is compiled for the native backend computes the same numbers, operation by operation."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import pytest
from backends.plan_in_numpy import compiled
from oracle.cases import CASES, Case, prompts
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint
from program.operations import every_operation

from duetto.backends.cpu.compile import _ABSORBED, _BEFORE, _EMIT
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.checkpoints.shapes import SHAPES
from duetto.core.errors import ConfigError
from duetto.models.programs import load_program
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.op import Kind
from duetto.program.ops import Add, EmbedPart, GatedAct, Linear, Op, Ref, RmsNorm, SelectRows
from duetto.program.program import Program
from duetto.program.rewrites.fuse import FusedLinear, fuse


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_compiled_program_has_every_operation_and_the_same_bits(case: Case) -> None:
    with TemporaryDirectory() as name:
        write_checkpoint(case, Path(name))
        _, program = load_program(Path(name), case.max_model_len)
        weights = load_weights(Path(name), program, "float32")
    made, num_fused = compiled(program)
    assert Counter(map(type, made.ops)) == Counter(map(type, program.ops))
    layers = len(program.kv)
    assert num_fused == 3 * layers + 1  # two norms and the activation; the last norm
    for run, want in zip(
        *(
            Feed(ReferenceBackend(p, weights), 2).in_chunks([prompts()[2], prompts()[1]], 10**6)
            for p in (made, program)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(run, want)


def test_buffers_that_fusing_leaves_unused_are_not_made(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.2-1b"]))
    program = load_program(tmp_path)[1]
    before = sum(program.buffers.values())
    made, num_fused = compiled(program)
    scratch = num_fused  # of the stand-in, that a plan does not have
    assert len(made.buffers) - scratch == len(program.buffers) - 3
    assert before - (2 * 2048 + 8192) > 0


def test_every_operation_is_emitted() -> None:
    of_ranks = {EmbedPart, AllReduce, AllGather}
    assert set(_EMIT) == every_operation() | of_ranks | {FusedLinear}
    assert set(_ABSORBED) == set(_BEFORE)


def test_an_operation_from_the_future_is_named() -> None:
    @dataclass(frozen=True)
    class Mamba(Op):
        x: Ref

        kind: ClassVar[Kind] = "attention"

        @property
        def reads(self) -> tuple[Ref, ...]:
            return (self.x,)

        @property
        def writes(self) -> tuple[Ref, ...]:
            return (self.x,)

    with pytest.raises(ConfigError, match=r"--backend cpu: .*Mamba.*--backend reference"):
        compiled(program_of([Mamba(X)], X))


X, NORMED, WIDE, ACTED, OUT = (
    Ref("x", 0, 8),
    Ref("normed", 0, 8),
    Ref("wide", 0, 16),
    Ref("acted", 0, 8),
    Ref("out", 0, 8),
)
NORM = RmsNorm(X, NORMED, "n", 1e-5, 8)
ACT = GatedAct(WIDE, ACTED, "silu")
PROJECT = Linear(NORMED, OUT, "w")
ELSEWHERE = Ref("elsewhere", 0, 8)


def program_of(ops: list[Op], result: Ref) -> Program:
    buffers = {"x": 8, "normed": 8, "wide": 16, "acted": 8, "out": 8, "elsewhere": 8}
    return Program(tuple(ops), {}, buffers, (), result, 1)


def fused(ops: list[Op], result: Ref = OUT) -> list[Op]:
    return list(fuse(program_of(ops, result), _ABSORBED).ops)


NOT_FUSED: dict[str, list[Op]] = {
    "a norm of heads": [RmsNorm(X, NORMED, "n", 1e-5, 4), PROJECT],
    "another operation reads it too": [NORM, PROJECT, Add(NORMED, X, X)],
    "another reads a part of it": [NORM, PROJECT, Add(Ref("normed", 4, 4), Ref("x", 0, 4), X)],
    "the projection reads a part": [NORM, Linear(Ref("normed", 0, 4), OUT, "w")],
    "its input is overwritten before": [NORM, Add(ELSEWHERE, ELSEWHERE, X), PROJECT],
    "a part of the input is overwritten": [
        NORM,
        Add(Ref("elsewhere", 0, 2), Ref("elsewhere", 0, 2), Ref("x", 6, 2)),
        PROJECT,
    ],
    "the projection writes its input": [NORM, Linear(NORMED, X, "w")],
    "the projection adds to its input": [NORM, Linear(NORMED, X, "w", accumulate=True)],
    "a part of it is overwritten": [NORM, Add(X, X, Ref("normed", 0, 4)), PROJECT],
    "it is the result": [NORM, Linear(NORMED, ELSEWHERE, "w")],
    "nobody reads it": [NORM, SelectRows(X, OUT)],
    "two projections read an activation": [
        ACT,
        Linear(ACTED, OUT, "w"),
        Linear(ACTED, ELSEWHERE, "w"),
    ],
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_must_not_be_fused_is_not(name: str) -> None:
    ops = NOT_FUSED[name]
    result = NORMED if name == "it is the result" else OUT
    assert fused(ops, result) == ops


def test_several_projections_may_make_the_same_norm() -> None:
    again = Linear(NORMED, ELSEWHERE, "v")
    overwrite = Add(X, X, NORMED)
    ops: list[Op] = [NORM, PROJECT, again, overwrite, Add(NORMED, X, X)]
    assert fused(ops) == [FusedLinear(NORM, PROJECT), FusedLinear(NORM, again), *ops[3:]]


def test_equal_operations_in_two_places_are_told_apart() -> None:
    ops: list[Op] = [NORM, PROJECT, NORM, SelectRows(NORMED, OUT)]
    assert fused(ops) == [FusedLinear(NORM, PROJECT), NORM, ops[3]]
