"""An operation that nobody has heard of: one class, one line in each backend, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from native import cpu_backend
from oracle.cases import CASES_BY_NAME
from pricing.prices import ROUGH
from program.rewrites.models import logits, odd, of_case, with_op

from duetto.backends.cpu import compile as native_compiler
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference import ops as reference_ops
from duetto.backends.reference.memory import scratch_bytes
from duetto.backends.reference.ranks import ReferenceRanks
from duetto.backends.reference.stages import ReferenceStages
from duetto.core.errors import ConfigError
from duetto.measure.op_times import ReferenceProbe, measure
from duetto.pricing.calibrate import MeasuredStep
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.roofline import roofline
from duetto.program.activations import LargestStep
from duetto.program.op import Kind, Op, Ref
from duetto.program.ops import GatedAct, RmsNorm
from duetto.program.program import Program
from duetto.program.rewrites.fuse import FusedLinear, fuse
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages
from duetto.program.shape import BatchShape, Cost, Precision, RequestShape

STEP = BatchShape((RequestShape(9, 0), RequestShape(1, 20)))


@dataclass(frozen=True, slots=True)
class DoubleNumbers(Op):
    """x = 2 x, in place."""

    x: Ref

    kind: ClassVar[Kind] = "add"
    by_columns: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.x,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        numbers = shape.num_tokens * self.x.width
        size = int(numbers * precision.activation_bytes)
        return Cost(numbers, size, size)


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its line in the table of each backend."""
    monkeypatch.setitem(
        reference_ops.OPS, DoubleNumbers, lambda op, run: run.write(op.x, 2 * run.read(op.x))
    )
    monkeypatch.setitem(
        native_compiler._EMIT,
        DoubleNumbers,
        lambda to, op: to._plan.add(*[to.columns(op.x)] * 3),
    )
    yield


def with_double(program: Program) -> Program:
    """Between an activation and the projection of it, in columns that ranks share out."""
    return with_op(
        program, DoubleNumbers(Ref("activated", 0, program.buffers["activated"])), GatedAct
    )


def test_it_runs_on_every_backend() -> None:
    plain, weights = of_case(CASES_BY_NAME["llama"])
    program = with_double(plain)
    want = logits(ReferenceBackend(program, weights))
    assert np.abs(want - logits(ReferenceBackend(plain, weights))).max() > 0.1
    np.testing.assert_allclose(logits(cpu_backend(program, weights)), want, atol=1e-4)


def test_it_is_priced() -> None:
    program = with_double(odd()[0])
    model = CostModel(program, ROUGH, Deployment())
    row = {one.name: one for one in model.price(STEP)}["double_numbers"]
    assert (row.kind, row.count, row.flops) == ("add", 3, 3 * 10 * 31)
    assert row.bytes_moved == 3 * 2 * 10 * 31 * 2
    without = CostModel(odd()[0], ROUGH, Deployment())
    assert model.step_time(STEP) == pytest.approx(without.step_time(STEP) + row.time_s)


def test_it_is_shown_by_roofline() -> None:
    found = roofline(with_double(odd()[0]), ROUGH, Deployment(), batch=4, context=20)
    for step in found.as_json().values():
        if isinstance(step, dict) and "operations" in step:
            assert "double_numbers" in [row["name"] for row in step["operations"]]
    assert found.sanity == roofline(odd()[0], ROUGH, Deployment(), batch=4, context=20).sanity


def test_it_is_timed_and_calibrated() -> None:
    plain, weights = of_case(CASES_BY_NAME["llama"])
    program = with_double(plain)
    probe = ReferenceProbe(program, dict(weights), ReferenceBackend(program, weights), 64)
    times = measure(probe, STEP, seconds=0.0, least=1)
    step = MeasuredStep(
        program,
        Precision(),
        "bfloat16",
        STEP,
        tuple((one.op, one.seconds) for one in times.ops),
        0.0,
    )
    samples = [sample for kind, sample in step.samples(ROUGH) if kind == "add"]
    assert [sample.calls for sample in samples] == [len(program.kv)]
    assert samples[0].measured_s > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_sharded(ranks: int) -> None:
    plain, weights = odd()
    program = with_double(plain)
    cut = [shard(program, ranks, rank) for rank in range(ranks)]
    widths = [op.x.width for one in cut for op in one.ops if isinstance(op, DoubleNumbers)]
    assert sum(widths) == 3 * 31
    want = logits(ReferenceBackend(program, weights))
    np.testing.assert_allclose(logits(ReferenceRanks(cut, weights)), want, rtol=1e-4, atol=2e-5)
    rows = CostModel(program, ROUGH, Deployment(tensor_parallel=ranks)).price(STEP)
    row = {one.name: one for one in rows}["double_numbers"]
    assert row.flops == 3 * 10 * -(-31 // ranks)


def test_it_is_cut_into_stages() -> None:
    plain, weights = odd()
    program = with_double(plain)
    want = logits(ReferenceBackend(program, weights))
    np.testing.assert_array_equal(logits(ReferenceStages(stages(program, 3), weights)), want)


def test_it_is_fused_around() -> None:
    """The norms still go into their projections; the activation's rows are now read by another."""
    plain, weights = of_case(CASES_BY_NAME["llama"])
    program = with_double(plain)
    fused = fuse(program, native_compiler._ABSORBED)
    before = [type(op.before) for op in fused.ops if isinstance(op, FusedLinear)]
    assert before == [RmsNorm] * (2 * len(program.kv) + 1)
    assert sum(isinstance(op, DoubleNumbers) for op in fused.ops) == len(program.kv)
    want = logits(ReferenceBackend(program, weights))
    np.testing.assert_array_equal(logits(ReferenceBackend(fused, weights)), want)


def test_its_memory_is_counted() -> None:
    alone = Program((DoubleNumbers(Ref("x", 0, 10)),), {}, {"x": 10}, (), Ref("x", 0, 10), 8)
    step = LargestStep(num_tokens=3, num_logit_rows=1, max_model_len=8, num_kv_tokens=8)
    assert scratch_bytes(alone, "float32", step) == 3 * (10 + 10) * 4


def test_a_backend_without_its_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weights = of_case(CASES_BY_NAME["llama"])
    program = with_double(plain)
    monkeypatch.delitem(reference_ops.OPS, DoubleNumbers)
    monkeypatch.delitem(native_compiler._EMIT, DoubleNumbers)
    with pytest.raises(ConfigError, match=r"--backend reference: .*DoubleNumbers"):
        ReferenceBackend(program, weights)
    with pytest.raises(ConfigError, match=r"--backend cpu: .*DoubleNumbers.*--backend reference"):
        cpu_backend(program, weights)
