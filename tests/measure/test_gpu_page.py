"""The page of GPU figures: made of recorded JSON, without a GPU and without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_bytes": 85 * 10**9,
    "multiprocessors": 132,
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-12-01",
    "commit": "abc1234",
}


def step(batch: int, context: int, ours_s: float, torch_s: float | None, of_read: float) -> dict:
    return {"at": [batch, context], "ours_s": ours_s, "torch_s": torch_s, "of_read": of_read}


FOUND = {
    "smoke": {"relative_error": 0.001},
    "roofs": {
        "read_bandwidth": 2.7e12,
        "copy_bandwidth": 3.0e12,
        "peaks": {"bfloat16": 7.9e14, "float32": 5e13},
    },
    "decode": {
        "model": "llama-3-8b",
        "graphs": {"seconds": 3.0, "count": 23},
        "steps": [
            step(1, 1024, 6.2e-3, 7.5e-3, 0.91),
            step(8, 1024, 6.4e-3, None, 0.92),
            step(32, 1024, 7.9e-3, 8.1e-3, 0.88),
        ],
    },
    "small": {
        "model": "llama-3.2-1b",
        "graphs": {"seconds": 3.0, "count": 23},
        "steps": [step(1, 1024, 1.5e-3, None, 0.62)],
    },
    "bits": {"dtype": "bfloat16", "axes": ["alone or in company"], "library": {"o": False}},
    "prefill": {
        "prompts": [{"tokens": 512, "seconds": 0.0138, "flops": 7.2e12, "of_product": 0.66}],
        "attention": {"tokens": 8192, "ours_s": 2e-3, "torch_s": 1.4e-3},
    },
    "quantized": {
        "weights": [
            {"format": "bfloat16", "seconds": 6.2e-3, "of_read": 0.9},
            {"format": "int8", "seconds": 3.6e-3, "of_read": 0.8},
            {"format": "int4", "seconds": 3.1e-3, "of_read": 0.6},
        ]
    },
    "greedy": {"types": {"llama": {"compared": 140, "tokens": 144}}},
    "tests": {"counts": {"passed": 300}, "whole": False},
    "load": {
        "file_bytes": 16 * 10**9,
        "written_s": 9.0,
        "started_s": 8.0,
        "first_answer_s": 0.05,
    },
    "generate": {
        "prompt": 960,
        "answer": 128,
        "batches": [
            {"batch": 1, "tokens_per_s": 155.0, "mean_tokens_per_s": 154.0, "of_graph": 0.96}
        ],
    },
    "server": {
        "streams": 64,
        "target_itl_ms": 17.0,
        "step_ms": 9.5,
        "worst_itl_ms": 20.0,
        "p99_itl_ms": 16.0,
        "median_itl_ms": 10.0,
        "worst_of_step": 2.1,
        "output_throughput": 4000.0,
        "completed": 192,
    },
    "transformers": {"version": "5.17.0", "batches": [{"batch": 1, "prompt_s": 1, "step_s": 0.09}]},
    "calibrate": {"steps": [{"step": "B = 1", "measured_s": 6.2e-3, "predicted_s": 6.5e-3}]},
    "sanitizer": {
        "tools": {"memcheck": {"summary": ["0 errors"], "counts": {"passed": 12}}},
    },
    "tuning": {
        "tried": 40,
        "other_bits": ["int8 o_proj 1 rows: 64 x 16"],
        "seconds": 60.0,
        "best": [
            {
                "kernel": "linear",
                "shape": "4096 x 4096",
                "rows": 1,
                "now_s": 1.5e-5,
                "best_s": 1.4e-5,
                "best": "64 x 16 x 256",
            }
        ],
    },
}


@pytest.fixture
def gpu_page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import page  # noqa: PLC0415

    return page


def results(parts: dict) -> dict:
    done = {"state": "done", "seconds": 1.0, "error": ""}
    return {"about": ABOUT, "parts": {name: done | {"found": f} for name, f in parts.items()}}


def test_every_part_has_its_table(gpu_page) -> None:
    assert set(gpu_page.TABLES) >= {part.name for part in gpu_page.PARTS}
    for name, found in FOUND.items():
        assert gpu_page.TABLES[name](found), name
    assert set(FOUND) == set(gpu_page.TABLES)


def test_targets_are_met_or_missed(gpu_page) -> None:
    decode = "\n".join(gpu_page.TABLES["decode"](FOUND["decode"]))
    assert "of reading, the worst: 0.88, asked for >= 0.9: **missed**" in decode
    assert "faster than plain torch, B = 1: 1.21, asked for >= 1.15: met" in decode
    assert "faster than plain torch, B = 32: 1.03, asked for >= 1.05: **missed**" in decode
    small = "\n".join(gpu_page.TABLES["small"](FOUND["small"]))
    assert "of reading: 0.62, asked for >= 0.6: met" in small
    quantized = "\n".join(gpu_page.TABLES["quantized"](FOUND["quantized"]))
    assert "int8 beside bf16: 1.72, asked for >= 1.6: met" in quantized
    assert "int4 beside bf16: 2.00, asked for >= 2.4: **missed**" in quantized
    server = "\n".join(gpu_page.TABLES["server"](FOUND["server"]))
    assert "decode steps in the longest gap: 2.10, asked for <= 2: **missed**" in server


def test_what_failed_or_did_not_run_is_said(gpu_page) -> None:
    found = results({"roofs": FOUND["roofs"]})
    error = "Traceback\nLookupError: no such thing"
    found["parts"]["greedy"] = {"state": "failed", "seconds": 2.0, "found": {}, "error": error}
    text = gpu_page.page(found)
    assert "NVIDIA H100 80GB HBM3" in text and "Reading 2.70 TB/s" in text
    assert "LookupError: no such thing" in text
    assert text.count("Not run.") == len(gpu_page.PARTS) - 2
    assert "## Before the backend was written" in text


def test_a_rehearsal_makes_no_page_and_no_file_an_empty_one(gpu_page, tmp_path) -> None:
    with pytest.raises(ValueError, match="figures mean nothing"):
        gpu_page.page({"about": {"name": "rehearsal on a CPU"}, "parts": {}})
    script, out = BENCHMARKS / "gpu" / "page.py", tmp_path / "page.md"
    command = [sys.executable, str(script), str(tmp_path / "gpu.json"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert "has not run on a GPU yet" in out.read_text()
    (tmp_path / "gpu.json").write_text(json.dumps(results(FOUND)))
    subprocess.run(command, check=True, capture_output=True)
    assert "One kernel beside its twin" in out.read_text()
