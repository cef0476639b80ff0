"""A program of runs means what its parts do, bit for bit, and needs nothing that it drops.

The reference backend leaves no number in what a run drops.
"""

from dataclasses import replace

import numpy as np
import pytest
from oracle.cases import CASES, Case
from program.rewrites.models import logits, of_case
from program.rewrites.test_fuse import STEP

from duetto.backends.reference import ReferenceBackend
from duetto.program.ops import GatedAct, Linear, Rope, WriteKV
from duetto.program.program import Program
from duetto.program.rewrites.runs import (
    GPU_RUNS,
    AddNorm,
    FusedRun,
    GatedLinear,
    RopeWrite,
    fuse_runs,
)
from duetto.program.rewrites.shard import shard
from duetto.program.shape import Precision


def runs(program: Program) -> dict[type, list[FusedRun]]:
    found = [op for op in program.ops if isinstance(op, FusedRun)]
    return {
        kind: [r for r in found if type(r) is kind] for kind in (AddNorm, RopeWrite, GatedLinear)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs_have_the_same_bits_and_the_same_price(case: Case) -> None:
    program, weights = of_case(case)
    fused = fuse_runs(program, GPU_RUNS)
    assert len(runs(fused)[RopeWrite]) == len(program.kv)
    gates = [op for op in program.ops if isinstance(op, Linear) and op.out.buffer == "gate_up"]
    assert len(runs(fused)[GatedLinear]) == sum(op.bias is None for op in gates)
    assert not any(isinstance(op, (Rope, WriteKV)) for op in fused.ops)
    whole = logits(ReferenceBackend(program, weights))
    np.testing.assert_array_equal(logits(ReferenceBackend(fused, weights)), whole)
    assert fused.cost(STEP, Precision()) == program.cost(STEP, Precision())


def test_what_only_a_run_reads_is_dropped() -> None:
    for case in CASES:
        fused = runs(fuse_runs(of_case(case)[0], GPU_RUNS))
        for run in fused[RopeWrite]:
            assert run.parts[-1].reads[0] in run.dropped  # keys, which are in the cache
        for run in fused[GatedLinear]:
            assert run.dropped == (run.parts[0].out,)


def test_additions_of_normed_branches_are_one_run_with_the_next_norm() -> None:
    by_name = {case.name: case for case in CASES}
    gemma = next(case for name, case in by_name.items() if name.startswith("gemma"))
    program, _ = of_case(gemma)
    fused = fuse_runs(program, GPU_RUNS)
    added = runs(fused)[AddNorm]
    assert len(added) == 2 * len(program.kv)
    assert all(len(run.parts) == 3 for run in added[:-1])
    assert len(added[-1].parts) == 2  # behind it, rows are selected first


def test_a_projection_that_somebody_else_reads_is_not_gated_in_one() -> None:
    program, _ = of_case(CASES[0])
    ops = list(program.ops)
    gate = next(i for i, op in enumerate(ops) if isinstance(op, GatedAct))
    ops.insert(gate + 1, ops[gate])  # reads gate and up again
    fused = fuse_runs(replace(program, ops=tuple(ops)), GPU_RUNS)
    assert len(runs(fused)[GatedLinear]) == len(program.kv) - 1


def test_runs_of_a_rank() -> None:
    """A rank's program is fused too: what is summed over ranks is no part of a run."""
    program, _ = of_case(CASES[0])
    found = runs(fuse_runs(shard(program, 2), GPU_RUNS))
    assert len(found[RopeWrite]) == len(program.kv)
    assert len(found[GatedLinear]) == len(program.kv)
