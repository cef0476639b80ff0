"""`duetto complete`: continue a text, in this process."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from duetto.cli.default_model import open_llm
from duetto.cli.interrupt import INTERRUPTED
from duetto.cli.output import JsonFlag
from duetto.cli.stdin import read_stdin
from duetto.cli.stream import print_answer, stats_line, was_interrupted
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.sampling_params import SamplingParams


def complete(
    words: Annotated[tuple[str, ...], Parameter(name="[MODEL] PROMPT", show_default=False)] = (),
    /,
    *,
    model: str | None = None,
    prompt: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    ignore_eos: bool = False,
    stats: bool = True,
    as_json: JsonFlag = False,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Continue a text and stream it to stdout.

    Parameters
    ----------
    words
        The text to continue, alone or after a model: complete "text", complete MODEL "text". Read
        from stdin if left out.
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    prompt
        The text, by name.
    max_tokens
        The most tokens to generate.
    temperature
        0 is greedy.
    top_p
        Keep the likeliest tokens of this total probability.
    top_k
        Keep this many of the likeliest tokens; 0 keeps all.
    stop
        Texts that end the answer.
    ignore_eos
        Go on after the end of sequence.
    stats
        Print counts and timings to stderr at the end.
    as_json
        The last line of stdout is one JSON document: the text, counts and timings.
    """
    model, prompt = tell_apart(words, model, prompt)
    text = read_stdin() if prompt is None else prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with open_llm(model, args) as llm:
        output = print_answer(llm, lambda: {"prompt": text}, params, as_json=as_json)
    if stats and not as_json:
        print(stats_line(output), file=sys.stderr)
    if was_interrupted(output):
        sys.exit(INTERRUPTED)


def tell_apart(
    words: tuple[str, ...], model: str | None, prompt: str | None
) -> tuple[str | None, str | None]:
    """The model and the prompt of a command line; None for what is not there.

    Two words are the model and the prompt. One is the prompt, but for a checkpoint's directory,
    whose prompt is on stdin. Raises ConfigError for what could be meant in two ways.
    """
    if len(words) > 2 or len(words) + (model is not None) + (prompt is not None) > 2:
        raise ConfigError(
            'at most one model and one prompt: duetto complete MODEL "text" (a text of several '
            "words stands in quotes)"
        )
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return model, prompt
    (word,) = words
    if prompt is not None:
        return word, prompt
    if model is not None or not _is_there(word):
        return model, word
    if (Path(word) / "config.json").is_file():
        return word, None
    raise ConfigError(
        f"{word}: is a file or directory, and no checkpoint; say which is meant: --model {word}, "
        f"or --prompt {word} for the word itself"
    )


def _is_there(word: str) -> bool:
    try:
        return bool(word) and Path(word).exists()
    except (OSError, ValueError):  # a long text, or one with a zero byte, is no name of a file
        return False
