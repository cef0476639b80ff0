"""`duetto tokenize` shows every token, and learns merges."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_fallback_bpe, byte_level_bpe

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.cli.tokenize import tokenize, visible
from duetto.core.errors import CheckpointError, ConfigError

TEXT = "Naïve 你好 fox"


@pytest.fixture
def model(tmp_path: Path) -> str:
    byte_fallback_bpe().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def output_of(capsys: pytest.CaptureFixture[str], *args: Any, **kwargs: Any) -> str:
    tokenize(*args, **kwargs)
    return capsys.readouterr().out


def test_json_has_every_token(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output_of(capsys, TEXT, model=model, json_output=True))
    assert found["token_ids"] == byte_fallback_bpe().encode(TEXT).ids
    assert found["pieces"][:2] == ["<s>", "␣"]
    assert "<0xE5>" in found["pieces"]
    assert b"".join(map(bytes, found["bytes"][1:])).decode() == " " + TEXT
    assert (found["num_characters"], found["num_bytes"]) == (12, 17)
    assert found["num_tokens"] == len(found["pieces"]) == len(found["bytes"])

    without = json.loads(output_of(capsys, TEXT, model=model, json_output=True, special=False))
    assert without["token_ids"] == found["token_ids"][1:]
    assert without["characters_per_token"] == round(12 / without["num_tokens"], 4)


def test_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys, "the [bold]fox[/]", model=model)
    assert "259 ␣ 20 " in " ".join(shown.split()) and "293 th 74 68 " in " ".join(shown.split())
    assert "[" in shown.split()  # a piece is never read as markup
    assert "16 characters" in shown
    assert "\x1b" not in shown  # no colours where no terminal is


def test_long_texts_are_cut_in_the_table_only(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output_of(capsys, "x" * 500, model=model)
    assert "and 302 more; --json has them all" in shown
    assert shown.count("\n") < 210


def test_text_from_a_file_or_stdin(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = output_of(capsys, TEXT, model=model, json_output=True)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert output_of(capsys, model=model, file=tmp_path / "text.txt", json_output=True) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert output_of(capsys, model=model, json_output=True) == expected


def test_without_a_model_the_reader_splits(capsys: pytest.CaptureFixture[str]) -> None:
    tokenize("the fox", json_output=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_tokens"] > 0
    assert captured.err.startswith("No model named: this is duetto-demo")


def test_bytes_that_are_no_text_are_stdins_fault(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for errors in ("strict", "surrogateescape"):  # by the locale
        stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(ConfigError, match="stdin: is not text in UTF-8"):
            tokenize(model=model)


def test_mistakes_are_one_line(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--file: give either"):
        tokenize(TEXT, model=model, file=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as text"):
        tokenize(model=model, file=tmp_path / "missing.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"image\.png: cannot be read as text"):
        tokenize(model=model, file=tmp_path / "image.png")
    with pytest.raises(CheckpointError, match="is not a directory with a checkpoint"):
        tokenize(TEXT, model=str(tmp_path / "nothing"))


def test_training_prints_each_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text("low low lower\n")
    lines = output_of(capsys, str(path), train="bpe", merges=9).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["0", "l", "+", "o", "→", "lo", "(3)"],
        ["1", "lo", "+", "w", "→", "low", "(3)"],
        ["2", "␣", "+", "low", "→", "␣low", "(2)"],
    ]
    assert lines[3].startswith("3 merges from 4 words, 14 bytes, in ")
    assert lines[4] == "no pair occurs twice any more"
    found = json.loads(output_of(capsys, file=path, train="bpe", merges=2, json_output=True))
    assert found["merges"] == [["l", "o", 3], ["lo", "w", 3]]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b" a\n", "␣a\\n"),
        ("é你".encode(), "é你"),
        (b"\xc3", "<0xC3>"),
        (b"a\xe4\xbd", "a<0xE4><0xBD>"),
        (b"\x1b[31m", "\\x1b[31m"),  # nothing reaches the terminal as a command
        ("\u200d\u202e".encode(), "\\u200d\\u202e"),
        (b"", ""),
    ],
)
def test_pieces_are_visible(piece: bytes, shown: str) -> None:
    assert visible(piece) == shown


def test_every_token_of_a_byte_level_vocabulary_is_visible() -> None:
    tokenizer = Tokenizer(byte_level_bpe())
    for token_id in range(tokenizer.vocab_size):
        shown = visible(tokenizer.token_bytes(token_id))
        assert shown and shown.isprintable() and " " not in shown
