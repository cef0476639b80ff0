"""This machine's prices: the same for the engine, `roofline` and `simulate`, calibrated or not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pricing.prices import decode, prefill, program

from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout, with_weights
from duetto.pricing.find_hardware import (
    calibration_file,
    find_hardware,
    named_gpu,
    write_hardware,
)
from duetto.pricing.hardware import Efficiencies, HardwareSpec, KernelEfficiency
from duetto.pricing.host import gpu_prices, host_prices
from duetto.pricing.roofline import roofline
from duetto.program.shape import Precision

NAME = "smollm2-135m"
MEASURED = HardwareSpec(
    name="host",
    peaks={"float32": 1e11, "int8": 2e11},
    memory_bandwidth=2e10,
    memory_bytes=2**33,
    efficiencies=Efficiencies(linear=KernelEfficiency(compute=0.7, memory=0.6), step_s=1e-3),
    efficiencies_of={"int8": Efficiencies(linear=KernelEfficiency(compute=0.4), step_s=2e-3)},
)
PRECISIONS = {  # of the engine: fp32 between operations, whatever weights and KV are
    "float32": Precision(4.0, 4.0, 4.0),
    "bfloat16": Precision(2.0, 4.0, 2.0),
    "int8": Precision(1.0, 4.0, 2.0),
    "int4": Precision(0.5625, 4.0, 2.0),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_hardware(MEASURED, calibration_file())
    yield


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [decode(3, 400), prefill(2, 300)])
def test_the_engine_the_roofline_and_a_simulation_have_one_price(dtype, shape):
    host, layout = find_hardware("host"), Layout(dtype=dtype)
    expected = host_prices(program(NAME), PRECISIONS[dtype]).step_time(shape)
    assert make_fleet(program(NAME), host, layout).replica.step_time(shape) == expected
    first = shape.requests[0]
    size = max(first.num_new, first.num_past)
    found = roofline(
        program(NAME), host, layout.on(host, program(NAME)), batch=len(shape.requests), context=size
    )
    assert expected in (found.prefill.time_s, found.decode.time_s)


def test_quantized_weights_are_multiplied_in_int8_where_the_host_can():
    assert Layout(dtype="int8").on(MEASURED, program(NAME)).arithmetic == "int8"
    assert Layout(dtype="bfloat16").on(MEASURED, program(NAME)).arithmetic == "float32"
    assert Layout(dtype="bfloat16").on(MEASURED, program(NAME)).precision.weight_bytes == 2
    alone = replace(MEASURED, peaks={"float32": 1e11})
    assert Layout(dtype="int8").on(alone, program(NAME)).arithmetic == "float32"


def test_weights_are_priced_as_the_host_keeps_them():
    host = replace(MEASURED, weight_bytes={"bfloat16": 1.53, "int8": 1.016})
    found = [
        Layout(dtype=dtype).on(host, program(NAME)).precision.weight_bytes for dtype in PRECISIONS
    ]
    assert found == [4.0, 1.53, 1.016, 0.5625]


def test_weights_are_what_config_json_says_unless_asked():
    assert with_weights(Layout(), "float16", "none").dtype == "float16"
    assert with_weights(Layout(), None, "none").dtype == "bfloat16"
    assert with_weights(Layout(dtype="float32"), "float16", "none").dtype == "float32"
    assert with_weights(Layout(), "float16", "int4").dtype == "int4"
    with pytest.raises(ConfigError, match="--dtype float8 with --quantization int8"):
        with_weights(Layout(dtype="float8"), None, "int8")


@pytest.mark.parametrize("text", ["", '{"name": "host', '{"name": "host"}'])
def test_a_damaged_calibration_is_told_and_does_without(text):
    guess = host_prices(program(NAME), PRECISIONS["bfloat16"])
    assert guess.notes == () and guess.roof_time is not None
    calibration_file().write_text(text)
    found = host_prices(program(NAME), PRECISIONS["bfloat16"])
    assert found.roof_time is None and found.step_time(decode(1, 10)) > 0
    (note,) = found.notes
    assert str(calibration_file()) in note and "run duetto calibrate again" in note
    calibration_file().unlink()
    assert host_prices(program(NAME), PRECISIONS["bfloat16"]).notes == ()


def test_an_engine_starts_beside_a_damaged_calibration_and_says_so(tiny_model):
    args = EngineArgs(backend="reference", kv_cache_memory_bytes=2**20)
    assert not any("calibrat" in note for note in build(tiny_model, args).notes)
    calibration_file().write_text("")
    assert any("run duetto calibrate again" in note for note in build(tiny_model, args).notes)


H100 = "NVIDIA H100 80GB HBM3"


def test_gpus_are_known_by_what_their_drivers_call_them():
    names = {
        H100: "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    assert {name: named_gpu(name).name for name in names} == names
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA T4", ""):
        assert named_gpu(name) is None, name


def test_a_gpu_is_priced_by_its_name_until_it_is_measured():
    shape, precision = decode(1, 1000), Precision()
    named = gpu_prices(program(NAME), precision, "bfloat16", H100)
    layout = Layout(dtype="bfloat16")
    h100 = find_hardware("h100")
    expected = make_fleet(program(NAME), h100, layout).replica.step_time(shape)
    assert named.step_time(shape) == expected
    assert named.roof_time(shape) < named.step_time(shape)
    measured = replace(MEASURED, name="gpu", source=f"duetto calibrate: {H100}")
    write_hardware(measured, calibration_file("gpu"))
    found = gpu_prices(program(NAME), precision, "float32", H100)
    assert found.step_time(shape) > 10 * named.step_time(shape) and not found.notes
    assert host_prices(program(NAME), precision).step_time(shape) != found.step_time(shape)


def test_what_was_measured_of_another_gpu_is_ignored_and_said():
    measured = replace(MEASURED, name="gpu", source="duetto calibrate: NVIDIA L4")
    write_hardware(measured, calibration_file("gpu"))
    found = gpu_prices(program(NAME), Precision(), "bfloat16", H100)
    (note,) = found.notes
    assert "of another GPU" in note and H100 in note
    assert found.roof_time is not None
    calibration_file("gpu").write_text("{}")
    assert (
        "run duetto calibrate --backend cuda again"
        in gpu_prices(program(NAME), Precision(), "bfloat16", H100).notes[0]
    )


def test_a_gpu_without_a_known_name_has_a_guess_and_no_roof():
    found = gpu_prices(program(NAME), Precision(), "bfloat16", "NVIDIA T4")
    assert found.roof_time is None
    assert 0 < found.step_time(decode(1, 10)) < found.step_time(prefill(1, 5000))


def test_hardware_gpu_is_what_was_measured_of_it():
    with pytest.raises(ConfigError, match="run: duetto calibrate --backend cuda"):
        find_hardware("gpu")
    write_hardware(replace(MEASURED, name="gpu"), calibration_file("gpu"))
    assert find_hardware("gpu").num_devices == 1
    assert find_hardware("gpu:4").num_devices == 4
