"""`duetto bench schedulers`: one load through every scheduler, real and simulated."""

import json
from pathlib import Path

import pytest
from cli.in_process import duetto

QUICK = ("--num-prompts", "6", "--request-rate", "30", "--input-len", "24", "--output-len", "6")
KINDS = ["static", "continuous", "chunked", "chunked, 2 replicas", "disaggregated"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    assert duetto("make-model", "tiny", folder).returncode == 0
    return folder


def test_every_scheduler_real_and_simulated(model: Path) -> None:
    done = duetto("bench", "schedulers", model, *QUICK, "--threads", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found["simulated"]) == KINDS == list(found["real"])
    for report in (*found["real"].values(), *found["simulated"].values()):
        assert report["completed"] == 6 and report["median_ttft_ms"] > 0
    lengths = {
        r["total_output_tokens"] for r in (*found["real"].values(), *found["simulated"].values())
    }
    assert len(lengths) == 1  # one load
    assert found["request_rate"] == 30 and found["threads"] == 2


def test_a_table_for_people(model: Path) -> None:
    done = duetto("bench", "schedulers", model, *QUICK, "--only-simulated", "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert [line for line in lines if line in KINDS] == KINDS


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--repetitions", "0"), "--repetitions 0"),
        (("--kv-bandwidth", "0"), "--kv-bandwidth"),
        (("--input-len", "100000"), "--input-len 100000"),
        (("--request-rate", "0"), "--request-rate"),
        (("--slo", "ttft=5"), "needs a unit"),
    ],
)
def test_what_cannot_be_is_one_line(model: Path, words: tuple[str, ...], why: str) -> None:
    done = duetto("bench", "schedulers", model, *words)
    assert done.returncode == 1 and why in done.stderr
    assert len(done.stderr.splitlines()) == 1
