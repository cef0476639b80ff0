"""`duetto simulate` and `duetto plan`, as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.in_process import duetto

QUICK = (
    "llama-3.2-1b", "--num-prompts", "10", "--random-input-len", "200", "--random-output-len", "16",
    "--request-rate", "5",
)  # fmt: skip
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def document(*words: str) -> Any:
    done = duetto(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_simulate_prints_the_same_bytes_again(tmp_path: Path) -> None:
    words = ("simulate", *QUICK, "--hardware", "h100", "--seed", "3", "--slo", "ttft=1s,itl=50ms")
    outputs = []
    for number in range(2):
        trace = tmp_path / f"{number}.json"
        done = duetto(*words, "--json", "--trace-out", str(trace))
        outputs.append((done.stdout, trace.read_bytes()))
    assert outputs[0] == outputs[1]
    found = json.loads(outputs[0][0])
    assert found["completed"] == 10
    assert found["slo_ms"] == {"ttft": 1000, "itl": 50}
    assert found["slo_attainment"] == 1
    other = duetto(*words[:-1], "itl=50ms", "--json", "--random-range-ratio", "0.5", "--seed", "4")
    assert other.stdout != outputs[0][0]


def test_simulate_for_people() -> None:
    done = duetto("simulate", *QUICK, "--hardware", "h100:4", "--tp", "2", "--price", "2.5")
    assert done.returncode == 0, done.stderr
    for words in (
        "2 of 4 h100: 1 replica of 2 devices (tp 2, pp 1)",
        "TTFT",
        "busy",
        "KV",
        "for a million output tokens",
    ):
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
        (("--hardware", "h100", "--slo", "itl=50"), "itl=50ms"),
        (("--hardware", "h100", "--seed", "-1"), "--seed -1"),
        (("--hardware", "h100", "--metric-percentiles", "101"), "from 0 to 100"),
        (("--hardware", "h100", "--metric-percentiles", "50,nan"), "from 0 to 100"),
        (("--hardware", "h100", "--trace-speed", "2"), "--trace-speed: needs --trace"),
        (("--hardware", "h100", "--kv-bandwidth", "2"), "needs --prefill-replicas"),
        (("--hardware", "h100", "--max-local-prefill", "-1"), "must be 0 or more"),
        (("--hardware", "h100", "--max-model-len", "9999999"), "must be from 1 to 131072"),
        (("--hardware", "h100", "--gpu-memory-utilization", "0.01"), "it fits with"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = duetto("simulate", *QUICK, *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_weights_in_the_engines_own_word() -> None:
    words = ("simulate", *QUICK, "--hardware", "h100")
    int8 = document(*words, "--quantization", "int8")
    assert int8 == document(*words, "--dtype", "int8")
    assert "int8" in int8["layout"]


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "duetto").mkdir()
    file = tmp_path / "duetto" / "hardware.json"
    spec = {"name": "host", "peaks": {"float32": 1e12, "int8": 2e12}, "memory_bandwidth": 1e11}
    file.write_text(json.dumps(spec | {"memory_bytes": 16e9, "efficiencies": {}}))
    return file


def test_the_host_means_what_was_calibrated(calibrated: Path) -> None:
    words = ("simulate", "smollm2-135m", *QUICK[1:])
    found = document(*words, "--hardware", "host")
    assert found["completed"] == 10 and "bfloat16" in found["layout"]
    by_file = document(*words, "--hardware", str(calibrated))
    assert by_file["mean_itl_ms"] == found["mean_itl_ms"]
    int8 = document(*words, "--hardware", "host", "--quantization", "int8")
    wide = document(*words, "--hardware", "host", "--dtype", "float32")
    assert int8["mean_itl_ms"] < found["mean_itl_ms"] < wide["mean_itl_ms"]
    best = document(
        "plan", *words[1:], "--hardware", "host", "--slo", "ttft=60s", "--budgets", "512"
    )
    assert best["best"]["num_devices"] == 1 and best["best"]["layout"]["dtype"] == "bfloat16"


PLAN = ("plan", *QUICK, "--hardware", "l4:2", "--budgets", "512", "--processes", "1")


def test_plan_finds_a_layout_and_its_rate() -> None:
    found = document(*PLAN, "--slo", "ttft=1s,itl=50ms")
    assert found["best"]["meets"] and found["best"]["num_devices"] == 1
    assert found["best"]["binding"] in ("ttft", "itl")
    assert found["rate"]["requests_per_s"] > 5
    assert found["num_simulated"] <= found["num_layouts"] == len(found["layouts"])


def test_plan_for_people() -> None:
    done = duetto(*PLAN, "--slo", "ttft=1s,itl=50ms")
    assert done.returncode == 0, done.stderr
    for words in ("layouts", "p99 of ttft 1000 ms, itl 50 ms", "best: 1 device", "highest rate"):
        assert words in done.stdout


def test_plan_says_what_limits_when_nothing_will_do() -> None:
    done = duetto(*PLAN, "--slo", "ttft=2ms")
    assert done.returncode == 1 and not done.stderr
    assert "nothing meets the limits" in done.stdout
    assert "nearest: " in done.stdout and "ttft limits it" in done.stdout


def test_plan_of_a_rate_alone() -> None:
    words = ("plan", *QUICK, "--hardware", "l4:2", "--only-rate", "--slo")
    done = duetto(*words, "ttft=1s")
    assert done.returncode == 0
    assert "highest rate" in done.stdout and "best" not in done.stdout
    assert duetto(*words, "ttft=1ms").returncode == 1


def test_plan_says_that_no_layout_can_be() -> None:
    words = ("plan", "llama-3-70b", *QUICK[1:], "--hardware", "l4:1", "--slo", "ttft=1s")
    done = duetto(*words)
    assert done.returncode == 1 and "no layout can be" in done.stdout


def test_plan_tries_the_weights_that_are_asked_for() -> None:
    found = document(*PLAN, "--slo", "ttft=1s", "--dtype", "int8")
    assert {layout["layout"]["dtype"] for layout in found["layouts"]} == {"int8"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tp", "2"), "--tp: is searched; it counts with --only-rate only"),
        (("--prefill-replicas", "1"), "--no-disaggregate leaves it out"),
        (("--max-num-batched-tokens", "64"), "--budgets says which"),
        (("--no-disaggregate", "--kv-bandwidth", "3"), "needs --prefill-replicas"),
        (("--dtypes", "int8", "--dtype", "int4"), "leave one of them out"),
        (("--only-rate",), "--only-rate with --budgets"),
        (("--rows", "0"), "--rows 0: must be 1 or more"),
        (("--processes", "0"), "--processes 0: must be 1 or more"),
        (("--price", "-1"), "--price -1"),
        (("--seed", "-1"), "--seed -1"),
    ],
)
def test_what_plan_would_ignore_is_refused(words: tuple[str, ...], message: str) -> None:
    done = duetto(*PLAN[:-2], "--slo", "ttft=1s", *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize(
    "flag",
    ["--num-prompts", "--random-input-len", "--random-output-len", "--random-prefix-len"],
)
def test_a_unit_too_many_is_refused_at_once(flag: str) -> None:
    done = duetto("simulate", *QUICK, "--hardware", "h100", flag, "1T")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "at most" in done.stderr


def test_plan_needs_a_number_of_devices() -> None:
    done = duetto("plan", *QUICK, "--hardware", "h100", "--slo", "ttft=1s")
    assert done.returncode == 1
    assert "like h100:8" in done.stderr


DOCUMENTS = (
    "llama-3.2-1b", "--hardware", "h100", "--num-prompts", "30", "--random-input-len", "40",
    "--random-output-len", "4", "--random-documents", "6", "--random-num-documents", "12",
)  # fmt: skip


def test_reused_documents_are_counted_and_priced() -> None:
    plain, reused = (
        document("simulate", *DOCUMENTS),
        document("simulate", *DOCUMENTS, "--reuse", "first:16"),
    )
    assert "reuse" not in plain
    counts = reused["reuse"]
    assert counts["segments"] == 30 * 6 and counts["reused_tokens"] > 30 * 4 * 490
    names = ("exact_tokens", "reused_tokens", "recomputed_tokens", "computed_tokens")
    assert sum(counts[name] for name in names) == reused["total_input_tokens"]
    assert reused["mean_ttft_ms"] < 0.7 * plain["mean_ttft_ms"]  # in virtual time
    shown = duetto("simulate", *DOCUMENTS, "--reuse", "none").stdout
    assert "reuse: " in shown and "documents are blocks of 512 tokens, and reused by none" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reuse", "best"), "'best' is not one of none, first"),
        (("--reuse", "none", "--pp", "2"), "--reuse with --pp: not simulated"),
        (("--reuse", "none", "--random-documents", "0"), "--random-num-documents: needs"),
    ],
)
def test_reuse_that_cannot_be_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = duetto("simulate", *DOCUMENTS, *words, *("--hardware", "h100:2"))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


TIERS = ("--kv-cache-memory-bytes", "64Mi", "--kv-offloading-size", "2")


def test_simulate_tells_what_tiers_did() -> None:
    shared = ("--random-prefix-len", "512", "--random-num-prefixes", "4", "--hardware", "h100")
    words = ("simulate", *QUICK, *shared, *TIERS, "--kv-offloading-disk-size", "8")
    done = duetto(*words)
    assert done.returncode == 0, done.stderr
    for told in ("tokens of prompts found, by tier: arena", "RAM: ", "disk: ", "moves: "):
        assert told in done.stdout
    found = document(*words)
    assert "KV in 2 GiB of RAM" in found["layout"]
    tiers = found["tiers"]
    assert set(tiers["hit_rates"]) == {"arena", "ram", "disk"}
    assert tiers["ram_blocks"]["loaded"] > 0 and tiers["disk_blocks"]["stored"] > 0
