"""`duetto make-model` writes a model, says what it wrote, and refuses in one line."""

import json
from pathlib import Path

import pytest
from cli.in_process import duetto

from duetto.checkpoints.shapes import SHAPES
from duetto.cli.make_model import make_model
from duetto.core.errors import CheckpointError, ConfigError
from duetto.models.programs import load_program


@pytest.fixture(autouse=True)
def little_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duetto.models.make_model._TRAINING_CHARACTERS", 50_000)


def test_a_named_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("tiny", tmp_path / "out", dtype="float32", vocab_size=300)
    config, program = load_program(tmp_path / "out")
    assert (config.dtype, config.vocab_size) == ("float32", 300)
    shown = capsys.readouterr()
    assert f"{program.num_parameters:,} random parameters, 300 tokens" in shown.out
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in shown.out
    assert shown.err == ""  # no bar where no terminal is


def test_a_config_or_a_directory_with_one(tmp_path: Path) -> None:
    config = {**SHAPES["tiny"], "model_type": "qwen3", "initializer_range": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_model(str(tmp_path / "config.json"), tmp_path / "a")
    make_model(str(tmp_path), tmp_path / "b")
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert load_program(tmp_path / "a")[0].model_type == "qwen3"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a config\.json nor one of the shapes tiny"):
        make_model("huge", tmp_path / "out")
    bad = tmp_path / "bad.json"
    bad.write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError, match=r"bad\.json: model_type: 'mamba' is not supported"):
        make_model(str(bad), tmp_path / "out")
    bad.write_text("{")
    with pytest.raises(CheckpointError, match=r"bad\.json: is not valid JSON"):
        make_model(str(bad), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_line_and_1(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    done = duetto("make-model", "tiny", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"duetto: {tmp_path}: is not empty; --force replaces the model in it"
    ]
