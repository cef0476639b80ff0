"""The scripts in benchmarks/ run, small, and their pages hold what the last line says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run(script: str, *words: str) -> Any:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_scheduling(tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "scheduling.md"
    words = "--num-requests 6 --repetitions 1 --max-num-seqs 4 --load 4"
    found = run("scheduling.py", "--model", str(tiny_model), *words.split(), "--output", str(page))
    assert len(found["results"]) == 5
    cached = {name: result["cached_fraction"] for name, result in found["results"].items()}
    assert cached["continuous, chunked, cache"] > 0 == cached["no prefix cache"]
    assert all(result["output_tokens_per_s"] > 0 for result in found["results"].values())
    kv = found["kv_tokens"]
    assert kv["mean_held"] < kv["mean_in_tables"] < kv["mean_reserved_model"]
    assert kv["max_reserved_model"] == 4 * 2048  # four tiny requests at once
    assert 0 < kv["unused_fraction"] < 0.2
    text = page.read_text()
    for name in found["results"]:
        assert text.count(f"| {name} |") == 2


def test_metrics_disagree(tmp_path: Path) -> None:
    page = tmp_path / "metrics.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    found = run("metrics_disagree.py", "--repetitions", "1", "--page", str(page))["results"]
    text = page.read_text()
    assert text.startswith("before\n<!-- measured: begin -->\nWritten by")
    assert text.endswith("<!-- measured: end -->\nafter\n")
    assert "old" not in text
    for name, numbers in found.items():
        assert f"| {name} |" in text
        if "eight" not in name and "batch" not in name and "two may run" not in name:
            # Equal lengths: the mean over gaps is the mean over requests.
            assert abs(numbers["itl_mean"] - numbers["tpot_mean"]) < 1e-9
    weighted = found["batch: one of 192 tokens, seven of 8"]
    assert abs(weighted["itl_mean"] - weighted["tpot_mean"]) > 1e-6
    assert {"the same prompt again", "cache: a prompt of 1024, first time"} <= set(found)


DEMO = ROOT / "src" / "duetto" / "demo" / "duetto-demo"


def test_quality_of_quantized_weights_on_a_trained_model() -> None:
    """int8 is said to cost at most 0.01 nats, and the likeliest token in at most 3 % of places."""
    words = ["--worlds", "--num-tokens", "12000", "--context", "512"]
    weights, kv = run("quality.py", str(DEMO), *words, "--variants", "int8", "int8 KV")
    assert weights["num_positions"] > 150
    for found in (weights, kv):
        assert 0 < found["mean_kl"] < 0.01
        assert found["mean_kl"] < found["p99_kl"]
        assert found["top1_agreement"] > 0.97
        assert abs(found["nll"] - found["baseline_nll"]) < 0.05
    assert weights["weight_bytes"] < 0.75 * kv["weight_bytes"]  # 8 bits and scales, not 12
    assert weights["kv_bytes_per_token"] == 2 * 6 * 3 * 64 * 2
    assert kv["kv_bytes_per_token"] == 2 * 6 * 3 * (64 + 4)


def test_the_parts_of_a_step_add_up(tiny_model: Path) -> None:
    found = run("step_breakdown.py", str(tiny_model), "--steps", "20", "--batch", "2")
    shares = found["shares"]
    assert abs(sum(shares.values()) - 1) < 1e-9
    assert {"schedule", "arrays", "call", "sample", "update", "detokenize"} < shares.keys()
    assert {"native: Attention", "native: norm, linear"} < shares.keys()
    assert all(-0.01 < share < 1 for share in shares.values())
    assert 0 < found["step_s"] < 1


def test_speculation(tmp_path: Path) -> None:
    """Every part, small; a second call keeps what the first one found."""
    page = tmp_path / "speculation.md"
    first = run("speculation.py", "--smoke", "--parts", "speed", "copy", "--output", str(page))
    parts = ("equality", "loss", "reader", "draft", "coupling")
    found = run("speculation.py", "--smoke", "--parts", *parts, "--output", str(page))
    kept = json.loads(page.with_suffix(".json").read_text())
    speed, loss = "speed, tiny, int8", "loss, tiny, int8"
    assert set(kept) == {"copy, tiny, int8", speed, loss, "equality", "reader", "draft", "coupling"}
    assert kept[speed]["rows"] == first[speed]["rows"]
    same = found["equality"]
    assert same["num_answers"] > 500 and not same["differing"]
    assert sum(row["num_accepted"] for row in same["rows"] if row["method"] == "draft_model") > 500
    assert any(row["num_not_greedy"] for row in same["rows"])
    assert all(row["allowed"] >= 1 and row["simulated"] > 0 for row in first[speed]["rows"])
    assert first["copy, tiny, int8"]["tokens_per_step"] > 1.2
    assert {row["batch"] for row in found[loss]["rows"]} == {1, 2}
    assert all(not row["num_accepted"] for row in found[loss]["rows"])
    assert found["draft"]["rows"][0]["tokens_per_step"] > 1.2
    for row in found["coupling"]["rows"]:
        assert row["inverse_cdf"] < row["gumbel"] < row["best"] + 0.05
    text = page.read_text()
    for title in ("The same bits", "Speed by acceptance", "of no use", "JSON", "One noise"):
        assert title in text


def test_reuse(tmp_path: Path) -> None:
    """Every part, small; a second call keeps what the first one found."""
    page = tmp_path / "reuse.md"
    first = run("reuse.py", "--smoke", "--parts", "ttft", "--output", str(page))
    parts = ("quality", "restart")
    found = run("reuse.py", "--smoke", "--parts", *parts, "--output", str(page))
    kept = json.loads(page.with_suffix(".json").read_text())
    assert set(kept) == {"ttft, tiny, int8", "quality", "restart, tiny, int8"}
    starts = {row["name"]: row["hit_rate"] for row in kept["restart, tiny, int8"]["rows"]}
    # What is loaded after the first prompt is a matter of prices, which depend on the machine.
    assert starts["no disk"] == starts["first start"] == 0 < starts["second start"] < 1
    ttft = {row["name"]: row for row in kept["ttft, tiny, int8"]["rows"]}
    assert first["ttft, tiny, int8"]["rows"] == kept["ttft, tiny, int8"]["rows"]
    # Three documents of 64 tokens, of which the first is a prefix, and a question of 8.
    counts = {"full prefill": 200, "prefix cache": 136, "none": 8, "first(16)": 40}
    # 20 of 128 tokens are chosen; hkvd looks at all of them, query twice with the question.
    counts |= {"hkvd(0.15)": 128 + 20 + 8, "query(0.15)": 8 + 20 + 8}
    assert {name: row["num_tokens"] for name, row in ttft.items()} == counts
    assert all(row["ceiling"] > 1 for row in ttft.values() if row["ratio"] is not None)
    rows = {row["name"]: row for row in found["quality"]["rows"]}
    assert rows["full prefill"]["scores"] == rows["prefix cache"]["scores"]
    assert rows["none"]["share"] == 0 < rows["first(1)"]["share"] < rows["first(8)"]["share"] < 1
    assert rows["documents(1)"]["share"] < rows["documents(3)"]["share"]
    assert rows["full prefill"]["share"] == 1
    for name in ("hkvd(0.15)", "query(0.15)", "query(0.15, 2 rounds)"):
        assert 0.15 <= rows[name]["share"] < 0.2
    text = page.read_text()
    assert "Time to first token: tiny, int8 weights" in text
    for name in (*ttft, *rows):
        assert f"| {name} |" in text


def test_structured(tiny_model: Path) -> None:
    found = run("structured.py", "--smoke", "--model", str(tiny_model))["results"]
    assert {batch for batch, each in found["per_token"].items() if each["ratio"] > 0} == {"1", "8"}
    assert found["compile"]["num_schemas"] == 4 and not found["compile"]["num_refused"]


def test_what_a_disk_gives_to_its_tier() -> None:
    found = run("tiers_disk.py", "--mib", "16", "--rounds", "1")
    assert all(found[kind]["of_plain"] > 0 for kind in ("from the disk", "from the kernel's cache"))
