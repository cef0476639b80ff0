"""All ranks of a sharded program together compute what the whole one does."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from oracle.cases import CASES, CASES_BY_NAME, Case
from program.rewrites.models import logits, odd, of_case, with_op

from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.ranks import ReferenceRanks
from duetto.core.errors import ConfigError
from duetto.program.collectives import AllReduce
from duetto.program.op import Kind, Op, Ref
from duetto.program.ops import Add, GatedAct, Linear, RmsNorm, SoftCap
from duetto.program.program import Program
from duetto.program.rewrites.shard import possible_degrees, shard
from duetto.program.shape import BatchShape, Cost, Precision

# Sums over ranks add the same fp32 products in another order; logits are of the size of 1.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def ranks_of(program: Program, ranks: int) -> list[Program]:
    return [shard(program, ranks, rank) for rank in range(ranks)]


def assert_same(program: Program, weights: object, ranks: int) -> None:
    whole = logits(ReferenceBackend(program, weights))
    cut = logits(ReferenceRanks(ranks_of(program, ranks), weights))
    np.testing.assert_allclose(cut, whole, **TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_compute_what_the_whole_does(case: Case, ranks: int) -> None:
    program, weights = of_case(case)
    if ranks in possible_degrees(program):
        assert_same(program, weights, ranks)
    else:
        with pytest.raises(ConfigError, match=f"--tp: {ranks} does not divide the model's heads"):
            shard(program, ranks)


def test_most_cases_can_be_cut() -> None:
    """So that the test above compares something."""
    degrees = [possible_degrees(of_case(case)[0]) for case in CASES]
    assert all(2 in one for one in degrees)
    assert all(4 in one for one in degrees)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 12])
def test_widths_that_the_ranks_do_not_divide(ranks: int, kv_heads: int) -> None:
    program, weights = odd(num_key_value_heads=kv_heads)
    if ranks in possible_degrees(program):
        assert_same(program, weights, ranks)
    else:
        assert kv_heads % ranks and ranks % kv_heads


def test_one_rank_is_the_program() -> None:
    program, _ = odd()
    assert shard(program, 1) is program


def test_a_rank_has_its_part_of_buffers_weights_and_kv() -> None:
    program, _ = odd()  # 12 heads and 4 KV heads of 4, an MLP of 31, 41 tokens
    first, *_, last = ranks_of(program, 4)
    assert (first.buffers["qkv"], first.buffers["gate_up"]) == (12 + 2 * 4, 2 * 8)
    assert (last.buffers["qkv"], last.buffers["gate_up"]) == (12 + 2 * 4, 2 * 7)
    assert first.buffers["hidden"] == program.buffers["hidden"]
    assert [layer.num_kv_heads for layer in first.kv] == [1, 1, 1]
    qkv = last.parts["model.layers.0.self_attn.q_proj.weight"]
    assert qkv.rows == ((36, 12), (48 + 12, 4), (48 + 16 + 12, 4))
    assert last.parts["model.layers.0.mlp.down_proj.weight"].columns == ((24, 7),)
    assert last.parts["model.embed_tokens.weight"].rows == ((33, 8),)
    assert "model.norm.weight" not in first.parts  # every rank has all of it


def test_parts_of_all_ranks_are_the_weight() -> None:
    program, _ = odd()
    cut = ranks_of(program, 4)
    for name, spec in program.weights.items():
        parts = [rank.parts[name] for rank in cut if name in rank.parts]
        if not parts or name not in cut[-1].weights:
            continue
        axis = 0 if parts[0].rows is not None else 1
        spans = [span for part in parts for span in (part.rows or part.columns or ())]
        numbers = sorted(n for start, width in spans for n in range(start, start + width))
        assert numbers == list(range(spec.shape[axis])), name


def test_the_first_rank_alone_adds_what_is_added_once() -> None:
    program, _ = odd()
    first, second = ranks_of(program, 2)
    for one, other in zip(first.ops, second.ops, strict=True):
        assert type(one) is type(other)
    sums = [
        (op, rank)
        for rank in (first, second)
        for op, behind in zip(rank.ops, rank.ops[1:], strict=False)
        if isinstance(op, Linear) and isinstance(behind, AllReduce)
    ]
    assert len(sums) == 2 * 2 * 3
    assert all((op.bias is not None) == op.accumulate == (rank is first) for op, rank in sums)


@pytest.mark.parametrize("fault", ["bias on every rank", "sum left out", "stream on every rank"])
def test_a_planted_fault_shows(fault: str) -> None:
    program, weights = odd()
    cut = ranks_of(program, 2)
    if fault == "sum left out":
        place = max(n for n, op in enumerate(cut[0].ops) if isinstance(op, AllReduce))
        cut = [replace(one, ops=one.ops[:place] + one.ops[place + 1 :]) for one in cut]
    else:
        field = "bias" if fault == "bias on every rank" else "accumulate"
        ops = [
            replace(own, **{field: getattr(first, field)}) if isinstance(own, Linear) else own
            for own, first in zip(cut[1].ops, cut[0].ops, strict=True)
        ]
        cut = [cut[0], replace(cut[1], ops=tuple(ops), **_same_weights(cut[0], cut[1]))]
    whole = logits(ReferenceBackend(program, weights))
    wrong = logits(ReferenceRanks(cut, weights))
    assert not np.allclose(wrong, whole, **TOLERANCE)


def _same_weights(first: Program, second: Program) -> dict[str, object]:
    return {"weights": {**first.weights, **second.weights}}


# --- what cannot be cut ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Softmax(Op):
    """Over all columns: no rank can compute it from its own."""

    x: Ref

    kind: ClassVar[Kind] = "activation"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.x,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return Cost(0, 0, 0)


ACTIVATED, GATE_UP, HIDDEN = Ref("activated", 0, 31), Ref("gate_up", 0, 62), Ref("hidden", 0, 24)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (Softmax(ACTIVATED), "--tp: Softmax cannot be computed from a part .* --tp 1"),
        (Add(HIDDEN.columns(0, 20), ACTIVATED.columns(0, 20), HIDDEN.columns(0, 20)), "--tp: Add"),
        (SoftCap(ACTIVATED.columns(0, 5), 1.0), "--tp: columns 0 to 5 of activated are not cut"),
        (RmsNorm(ACTIVATED, ACTIVATED, "model.norm.weight", 1e-5, 31), "--tp: .*norm.* whole rows"),
        (GatedAct(ACTIVATED.columns(0, 10), HIDDEN.columns(0, 5), "silu"), "cut .* differently"),
        (Linear(ACTIVATED, GATE_UP, "w"), "--tp: w reads and writes columns that are cut"),
        (Linear(HIDDEN, HIDDEN, "model.embed_tokens.weight"), "different parts of model.embed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Op) else "",
)
def test_what_cannot_be_cut_is_refused_by_name(op: Op, words: str) -> None:
    program = with_op(odd()[0], op, GatedAct)
    with pytest.raises(ConfigError, match=words):
        shard(program, 2)


def test_what_is_not_cut_may_be_anything() -> None:
    """Every rank has all columns of the stream."""
    program = with_op(odd()[0], Softmax(HIDDEN), GatedAct)
    assert sum(isinstance(op, Softmax) for op in shard(program, 2).ops) == 3


def test_a_single_backend_refuses_a_rank() -> None:
    program, weights = of_case(CASES_BY_NAME["llama"])
    with pytest.raises(ConfigError, match="--backend reference: knows no operation AllReduce"):
        ReferenceBackend(shard(program, 2), weights)
