"""Every part of `make gpu`, rehearsed: on a CPU, in the interpreter, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duetto.cli.bench_gpu_kernels import time_gpu_kernels
from duetto.measure.gpu import measure_gpu, step_of
from duetto.measure.gpu_kernels import step_shape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN = BENCHMARKS / "gpu" / "run.py"
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "float16",
}

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("DUETTO_TEST_DEVICE", "cpu") != "cpu", reason="a rehearsal is for a CPU"
    ),
    # Lanes that are masked out hold anything in the interpreter.
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of all parts, in one run."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(RUN), "--rehearse", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    failed = {name: one["error"] for name, one in parts.items() if one["state"] == "failed"}
    assert not failed and done.returncode == 0, done.stdout
    return {name: one["found"] for name, one in parts.items()}


def test_steps_are_timed_beside_plain_torch(found: dict) -> None:
    check_decode(found["decode"])
    assert all(one["ours_s"] > 0 for one in found["small"]["steps"])


def test_parts_of_kernels_find_what_the_page_shows(found: dict) -> None:
    assert len(found["bits"]["axes"]) == 4 and found["bits"]["library"]
    assert all(one["of_product"] > 0 for one in found["prefill"]["prompts"])
    assert found["prefill"]["attention"]["torch_s"] > 0
    assert [one["format"] for one in found["quantized"]["weights"]] == ["bfloat16", "int4"]
    assert found["tests"]["counts"] == {"passed": 1} and found["tests"]["whole"]
    assert found["calibrate"]["hardware"]["name"] == "gpu"
    assert found["calibrate"]["steps"][0]["predicted_s"] > 0
    assert found["tuning"]["tried"] > 0  # whose bits an interpreter need not give


def test_parts_of_the_engine_find_what_the_page_shows(found: dict) -> None:
    assert found["greedy"]["types"]["llama"]["compared"] > 0
    assert found["load"]["file_bytes"] > 0
    for one in found["generate"]["batches"]:
        assert one["tokens_per_s"] > 0 and one["of_graph"] > 0
    assert found["server"]["completed"] == found["server"]["streams"]
    assert found["server"]["worst_of_step"] > 0


def check_decode(found: dict) -> None:
    for step in found["steps"]:
        assert step["ours_s"] > 0 and step["of_read"] > 0
    assert any(step["torch_s"] for step in found["steps"])


def test_kernels_are_timed_beside_the_device(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    time_gpu_kernels(
        str(tmp_path), ("linear", "attention"), (2,), ("f16", "int8"), ("f16",),
        as_json=True, shrink=64, runs=1,
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [(one["kernel"], one["format"]) for one in found["kernels"]]
    assert len(set(names)) == len(names)
    assert ("attention", "float16") in names and ("o_proj", "int8") in names
    assert ("attention", "int8") not in names, "weights change no attention"
    for one in found["kernels"]:
        assert one["seconds"] > 0 and one["num_bytes"] > 0 and one["of_machine"] > 0


def test_a_gpu_becomes_hardware() -> None:
    shapes = (step_shape(1, 9), step_shape(2, 9))
    spec = measure_gpu(config=TINY, dtype="float16", shapes=shapes, shrink=64, runs=1)
    assert spec.name == "gpu" and "interpreter" in spec.source
    assert spec.efficiencies.chunk_launch_s > 0 and spec.efficiencies.launch_s == 0
    kinds = {point.kind for point in spec.kernels}
    assert {"linear", "attention", "norm", "rope", "embed"} <= kinds
    assert all(0 < point.fraction <= 1.001 for point in spec.kernels if point.kind == "linear")
    assert step_of(shapes[0]).token_ids.tolist() == [0]
