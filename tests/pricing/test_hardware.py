"""The hardware table, its names, and files that say what the table does not."""

import json
from dataclasses import replace
from datetime import date

import pytest

from duetto.core.errors import ConfigError
from duetto.pricing.find_hardware import (
    calibration_file,
    find_hardware,
    read_hardware,
    write_hardware,
)
from duetto.pricing.gpus import GPU_EFFICIENCIES, HARDWARE
from duetto.pricing.hardware import (
    KINDS,
    CachedWeights,
    Efficiencies,
    HardwareSpec,
    KernelEfficiency,
    rounded,
)

A_FILE = {
    "name": "mine",
    "peaks": {"bfloat16": 1e14},
    "memory_bandwidth": 1e12,
    "memory_bytes": 2**34,
}


def test_the_table_has_what_is_asked_for_with_date_and_source():
    assert {"a100-80g", "h100", "h200", "l4", "l40s", "rtx4090", "mi300x"} <= set(HARDWARE)
    for spec in HARDWARE.values():
        assert spec.source
        assert date.fromisoformat(spec.date)
        assert spec.peaks["bfloat16"] == spec.peaks["float16"] > spec.peaks["float32"]
        assert spec.link_bandwidth > 0
        assert spec.efficiencies == GPU_EFFICIENCIES


def test_efficiencies_are_fractions_one_for_each_kind():
    for kind in KINDS:
        reached = GPU_EFFICIENCIES.of(kind)
        assert 0 < reached.compute <= 1
        assert 0 < reached.memory <= 1


