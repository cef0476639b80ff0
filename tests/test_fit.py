"""What fits is known before a weight is read, and is right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError
from duetto.fit import examine

SMALL = EngineArgs(backend="reference", kv_cache_memory_bytes=2**20)


def test_what_is_told_is_what_is_allocated(tiny_model: Path) -> None:
    report, built = examine(str(tiny_model), SMALL), build(tiny_model, SMALL)
    assert report["num_blocks"] == built.scheduler_config.num_blocks
    assert report["kv_bytes"] == built.model.kv_memory_bytes
    assert report["weight_bytes"] == built.model.weight_bytes
    assert report["max_model_len"] == built.scheduler_config.max_model_len
    assert report["num_tokens"] == report["num_blocks"] * 32


def test_auto_is_the_length_that_fits() -> None:
    tight = EngineArgs(backend="reference", max_model_len="auto", kv_cache_memory_bytes=2**19)
    assert tight.max_model_len is None
    report = examine("tiny", tight)
    assert report["max_model_len"] == report["num_tokens"] == 1024  # 512 bytes a token
    asked = EngineArgs(backend="reference", max_model_len=2048, kv_cache_memory_bytes=2**19)
    refused = examine("tiny", asked)
    assert not refused["fits"] and "--max-model-len 2048" in refused["notes"][-1]


def test_a_shorter_request_has_more_room_and_knobs_change_what_they_say() -> None:
    report = examine("tiny", SMALL, length=512)
    assert report["num_requests"] == 2**20 // 512 // 512
    knobs = {knob["change"]: knob for knob in report["knobs"]}
    int8 = knobs["--kv-cache-dtype int8"]
    assert int8["num_tokens"] == 2**20 // (2 * 2 * 2 * (16 + 4)) // 32 * 32
    assert int8["num_requests"] > 2 * report["num_requests"]


def test_elsewhere() -> None:
    report = examine("llama-3-8b", EngineArgs(), "h100")
    assert report["fits"] and report["weight_bytes"] == 2 * report["parameters"]
    assert report["block_bytes"] == 32 * 128 * 1024
    assert report["num_requests"] == report["num_tokens"] // 8192
    quantized = examine("llama-3-8b", EngineArgs(quantization="int8"), "h100")
    assert quantized["weight_bytes"] == report["parameters"]
    large = examine("llama-3-70b", EngineArgs(), "h100")
    assert not large["fits"] and large["left_bytes"] < 0
    fitting = [k for k in large["knobs"] if k["change"].startswith("--tp")]
    assert [k["change"] for k in fitting] == ["--tp 2"] and fitting[0]["num_requests"] > 0


def test_devices_without_a_link_are_not_proposed(tmp_path: Path) -> None:
    spec = {"name": "host", "peaks": {"float32": 1e11}, "memory_bandwidth": 2e10}
    (tmp_path / "cal.json").write_text(json.dumps(spec | {"memory_bytes": 2e9}))
    report = examine("smollm2-135m", EngineArgs(), str(tmp_path / "cal.json"))
    assert report["fits"] and not any("--tp" in k["change"] for k in report["knobs"])
    assert not any("--pp" in k["change"] for k in report["knobs"])
    mine = spec | {"name": "mine", "memory_bytes": 2e9, "num_devices": 4}
    (tmp_path / "two.json").write_text(json.dumps(mine))
    with pytest.raises(ConfigError, match="no link"):
        examine("smollm2-135m", EngineArgs(), str(tmp_path / "two.json"), tp=3)


def test_what_fits_has_memory_left(tiny_model: Path) -> None:
    """More KV than there is memory, and the refusal is that of a start."""
    for args in (
        EngineArgs(backend="reference", kv_cache_memory_bytes=2**44),
        EngineArgs(backend="reference", kv_cache_memory_bytes=2**36, max_num_batched_tokens=2**31),
    ):
        report = examine(str(tiny_model), args)
        assert not report["fits"] and report["left_bytes"] < 0
        assert "together are" in report["notes"][-1] and "that may be used" in report["notes"][-1]
        assert report["num_requests"] == 0


def test_a_step_holds_no_more_than_there_is_kv_for(tiny_model: Path) -> None:
    """A budget, or a number of requests, beyond what KV has room for allocates nothing."""
    plain = examine(str(tiny_model), replace(SMALL, max_num_batched_tokens=2**11))
    for changes in (
        {"max_num_batched_tokens": 10**8},
        {"max_num_batched_tokens": 2**11, "max_num_seqs": 10**9},
    ):
        report = examine(str(tiny_model), replace(SMALL, **changes))
        assert report["fits"]
        assert report["num_tokens"] == plain["num_tokens"] == 2**11
        assert report["activation_bytes"] < 40 * plain["activation_bytes"]


def test_what_a_start_refuses_does_not_fit(tiny_model: Path) -> None:
    args = replace(SMALL, enable_chunked_prefill=False, max_num_batched_tokens=8)
    with pytest.raises(ConfigError, match="--no-enable-chunked-prefill with") as dry:
        examine(str(tiny_model), args)
    with pytest.raises(ConfigError) as started:
        build(tiny_model, args)
    assert str(dry.value) == str(started.value)


def test_headers_that_do_not_fit_the_config_are_told(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        examine(str(tmp_path), SMALL)


def test_a_model_that_is_run_for_embeddings_has_no_head() -> None:
    whole = examine("llama-3-8b", EngineArgs(), "h100")
    report = examine("llama-3-8b", EngineArgs(runner="pooling"), "h100")
    assert whole["parameters"] - report["parameters"] == 128256 * 4096
    cut = examine("llama-3-8b", EngineArgs(runner="pooling"), "h100", tp=2)
    assert cut["fits"] and cut["weight_bytes"] < report["weight_bytes"] < whole["weight_bytes"]
