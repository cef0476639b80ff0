"""`duetto run-batch`: a real model answers a file, and goes on where it was stopped."""

import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from cli.in_process import duetto


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(path: Path, *names: str, **more: object) -> None:
    body = {"model": "tiny", "prompt": "the dog", "max_tokens": 3, "ignore_eos": True, **more}
    one = {"method": "POST", "url": "/v1/completions", "body": body}
    path.write_text("".join(json.dumps({"custom_id": name, **one}) + "\n" for name in names))


def test_a_file_is_answered_and_what_is_there_stays(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ask(source, "a", "b", "c")
    first = duetto("run-batch", "-i", source, "-o", target, tiny_model)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"3 answered, 0 failed: {target}\n"
    told = lines_of(target)
    assert {line["custom_id"] for line in told} == {"a", "b", "c"}
    for line in told:
        assert line["response"]["body"]["usage"]["completion_tokens"] == 3
        assert line["response"]["body"]["model"] == "tiny"

    ask(source, "a", "b", "c", "d")
    again = duetto("run-batch", "-i", source, "-o", target, tiny_model, "--json")
    counts = json.loads(again.stdout)
    assert (counts["num_answered"], counts["num_skipped"]) == (1, 3)
    assert lines_of(target)[:3] == told


def test_the_models_names_are_as_they_are_served(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ask(source, "a", model="gpt-4o")
    command = ("run-batch", "-i", source, "-o", target, tiny_model)
    for told in (duetto(*command), duetto(*command)):  # the second finds it there
        assert told.stdout.startswith("0 answered, 1 failed") or "1 of them failures" in told.stdout
        assert told.returncode == 1
    assert lines_of(target)[0]["response"]["status_code"] == 404
    target.unlink()
    named = ("--served-model-name", "x", "--served-model-name", "gpt-4o")
    assert duetto(*command, *named).stdout.startswith("1 answered, 0 failed")
    assert lines_of(target)[0]["response"]["body"]["model"] == "x"
    target.unlink()
    assert duetto(*command, "--any-model-name").stdout.startswith("1 answered, 0 failed")


def test_files_that_are_not_there_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    told = duetto("run-batch", "-i", source, "-o", tmp_path / "out.jsonl", "no/such")
    assert (told.returncode, "--input-file" in told.stderr) == (1, True)
    ask(source, "a")
    told = duetto("run-batch", "-i", source, "-o", tmp_path / "no" / "out.jsonl", "no/such")
    assert (told.returncode, "--output-file" in told.stderr) == (1, True)


def test_who_interrupts_it_is_told_how_to_go_on(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ask(source, "a", max_tokens=100, n=50)  # not done before it is first asked whether to stop
    with (
        patch("duetto.server.batch_file.LOOK_S", 0.0),
        patch("duetto.cli.run_batch.first_interrupt", lambda: nullcontext(lambda: True)),
    ):
        told = duetto("run-batch", "-i", source, "-o", target, tiny_model)
    assert told.returncode == 130
    assert told.stdout == f"0 answered, 0 failed: {target}\n"
    assert "the same command goes on from here" in told.stderr
