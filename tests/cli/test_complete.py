"""`duetto complete`: which word is the model and which is the prompt."""

from pathlib import Path

import pytest
from cli.in_process import duetto

from duetto.cli.complete import complete, tell_apart
from duetto.core.errors import ConfigError
from duetto.llm import LLM


@pytest.mark.parametrize(
    ("words", "model", "prompt", "found"),
    [
        (("a text",), None, None, (None, "a text")),
        (("word",), None, None, (None, "word")),
        (("org/name",), None, None, (None, "org/name")),  # and/or, say
        (("",), None, None, (None, "")),
        (("x" * 5000,), None, None, (None, "x" * 5000)),
        (("a\0b",), None, None, (None, "a\0b")),
        (("m", "a text"), None, None, ("m", "a text")),
        (("a text",), "m", None, ("m", "a text")),
        (("m",), None, "a text", ("m", "a text")),
        ((), "m", "a text", ("m", "a text")),
        ((), "m", None, ("m", None)),
        ((), None, None, (None, None)),
    ],
)
def test_one_word_is_the_prompt(
    words: tuple[str, ...], model: str | None, prompt: str | None, found: tuple[str | None, ...]
) -> None:
    assert tell_apart(words, model, prompt) == found


def test_a_checkpoint_alone_has_its_prompt_on_stdin(tiny_model: Path) -> None:
    assert tell_apart((str(tiny_model),), None, None) == (str(tiny_model), None)


def test_what_could_be_meant_in_two_ways_is_asked_about(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match=r"say which is meant: --model .*, or --prompt"):
        tell_apart((str(file),), None, None)
    assert tell_apart((str(file),), "m", None) == ("m", str(file))


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [(("a", "b", "c"), None, None), (("a", "b"), "m", None), (("a",), "m", "b")],
)
def test_more_than_a_model_and_a_prompt_is_refused(
    words: tuple[str, ...], model: str | None, prompt: str | None
) -> None:
    with pytest.raises(ConfigError, match="at most one model and one prompt"):
        tell_apart(words, model, prompt)


def test_a_text_alone_goes_to_the_model_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    complete(("Hello",), max_tokens=2)
    assert "No model named: this is duetto-demo" in capsys.readouterr().err


def test_llm_takes_the_model_that_ships(caplog: pytest.LogCaptureFixture) -> None:
    with LLM() as unnamed, LLM("duetto-demo") as named:
        assert "no model named: this is duetto-demo" in caplog.text
        first, second = (llm.generate("Hello")[0].outputs[0].token_ids for llm in (unnamed, named))
    assert first == second


def test_llm_stops_between_two_steps() -> None:
    with LLM("duetto-demo") as llm:
        seen: list[str] = []
        llm.is_stopped = lambda: len(seen) > 2
        for output in llm.stream("Once upon a time there was"):
            seen.append(output.outputs[0].text)
        assert output.finished and output.outputs[0].finish_reason in ("abort", "stop")
        llm.is_stopped = lambda: True
        (output,) = llm.generate("Hello")
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("abort", [])


@pytest.mark.parametrize(
    "words", [("complete", "--prompt", "hi"), ("chat", "-q", "hi"), ("serve", "--port", "0")]
)
def test_what_is_wrong_with_a_draft_is_the_first_line(words):
    run = duetto(*words, "--speculative-model", "nonsense")
    assert run.returncode and run.stderr.startswith("duetto: --speculative-config: the draft model")
