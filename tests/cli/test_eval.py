"""`duetto eval`: the same answers from a model here and from one that is served."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duetto.cli.eval import evaluate
from duetto.core.errors import ConfigError

FEW = {"num_questions": 8, "num_documents": (2,)}


def run_json(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> Any:
    evaluate(*arguments, **FEW, as_json=True, **options)
    captured = capsys.readouterr()
    assert captured.err == ""  # no terminal, no progress bar
    return json.loads(captured.out.splitlines()[-1])


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "duetto", "serve", str(tiny_model), "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        found = (re.search(r"http://[\d.]+:\d+", line) for line in server.stdout)
        yield next(match[0] for match in found if match)
        server.terminate()


def test_a_random_model_knows_nothing(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, str(tiny_model))
    assert shown["model"] == str(tiny_model)
    assert (shown["kv"], shown["quantization"], shown["with_documents"]) == ("full", "none", True)
    assert shown["num_failed"] == 0
    assert {row["kind"] for row in shown["rows"]} >= {"one_hop", "two_hop", "not_stated"}
    assert {row["exact_match"] for row in shown["rows"]} == {0.0}


def test_a_served_model_is_asked_the_same(
    tiny_model: Path, served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = run_json(capsys, str(tiny_model))
    there = run_json(capsys, base_url=f"{served}/v1/")
    assert there.pop("model") == "tiny"
    here.pop("model")
    assert there == here


def test_a_quantized_model_is_asked_the_same(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run_json(capsys, str(tiny_model), quantization="int8")
    assert (shown["quantization"], shown["num_failed"]) == ("int8", 0)
    with pytest.raises(ConfigError, match="--quantization int8 and --base-url"):
        evaluate(quantization="int8", base_url="http://127.0.0.1:1", **FEW)


def test_people_get_a_table(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(str(tiny_model), **FEW, documents=False)
    out = capsys.readouterr().out
    assert "95 % interval" in out
    assert re.search(r"removed +shuffled +one_hop +1 +0\.0% +0\.0% to", out)


def test_without_a_model_the_reader_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(num_questions=3, num_documents=(1,), as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["model"].endswith("duetto-demo")
    assert captured.err.startswith("No model named")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m", "kv": "blended"}, "--kv blended: must be one of full"),
        ({"base_url": "http://127.0.0.1:1"}, "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(**FEW | options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
