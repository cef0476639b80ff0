"""Fitting efficiencies to times: what was put in comes out; and a host that is really measured."""

from dataclasses import replace

import pytest
from pricing.prices import A100, ROUGH, decode, prefill, program

from duetto.checkpoints.shapes import SHAPES
from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape
from duetto.measure.host import measure_host
from duetto.pricing.calibrate import (
    FRACTION,
    KernelSample,
    MeasuredStep,
    fit_kernel,
    fit_kinds,
    minimise,
    predicted,
)
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import read_hardware, write_hardware
from duetto.pricing.hardware import KernelEfficiency
from duetto.program.shape import Precision

SHAPES_TO_TIME = (decode(1, 64), decode(16, 900), prefill(1, 64), prefill(1, 700), prefill(4, 500))


def test_minimise_finds_a_minimum_within_its_ranges():
    found = minimise(
        lambda v: (v["a"] - 3) ** 2 + (v["b"] - 20) ** 2,
        {"a": 1.0, "b": 1.0},
        {"a": (0.1, 100.0), "b": (0.1, 10.0)},
    )
    assert found["a"] == pytest.approx(3, rel=0.01)
    assert found["b"] == 10.0


def test_a_kernels_efficiency_comes_out_of_its_times():
    truth = KernelEfficiency(compute=0.6, memory=0.8, half_rows=40, call_s=5e-6)
    samples = [
        replace(sample, measured_s=predicted(sample, truth))
        for rows in (1, 4, 16, 64, 200, 500, 1000, 4000)
        for width in (1e6, 3e7)
        for sample in [KernelSample(rows * width * 2 / 3e14, 2 * width / 2e12, rows, 1.0)]
    ]
    start = {"compute": 0.3, "memory": 0.3, "half_rows": 10.0, "call_s": 1e-6}
    found = fit_kernel(samples, start)
    for sample in samples:
        assert predicted(sample, found) == pytest.approx(sample.measured_s, rel=0.05)
    assert found.compute == pytest.approx(0.6, rel=0.05)
    assert found.memory == pytest.approx(0.8, rel=0.05)


def test_one_odd_measurement_does_not_bend_the_fit():
    samples = [KernelSample(0.0, memory_s, 1, memory_s / 0.5) for memory_s in (1e-4, 2e-4, 5e-4)]
    samples.append(KernelSample(0.0, 1e-4, 1, 1.0))
    assert fit_kernel(samples, {"memory": 0.9}).memory == pytest.approx(0.5, rel=0.01)


def test_a_fraction_never_exceeds_1():
    samples = [KernelSample(0.0, 1e-3, 1, 1e-5)]  # out of a cache
    assert fit_kernel(samples, {"memory": 0.5}).memory == FRACTION[1] == 1.0


def test_steps_that_the_cost_model_timed_give_its_efficiencies_back():
    model = CostModel(program("llama-3.2-1b"), ROUGH, Deployment())
    steps = [measured(model, shape) for shape in SHAPES_TO_TIME]
    found = replace(ROUGH.efficiencies, **fit_kinds(steps, ROUGH))
    fitted = CostModel(program("llama-3.2-1b"), replace(ROUGH, efficiencies=found), Deployment())
    for shape in (*SHAPES_TO_TIME, decode(5, 300), prefill(2, 200)):
        assert fitted.step_time(shape) == pytest.approx(model.step_time(shape), rel=0.05)


def test_a_sample_has_the_rows_that_the_price_has():
    """Of operations on selected rows too: a prompt of 300 tokens has one row of logits."""
    by_row = KernelEfficiency(memory=0.3, call_s=4e-6, row_s=1e-6)
    hardware = replace(ROUGH, efficiencies=replace(ROUGH.efficiencies, copy=by_row))
    model = CostModel(program("llama-3.2-1b"), hardware, Deployment())
    for kind, sample in measured(model, prefill(2, 300)).samples(hardware):
        kernel = hardware.efficiencies.of(kind)
        assert predicted(sample, kernel) == pytest.approx(sample.measured_s)


def measured(model: CostModel, shape: BatchShape) -> MeasuredStep:
    times = tuple((op, model.price_op(op, shape).time_s) for op in model.program.ops)
    return MeasuredStep(model.program, Precision(), "bfloat16", shape, times, 0.0)


def test_points_are_fractions_of_the_roof():
    model = CostModel(program("llama-3.2-1b"), A100.ideal(), Deployment())
    points = measured(model, prefill(1, 500)).points(A100)
    assert {point.kind for point in points} >= {"linear", "attention", "norm", "rope", "embed"}
    for point in points:
        assert point.fraction == pytest.approx(1, rel=0.05)
        assert (point.rows, point.context) == (500, 0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_host_is_measured_and_kept(tmp_path, backend):
    done: list[tuple[int, int]] = []
    spec = measure_host(
        backend,
        folder=tmp_path,
        seconds_per_step=0.0,
        config=dict(SHAPES["tiny"]),
        small_config=dict(SHAPES["tiny"]),
        on_progress=lambda *now: done.append(now),
    )
    write_hardware(spec, tmp_path / "host.json")
    assert read_hardware(tmp_path / "host.json") == spec
    assert done[-1][0] == done[-1][1] == len(done)
    assert spec.peaks["float32"] > 1e9
    assert spec.memory_bandwidth > 1e8
    assert spec.efficiencies.step_s > 0
    assert {point.kind for point in spec.kernels} >= {"linear", "attention", "embed"}
    price = CostModel(program("tiny"), spec, Deployment(arithmetic="float32")).step_time
    assert 0 < price(decode(1, 64)) < price(prefill(1, 64)) < 1
    assert "bfloat16" in spec.weight_bytes or backend == "reference"
    if backend == "auto":
        rates = [rate for _, rate in spec.read_bandwidths]
        assert len(rates) > 2 and rates[-1] == pytest.approx(spec.memory_bandwidth, rel=0.01)
        assert spec.cached is None or rates[0] > rates[-1]
        assert rates == sorted(rates, reverse=True)


def test_a_backend_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="auto, cpu, reference"):
        measure_host("cuda", folder=tmp_path)
