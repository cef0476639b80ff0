"""The record of a climb says what each rung took, and what all of them took together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training needs the train extra")

from training.checkpoint import Progress
from training.record import table, write_record
from training.shapes import named_shape


def score(rung, step, num_tokens, seconds, share):
    exact = {"recall": share}
    return {
        "rung": rung,
        "step": step,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "exact": exact,
    }


def test_each_rung_counts_from_the_one_before(tmp_path):
    scores = [
        score("pairs-4", 50, 1_000_000, 60.0, 0.5),
        score("pairs-4", 100, 2_000_000, 120.0, 0.96),
        score("alike", 50, 5_000_000, 300.0, 0.9),
    ]
    file = tmp_path / "deep" / "record.json"
    write_record(Progress(scores=scores), named_shape("nano", 968), 3, "cpu", file)
    lines = table(json.loads(file.read_text())).splitlines()
    assert "seed 3" in lines[0]
    assert lines[2].split() == ["pairs-4", "100", "2.00", "2.0", "recall", "96.0%"]
    assert lines[3].split() == ["alike", "50", "3.00", "3.0", "recall", "90.0%"]
    assert lines[4].split() == ["all", "together", "150", "5.00", "5.0"]


def test_a_record_is_read_without_torch():
    root = Path(__file__).parents[2]
    record = root / "docs" / "benchmarks" / "training-reader.json"
    code = "import runpy, sys; sys.modules['torch'] = None; "
    code += "runpy.run_module('training.record', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code, str(record)], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "all together" in run.stdout
