"""`duetto fit` and `serve --dry-run`: what fits is told before a weight is read, and is right."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duetto.build import EngineArgs, build
from duetto.cli.fit import examine
from duetto.core.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent.parent
SMALL = EngineArgs(backend="reference", kv_cache_memory_bytes=2**20)


def duetto(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "duetto", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_what_is_too_large_for_a_machine_is_told_what_would_do() -> None:
    done = duetto("fit", "llama-3-70b", "--hardware", "l4:1", "--json")
    assert done.returncode == 1
    changes = [knob["change"] for knob in json.loads(done.stdout)["knobs"]]
    assert "--tp 8 (8 devices; there is 1)" in changes
    done = duetto("fit", "llama-3-8b", "--hardware", "l4:1", "--json")
    assert not any("devices" in k["change"] for k in json.loads(done.stdout)["knobs"])


def test_without_tp_the_fewest_devices_that_do() -> None:
    report = examine("llama-3-70b", EngineArgs(), "h100:4")
    assert report["fits"] and report["tp"] == report["devices"] == 2
    assert not examine("llama-3-70b", EngineArgs(), "h100:4", tp=1)["fits"]
    beyond = examine("llama-3-70b", EngineArgs(), "l4:4")
    assert not beyond["fits"] and beyond["tp"] == 4
    assert examine("llama-3-8b", EngineArgs(), "h100:4")["tp"] == 1
    long = EngineArgs(max_model_len=131072)  # for which one has no room beside the weights
    assert examine("llama-3.1-70b", EngineArgs(), "h100:8")["tp"] == 4
    assert examine("llama-3.1-8b", long, "l4:8")["tp"] == 2
    done = duetto("fit", "llama-3-70b", "--hardware", "h100:4")
    assert done.returncode == 0 and "fits with --tp 2" in done.stdout


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


def test_requests_are_counted_alike_in_both_tables() -> None:
    done = duetto("fit", "tiny", "--hardware", "h100", "--max-num-seqs", "3")
    rows = done.stdout.splitlines()
    assert "3 " in next(row for row in rows if row.startswith(" requests "))
    (knob,) = [row.split() for row in rows if "--kv-cache-dtype int8" in row]
    assert knob[-3] == "3" and int(knob[-2].replace(",", "")) > 1000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("nope",), "the named shapes are"),
        (("tiny", "--hardware", "nope"), "accepted: a100"),
        (("tiny", "--hardware", "h100", "--backend", "reference"), "--backend: is for"),
        (("tiny", "--hardware", "h100:1", "--tp", "2"), "is 2 devices, and there are 1"),
        (("tiny", "--tp", "2"), "name other --hardware"),
        (("tiny", "--length", "0"), "--length: must be from 1 to 2048"),
        (("tiny", "--max-model-len", "4096"), "--max-model-len: must be from 1 to 2048"),
        (("tiny", "--hardware", "h100", "--gpu-memory-utilization", "0"), "above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], expected: str) -> None:
    done = duetto("fit", *words)
    assert done.returncode == 1 and expected in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("duetto: ")


def test_headers_that_do_not_fit_the_config_are_told(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        examine(str(tmp_path), SMALL)


def test_a_dry_run_serves_nothing(tiny_model: Path) -> None:
    words = ("--dry-run", "--backend", "reference", "--max-model-len", "auto")
    done = duetto("serve", str(tiny_model), *words)
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "what would change" in done.stdout
    refused = duetto("serve", "llama-2-70b", "--dry-run", "--max-model-len", "auto")
    assert refused.returncode == 1 and "does not fit into this machine's memory" in refused.stderr


def test_json_and_exit_status() -> None:
    done = duetto("fit", "tiny", "--hardware", "l4", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["fits"] is True
    done = duetto("fit", "llama-3-70b", "--hardware", "l4", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["fits"] is False


SHAPE: dict[str, Any] = {
    "vocab_size": 120000,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
MODELS = [
    ("bfloat16", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    (
        "float32",
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": 8,
            "num_key_value_heads": 16,
            "tie_word_embeddings": False,
        },
    ),
    (
        "float32",
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 128,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "sliding_window": None,
        },
    ),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kv_dtype", "shape"), MODELS, ids=lambda m: str(m)[:28])
def test_predicted_memory_is_what_a_running_engine_holds(
    kv_dtype: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | shape))
    made = duetto("make-model", str(tmp_path / "config.json"), str(tmp_path / "model"))
    assert made.returncode == 0, made.stderr
    words = ["--backend", "reference", "--kv-cache-dtype", kv_dtype]
    words += ["--kv-cache-memory-bytes", str(2**26), "--max-num-batched-tokens", "256"]
    script = [sys.executable, str(ROOT / "benchmarks" / "fit.py"), str(tmp_path / "model")]
    words += ["--output", str(tmp_path / "fit.md")]  # not the project's page
    done = subprocess.run([*script, *words], check=True, capture_output=True, text=True)
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["predicted"] > 130 * 2**20
    assert abs(row["error"]) <= 0.05, row


@pytest.mark.parametrize("command", ["fit", "roofline"])
def test_an_adapter_is_named_as_what_it_is(command: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    told = duetto(command, str(tmp_path)).stderr
    assert "is an adapter of org/base, not a whole model" in told
