"""A fused program means what its parts do, bit for bit, and costs what they do."""

import numpy as np
import pytest
from oracle.cases import CASES, Case
from program.rewrites.models import logits, of_case

from duetto.backends.cpu.compile import _ABSORBED
from duetto.backends.reference import ReferenceBackend
from duetto.program.program import Program
from duetto.program.rewrites.fuse import FusedLinear, fuse
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages
from duetto.program.shape import BatchShape, Precision, RequestShape

STEP = BatchShape((RequestShape(7, 30), RequestShape(1, 9), RequestShape(3, 0, 0)))


def num_fused(program: Program) -> int:
    return sum(isinstance(op, FusedLinear) for op in program.ops)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fused_program_has_the_same_bits_and_the_same_price(case: Case) -> None:
    program, weights = of_case(case)
    fused = fuse(program, _ABSORBED)
    assert num_fused(fused) == 3 * len(program.kv) + 1
    assert len(fused.ops) == len(program.ops) - num_fused(fused)
    whole = logits(ReferenceBackend(program, weights))
    np.testing.assert_array_equal(logits(ReferenceBackend(fused, weights)), whole)
    assert fused.cost(STEP, Precision()) == program.cost(STEP, Precision())


def test_a_backend_that_absorbs_nothing_has_the_program_as_it_is() -> None:
    for case in CASES:
        program, _ = of_case(case)
        assert fuse(program, {}) == program


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rewrites_can_follow_each_other(case: Case) -> None:
    """A rank's program is fused as the whole is, and so is a stage of it."""
    program, _ = of_case(case)
    whole = num_fused(fuse(program, _ABSORBED))
    cut = stages(shard(program, 2), 2)
    assert sum(num_fused(fuse(stage, _ABSORBED)) for stage in cut) == whole
    again = stages(fuse(shard(program, 2), _ABSORBED), 2)
    assert [stage.ops for stage in again] == [fuse(stage, _ABSORBED).ops for stage in cut]