@pytest.mark.parametrize("name", ["compute", "memory"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_is_above_0_and_at_most_1(name, value):
    with pytest.raises(ValueError, match=name):
        KernelEfficiency(**{name: value})


@pytest.mark.parametrize("name", ["launch_s", "chunk_launch_s", "step_s", "logit_row_s"])
def test_overheads_are_not_negative(name):
    with pytest.raises(ValueError, match=name):
        Efficiencies(**{name: -1e-9})


def test_names_aliases_and_counts():
    assert find_hardware("A100") is HARDWARE["a100-80g"]
    assert find_hardware("h100").num_devices is None
    assert find_hardware("h100:8") == replace(HARDWARE["h100"], num_devices=8)
    for count in ("0", "4097", "1000000", "9" * 400):
        with pytest.raises(ConfigError, match="from 1 to 4096 devices"):
            find_hardware(f"h100:{count}")


def test_unknown_hardware_is_refused_with_the_list_and_how_to_add_one():
    with pytest.raises(ConfigError) as caught:
        find_hardware("b300")
    for words in (*HARDWARE, "calibrate", ".json", "memory_bandwidth"):
        assert words in str(caught.value)


def test_a_file_names_hardware_and_takes_the_fitted_efficiencies(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(A_FILE))
    spec = find_hardware(f"{file}:2")
    assert (spec.name, spec.num_devices) == ("mine", 2)
    assert spec.efficiencies == GPU_EFFICIENCIES


def test_what_is_written_is_read_back(tmp_path):
    own = Efficiencies(linear=KernelEfficiency(compute=0.5), step_s=1e-3)
    spec = replace(HARDWARE["l4"], efficiencies=own, efficiencies_of={"int8": GPU_EFFICIENCIES})
    write_hardware(spec, tmp_path / "deep" / "l4.json")
    assert read_hardware(tmp_path / "deep" / "l4.json") == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_bandwith": 1}, "memory_bandwith: is not known"),
        ({"peaks": {}}, "peaks must hold"),
        ({"peaks": {"bfloat16": "fast"}}, r"\$.peaks"),
        ({"peaks": {"float32": 1e-5}}, "peaks.float32 must be from .* FLOP/s, not 1e-05"),
        ({"memory_bandwidth": 300}, "memory_bandwidth must be from"),
        ({"memory_bytes": 0}, "memory_bytes must be from"),
        ({"memory_bytes": 1.5e10 + 0.5}, "memory_bytes"),
        ({"link_latency_s": 1e9}, "link_latency_s must be from"),
        ({"num_devices": 0}, "num_devices must be from"),
        ({"host_speed": 0}, "host_speed must be above 0"),
        ({"efficiencies": {"linear": {"compute": 2}}}, "compute must be above 0 and at most 1"),
        ({"efficiencies": {"linear": {"speed": 1}}}, "efficiencies.linear.speed: is not known"),
        ({"efficiencies": {"matrix": {}}}, "efficiencies.matrix: is not known"),
        ({"efficiencies_of": {"int8": {"x": 1}}}, "efficiencies_of.int8.x: is not known"),
        ({"efficiencies_of": 3}, "efficiencies_of"),
        ({"read_bandwidths": [[2**20, 10]]}, "read_bandwidths of 1048576 bytes must be from"),
        ({"read_bandwidths": [[2, 1e9], [1, 1e9]]}, r"must be above 0 and ascend, not \[2, 1\]"),
        ({"weight_bytes": {"int8": 0}}, "weight_bytes.int8 must be from"),
        ({"cached": 3}, "cached"),
        ({"cached": {"most_bytes": 1}}, "efficiencies"),
        ({"cached": {"most_bytes": 1, "efficiencies": {}, "x": 1}}, "cached.x: is not known"),
        (
            {"cached": {"most_bytes": 1, "efficiencies": {"linear": {"speed": 1}}}},
            "cached.efficiencies.linear.speed: is not known",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_file_and_key(tmp_path, change, words):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(A_FILE | change))
    with pytest.raises(ConfigError, match=words) as caught:
        read_hardware(file)
    assert str(file) in str(caught.value)


def test_a_whole_number_may_be_written_as_people_do(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(A_FILE).replace(str(2**34), "1.6e10"))
    assert read_hardware(file).memory_bytes == 16_000_000_000


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        read_hardware(file)


def test_a_missing_file_and_a_missing_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="is missing"):
        find_hardware(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="run: duetto calibrate"):
        find_hardware("host")
    write_hardware(replace(HARDWARE["l4"], name="host"), calibration_file())
    assert (find_hardware("host").name, find_hardware("host").num_devices) == ("host", 1)
    assert find_hardware("host:3").num_devices == 3  # machines like this one
    calibration_file().write_text('{"name": "host"')
    with pytest.raises(ConfigError, match=r"hardware\.json.*damaged: run duetto calibrate again"):
        find_hardware("host")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the specification
    assert calibration_file().is_absolute()


def test_balance_and_ideal():
    assert find_hardware("a100").balance("bfloat16") == pytest.approx(153.0, abs=0.1)
    assert find_hardware("a100").ideal().efficiencies == Efficiencies()


READS = ((2**20, 8e12), (2**22, 4e12), (2**30, 1e12))
WARM, WARM_INT8 = Efficiencies(step_s=1e-4), Efficiencies(step_s=2e-4)
CACHING = replace(
    find_hardware("a100"),
    read_bandwidths=READS,
    cached=CachedWeights(most_bytes=2**22, efficiencies=WARM, efficiencies_of={"int8": WARM_INT8}),
)


@pytest.mark.parametrize(
    ("num_bytes", "bandwidth"),
    [(1, 8e12), (2**20, 8e12), (2**21, 6e12), (2**22, 4e12), (2**26, 2.5e12), (2**40, 1e12)],
)
def test_what_caches_hold_is_read_faster(num_bytes, bandwidth):
    assert CACHING.for_weights(num_bytes).memory_bandwidth == pytest.approx(bandwidth)
    assert CACHING.ideal().for_weights(num_bytes).memory_bandwidth == pytest.approx(bandwidth)


def test_what_is_reached_of_cached_weights_counts_up_to_their_most():
    few, more = CACHING.for_weights(2**22), CACHING.for_weights(2**22 + 1)
    assert (few.reached("bfloat16"), few.reached("int8")) == (WARM, WARM_INT8)
    assert more.reached("bfloat16") == more.reached("int8") == GPU_EFFICIENCIES
    assert CACHING.ideal().for_weights(1).reached("int8") == Efficiencies()
    assert few.for_weights(2**30) == few  # it is that device now


def test_hardware_without_caches_is_the_same_for_all_weights():
    assert find_hardware("a100").for_weights(1) == find_hardware("a100").for_weights(1e12)
    assert find_hardware("a100").for_weights(0) == find_hardware("a100")


def test_rounded_keeps_three_digits():
    found = rounded(Efficiencies(linear=KernelEfficiency(compute=0.123456), step_s=0.00123456))
    assert (found.linear.compute, found.step_s) == (0.123, 0.00123)


def test_a_spec_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="memory_bandwidth"):
        HardwareSpec(name="x", peaks={"float32": 1e9}, memory_bandwidth=0.0, memory_bytes=1)
