"""`duetto calibrate-reuse`: what it measures, keeps, prints and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.in_process import duetto

from duetto.build import build, model_key, reuse_rules
from duetto.cli.calibrate_reuse import CHOICES, _possible, calibrate_reuse
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import ReuseChoice, ReuseLimits, parse_reuse
from duetto.demo import READER, demo_model_dir
from duetto.evals.reuse_verdicts import refusal, verdict_file
from duetto.models.make_model import make_model
from duetto.program.reuse import reuse_limits

FEW: dict[str, Any] = {"num_questions": 16, "seed": 5, "choices": ("none", "first:1000")}
ONE_THREAD = EngineArgs(threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "duetto" / "reuse"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> Any:
    calibrate_reuse(*arguments, **FEW | {"args": ONE_THREAD} | options, as_json=True)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_measures_and_a_server_can_ask(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    shown = run_json(capsys, READER)
    assert shown["model"] == READER
    none, every = shown["choices"]
    assert (none["choice"], every["choice"]) == ("none", "first:1000")
    assert every["kl"] == 0.0
    assert every["agreement"] == 1.0
    assert every["scores"]["all"]["num_asked"] == 16
    assert none["scores"]["two_hop"]["reused"] < none["scores"]["two_hop"]["full"]
    assert not none["is_good_enough"]
    assert none["faults"]
    built = build(READER, ONE_THREAD)
    key = model_key(built)
    assert Path(shown["file"]) == verdict_file(key) == cache / f"{key}.json"
    assert "none changes too many answers of this model" in (refusal(key, "none") or "")
    strict = reuse_rules(built, None, allow_unmeasured=False)
    asked = strict.asked(ReuseChoice("none"), (TokenRange(1, 9),)).refusal
    assert "none changes too many answers" in str(asked)
    assert str(asked).endswith("; --allow-unmeasured-reuse lets the server take it")
    anyway = reuse_rules(built, ReuseChoice("none"), allow_unmeasured=True)
    assert anyway.asked(ReuseChoice("none"), (TokenRange(1, 9),)).refusal is None


def test_other_numbers_are_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_json(capsys, READER)
    quantized = EngineArgs(threads=1, kv_cache_dtype="int8")
    other = run_json(capsys, READER, args=quantized)
    assert plain["file"] != other["file"]
    assert plain["numerics"] != other["numerics"]
    assert run_json(capsys, READER, show=True) == plain


def test_what_was_measured_before_stays(capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, READER)
    again = run_json(capsys, READER, choices=("first:2",))
    assert [row["choice"] for row in again["choices"]] == ["none", "first:1000", "first:2"]


def test_what_few_questions_say_is_told_and_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    before = run_json(capsys, READER)
    assert before.pop("not_kept") == []
    few: dict[str, Any] = {"num_questions": 8, "choices": ("first:1000", "first:2")}
    after = run_json(capsys, READER, **few)
    (not_kept,) = after.pop("not_kept")
    assert not_kept["choice"] == "first:1000" and not_kept["kept_num_asked"] == 16
    assert not_kept["scores"]["all"]["num_asked"] == 8
    assert after["choices"][:2] == before["choices"]
    assert after["choices"][2]["scores"]["all"]["num_asked"] == 8  # there were none before
    calibrate_reuse(READER, **FEW | few, args=ONE_THREAD)
    *_, last = capsys.readouterr().out.splitlines()
    start = "first:1000: not kept, as 8 questions say less than the 16 of 20"
    assert last.startswith(start) and last.endswith(f"To begin anew, remove {before['file']}")


def test_people_get_a_table_and_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_reuse(READER, **FEW, args=ONE_THREAD)
    out = capsys.readouterr().out
    header, none, every, *lines = out.splitlines()
    for heading in ("choice", "agreement", "KL", "right", "full", "two_hop", "verdict"):
        assert heading in header
    assert none.split()[0] == "none"
    assert none.split()[-1] == "refused"
    assert every.split()[:3] == ["first:1000", "100.0%", "0.0000"]
    assert any(line.startswith("none: it answers ") for line in lines)
    assert "kept in" in lines[-1]
    calibrate_reuse(READER, show=True, args=ONE_THREAD)
    assert capsys.readouterr().out == out


def test_a_file_of_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.jsonl"
    asked = {
        "documents": ["Bandyne was set up by Tovard.", "Fenlux was founded by Gormund."],
        "question": "Who founded Fenlux?",
        "answer": "Gormund",
    }
    file.write_text(json.dumps(asked) + "\n")
    (row, _) = run_json(capsys, READER, questions=file)["choices"]
    assert row["source"].startswith("own.jsonl (")
    assert row["scores"]["question"]["num_asked"] == 1
    assert row["scores"]["question"]["full"] == 1.0


def test_without_a_model_the_reader_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_reuse(**FEW | {"num_questions": 4}, args=ONE_THREAD)
    captured = capsys.readouterr()
    assert captured.err.startswith("No model named")
    assert "duetto-demo, cpu" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ("some",)}, "--choices.method: 'some' is not one of none, first"),
        ({"choices": ("first",)}, "--choices.num_first: method first needs it"),
        ({"choices": ("off",)}, "--choices off: is a full prefill"),
        ({"choices": ()}, "--choices: names none"),
        ({"num_questions": 0}, "--num-questions 0: must be 1 or more"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
        ({"max_answer_tokens": 0}, "--max-answer-tokens 0: must be 1 or more"),
        ({"questions": Path("nowhere.jsonl")}, "--questions nowhere.jsonl: No such file"),
        ({"show": True}, "--show: nothing is kept"),
        (
            {"args": EngineArgs(speculative_config='{"method": "ngram"}')},
            "--speculative-config and calibrate-reuse",
        ),
        (
            {"args": EngineArgs(enable_prefix_caching=False)},
            "question 1: reuse: needs the prefix cache",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        calibrate_reuse(READER, **FEW | options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_this_model_cannot_do_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((demo_model_dir(READER) / "config.json").read_text())
    make_model(config | {"num_hidden_layers": 1}, tmp_path / "one")
    limits = reuse_limits(build(tmp_path / "one", ONE_THREAD).model.program)
    all_of_them = [choice for word in CHOICES if (choice := parse_reuse(word))]
    possible = _possible(all_of_them, limits, is_asked=False)
    assert {choice.method for choice in possible} == {"none", "first", "query"}
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: not measured: ") and note.endswith("this model has 1")
    with pytest.raises(ConfigError, match=r"--choices hkvd:0.05: .* this model has 1"):
        _possible(all_of_them, limits, is_asked=True)
    with pytest.raises(ConfigError, match="--choices none: not moved: no rotation"):
        _possible(all_of_them, ReuseLimits("no rotation"), is_asked=False)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        calibrate_reuse("nowhere", **FEW)


def test_nothing_is_kept_of_what_fails(cache: Path) -> None:
    with pytest.raises(ConfigError):
        calibrate_reuse(READER, **FEW, args=EngineArgs(enable_prefix_caching=False))
    assert not cache.exists()


def test_a_damaged_verdict_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(run_json(capsys, READER)["file"])
    file.write_text("{")
    run = duetto("calibrate-reuse", READER, "--show", "--threads", "1")
    assert run.returncode == 1
    assert run.stderr.startswith(f"duetto: {file} cannot be read")
    assert len(run.stderr.splitlines()) == 1
