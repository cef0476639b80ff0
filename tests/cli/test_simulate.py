"""`duetto simulate` and `duetto plan`, as they are typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = ("llama-3.2-1b", "--num-prompts", "20", "--random-input-len", "200", "--request-rate", "5")
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def duetto(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duetto", *words], capture_output=True, text=True, check=False
    )


def document(*words: str) -> Any:
    done = duetto(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_simulate_prints_the_same_bytes_again(tmp_path: Path) -> None:
    words = ("simulate", *QUICK, "--hardware", "h100", "--seed", "3", "--slo", "ttft=1,itl=50ms")
    outputs = []
    for number in range(2):
        trace = tmp_path / f"{number}.json"
        done = duetto(*words, "--json", "--trace-out", str(trace))
        outputs.append((done.stdout, trace.read_bytes()))
    assert outputs[0] == outputs[1]
    found = json.loads(outputs[0][0])
    assert found["completed"] == 20
    assert found["slo_ms"] == {"ttft": 1000, "itl": 50}
    assert found["slo_attainment"] == 1
    other = duetto(*words[:-1], "itl=50ms", "--json", "--random-range-ratio", "0.5", "--seed", "4")
    assert other.stdout != outputs[0][0]


def test_simulate_for_people() -> None:
    done = duetto("simulate", *QUICK, "--hardware", "h100:4", "--tp", "2", "--price", "2.5")
    assert done.returncode == 0, done.stderr
    for words in ("2 x h100:4", "TTFT", "busy", "KV", "for a million output tokens"):
        assert words in done.stdout


def test_simulate_apart() -> None:
    words = ("--hardware", "h100:4", "--replicas", "2", "--prefill-replicas", "1")
    found = document("simulate", *QUICK, *words, "--kv-bandwidth", "1")
    assert found["num_devices"] == 3
    assert set(found["pools"]) == {"prefill", "decode"}
    assert found["mean_kv_transfer_ms"] > 0


def test_a_bad_trace_is_one_line_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(HEADER + "2023-11-16 18:15:46.6805900,374,-4\n")
    done = duetto("simulate", "llama-3.2-1b", "--hardware", "h100", "--trace", str(file))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"duetto: {file}:2: GeneratedTokens is '-4'; accepted: a whole number of 1 or more"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hardware", "h9"), "accepted: a100-80g, h100"),
        (("--hardware", "h100", "--tp", "5"), "the nearest that do"),
        (("--hardware", "h100", "--slo", "speed=1"), "--slo: 'speed=1'"),
        (("--hardware", "h100", "--price", "-1"), "--price -1"),
        (("--hardware", "h100", "--gpu-memory-utilization", "0.01"), "it fits with"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = duetto("simulate", *QUICK, *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


PLAN = ("plan", *QUICK, "--hardware", "l4:2", "--budgets", "512", "--processes", "1")


def test_plan_finds_a_layout_and_its_rate() -> None:
    found = document(*PLAN, "--slo", "ttft=1,itl=0.05")
    assert found["best"]["meets"] and found["best"]["num_devices"] == 1
    assert found["best"]["binding"] in ("ttft", "itl")
    assert found["rate"]["requests_per_s"] > 5
    assert found["num_simulated"] <= found["num_layouts"] == len(found["layouts"])


def test_plan_for_people() -> None:
    done = duetto(*PLAN, "--slo", "ttft=1,itl=0.05")
    assert done.returncode == 0, done.stderr
    for words in ("layouts", "best: 1 device", "binds", "highest rate"):
        assert words in done.stdout


def test_plan_says_what_limits_when_nothing_will_do() -> None:
    done = duetto(*PLAN, "--slo", "ttft=0.002")
    assert done.returncode == 0, done.stderr
    assert "nothing meets the limits" in done.stdout
    assert "nearest: " in done.stdout and "ttft limits it" in done.stdout


def test_plan_of_a_rate_alone() -> None:
    done = duetto(*PLAN, "--slo", "ttft=1", "--only-rate")
    assert "highest rate" in done.stdout and "best" not in done.stdout


def test_plan_needs_a_number_of_devices() -> None:
    done = duetto("plan", *QUICK, "--hardware", "h100", "--slo", "ttft=1")
    assert done.returncode == 1
    assert "like h100:8" in done.stderr
