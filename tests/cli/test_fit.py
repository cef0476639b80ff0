"""`duetto fit` and `serve --dry-run`: flags, tables and exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.in_process import duetto

from duetto.core.engine_args import EngineArgs
from duetto.fit import examine

ROOT = Path(__file__).parent.parent.parent
SMALL = EngineArgs(backend="reference", kv_cache_memory_bytes=2**20)


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


def test_a_draft_model_has_its_part_of_a_device() -> None:
    alone = examine("llama-3.1-8b", EngineArgs(), "h100")
    drafted = EngineArgs(speculative_config={"model": "llama-3.2-1b"})
    both = examine("llama-3.1-8b", drafted, "h100")
    draft = examine("llama-3.2-1b", EngineArgs(), "h100")
    assert both["weight_bytes"] == alone["weight_bytes"] + draft["weight_bytes"]
    assert both["block_bytes"] == alone["block_bytes"] + draft["block_bytes"]
    assert both["num_tokens"] < alone["num_tokens"]
    assert "weights and KV are those of the model and of its draft" in both["notes"]
    assert not any("--pp" in knob["change"] for knob in both["knobs"])  # not priced with drafts
    # Other proposers take nothing of it.
    ngram = EngineArgs(speculative_config='{"method": "ngram"}')
    assert examine("llama-3.1-8b", ngram, "h100") == alone
    large = EngineArgs(speculative_model="llama-3.1-70b")
    assert examine("llama-3.1-8b", large, "h100:8")["tp"] == 4
    assert not examine("llama-3.1-8b", large, "h100:1")["fits"]


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
        (("tiny", "--tp", "64"), "--tp: 64 does not divide the model's heads"),
        (("tiny", "--length", "0"), "--length: must be from 1 to 2048"),
        (("tiny", "--max-model-len", "4096"), "--max-model-len: must be from 1 to 2048"),
        (("tiny", "--hardware", "h100", "--gpu-memory-utilization", "0"), "above 0 and at most 1"),
        (
            ("llama-3-8b", "--hardware", "h100", "--speculative-model", "nowhere"),
            "--speculative-config: the draft model: nowhere",
        ),
        (
            ("llama-3-8b", "--hardware", "h100", "--speculative-model", "llama-2-7b"),
            "the draft model llama-2-7b has 32000 tokens and the model 128256",
        ),
        (
            (
                "llama-3-8b",
                "--hardware",
                "h100:2",
                "--pp",
                "2",
                "--speculative-model",
                "llama-3-8b",
            ),
            "--speculative-config with --pp 2: not priced",
        ),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], expected: str) -> None:
    done = duetto("fit", *words)
    assert done.returncode == 1 and expected in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("duetto: ")


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
