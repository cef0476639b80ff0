"""`duetto bench`: flags, and serve from end to end against a tiny server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from measure.fake_server import FakeServer

from duetto.cli.bench import app
from duetto.core.errors import ConfigError

FIXTURES = Path(__file__).parent.parent / "measure" / "fixtures"
AZURE = str(FIXTURES / "azure_conv_5.csv")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


def run(*words: str) -> None:
    app(list(words), exit_on_error=False, print_error=False, result_action="return_value")


def parse(*words: str) -> dict[str, Any]:
    _command, bound, _ignored = app.parse_args(list(words), exit_on_error=False, print_error=False)
    return bound.arguments


def serve_json(server: FakeServer, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    run("serve", "--base-url", server.base_url, "--json", *words)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- flags -------------------------------------------------------------------------------------


def test_the_names_of_vllm_are_accepted() -> None:
    words = """serve --backend openai --base-url http://h:8000 --model M --dataset-name random
        --random-input-len 512 --random-output-len 128 --random-range-ratio 0.5 --num-prompts 200
        --request-rate 2.5 --burstiness 0.5 --max-concurrency 16 --ignore-eos --num-warmups 2
        --metric-percentiles 50,99 --goodput ttft:200 tpot:50 --random_prefix_len 4"""
    bound = parse(*words.split())
    assert bound["arrivals"].request_rate == 2.5
    assert bound["slo"] == ("ttft:200", "tpot:50")
    assert bound["dataset"].random_prefix_len == 4
    parse(
        *[
            "latency",
            "m",
            "--input-len",
            "8",
            "--output-len",
            "8",
            "--batch-size",
            "2",
            "--num-iters",
            "3",
        ]
    )
    parse(
        *[
            "throughput",
            "m",
            "--num-prompts",
            "3",
            "--max-num-seqs",
            "4",
            "--no-enable-chunked-prefill",
        ]
    )


def test_a_rate_is_a_number_or_inf_or_trace() -> None:
    assert parse("serve", "--request-rate", "inf")["arrivals"].request_rate == float("inf")
    assert parse("serve", "--request-rate", "trace")["arrivals"].request_rate == "trace"
    with pytest.raises(Exception, match="request-rate"):
        parse("serve", "--request-rate", "fast")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slo", "ttft=fast"], "--slo: 'ttft=fast'"),
        (["--metric-percentiles", "50;99"], "--metric-percentiles '50;99'"),
        (["--extra-body", "[1]"], "--extra-body: Expected `object`"),
        (["--request-rate", "trace"], "--request-rate trace: this dataset has no times"),
        (["--request-rate", "0"], "--request-rate 0"),
        (["--max-concurrency", "0"], "--max-concurrency 0"),
        (["--timeout", "0"], "--timeout 0: must be above 0 seconds"),
        (["--timeout", "nan"], "--timeout nan: must be above 0 seconds"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--seed", "-1", "--request-rate", "2"], "--seed -1: must be 0 or more"),
        (
            ["--seed", "-1", "--dataset-name", "azure", "--dataset-path", AZURE],
            "--seed -1: must be 0 or more",
        ),
        (["--dataset-name", "azure"], "--dataset-name azure needs a file"),
    ],
)
def test_bad_flags_are_one_line(server: FakeServer, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("serve", "--base-url", server.base_url, *words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_server_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        run("serve", "--base-url", "http://127.0.0.1:1")
    assert "nothing answers at http://127.0.0.1:1" in str(caught.value)
    assert "--model" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_seed_below_0_is_refused_here_too(tiny_model: Path) -> None:
    for words in (["latency"], ["throughput"]):
        with pytest.raises(ConfigError, match="--seed -1: must be 0 or more"):
            run(*words, str(tiny_model), "--seed", "-1")


# --- serve -------------------------------------------------------------------------------------


def test_the_last_line_is_one_document(
    server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "result.json"
    words = "--num-prompts 4 --random-output-len 2 --random-input-len 6 --max-concurrency 2"
    shown = serve_json(
        server, capsys, *words.split(), "--slo", "ttft=10s,itl=10s",
        "--result-filename", str(saved), "--save-detailed",
    )  # fmt: skip
    assert (shown["completed"], shown["failed"]) == (4, 0)
    assert (shown["request_rate"], shown["max_concurrency"]) == ("inf", 2)
    assert shown["model_id"] == "fake-model"
    assert shown["slo_ms"] == {"ttft": 10_000, "itl": 10_000}
    assert shown["goodput"] == shown["request_throughput"] > 0
    whole = json.loads(saved.read_text())
    assert len(whole["ttfts"]) == 4
    assert whole["mean_itl_ms"] == shown["mean_itl_ms"]


def test_a_trace_at_its_own_times(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    shown = serve_json(
        server, capsys, "--dataset-name", "azure", "--dataset-path",
        str(FIXTURES / "azure_conv_5.csv"), "--num-prompts", "3", "--request-rate", "trace",
        "--trace-speed", "20", "--max-output-len", "1", "--trace-length-scale", "0.1",
    )  # fmt: skip
    assert shown["completed"] == 3
    # The third arrives 4.54 s after the first, at twenty times the speed.
    assert 0.22 < shown["duration"] < 1.5
    assert shown["notes"] == ["lengths are times 0.1", "3 of 3 outputs are cut to 1 tokens"]


def test_sharegpt_over_chat(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    shown = serve_json(
        server, capsys, "--backend", "openai-chat", "--dataset-name", "sharegpt",
        "--dataset-path", str(FIXTURES / "sharegpt_4.json"), "--sharegpt-output-len", "2",
    )  # fmt: skip
    assert shown["completed"] == 2
    assert shown["total_output_tokens"] == 4


def test_people_get_a_table(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "serve", "--base-url", f"{server.base_url}/v1/", "--num-prompts", "1",
        "--random-output-len", "2",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert "TTFT" in captured.out
    assert "1 of 1 requests answered" in captured.out
    assert captured.err == ""  # no terminal, no progress bar


# --- in this process ---------------------------------------------------------------------------


def test_latency(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--input-len 4 --output-len 3 --batch-size 2 --num-iters 2 --num-iters-warmup 1 --json"
    run("latency", str(tiny_model), *words.split())
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(shown["latencies"]) == 2
    assert shown["completed"] == 4
    assert shown["total_output_tokens"] == 12
    assert shown["total_cached_tokens"] == 0


def test_without_a_model_the_reader_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--num-prompts 1 --random-input-len 4 --random-output-len 2 --json"
    run("throughput", *words.split())
    words = "--input-len 4 --output-len 2 --batch-size 1 --num-iters 1 --num-iters-warmup 0 --json"
    run("latency", *words.split())
    captured = capsys.readouterr()
    assert [json.loads(line)["completed"] for line in captured.out.splitlines()] == [1, 1]
    assert captured.err.count("No model named") == 2


def test_throughput(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--num-prompts 3 --random-input-len 4 --random-output-len 3 --random-prefix-len 64"
    run("throughput", str(tiny_model), *words.split(), "--json")
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["completed"] == 3
    assert shown["total_num_tokens"] == 3 * (64 + 4 + 3)
    assert shown["total_cached_tokens"] == 2 * 64  # the first computes the prefix for the others
    assert sum(shown["mean_parts_ms"].values()) == pytest.approx(shown["mean_e2el_ms"])
