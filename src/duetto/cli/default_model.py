"""Which model a command takes when none is named: the reader that ships, and it says so."""

import sys

from duetto.core.engine_args import EngineArgs
from duetto.demo import NO_MODEL_NAMED, demo_model_dir
from duetto.llm import LLM


def model_or_demo(model: str | None) -> str:
    """The model as named, or the reader's directory, with a line on stderr.

    Raises ConfigError if none is named and the reader was left out of this installation.
    """
    if model is not None:
        return model
    directory = demo_model_dir()
    say_that_none_was_named()
    return str(directory)


def open_llm(model: str | None, args: EngineArgs | None) -> LLM:
    """The model as named, or the reader, which is said once it is there: of what is refused the
    reason is the first line that is read."""
    llm = LLM(str(demo_model_dir()) if model is None else model, args=args)
    if model is None:
        say_that_none_was_named()
    return llm


def say_that_none_was_named() -> None:
    print(f"{NO_MODEL_NAMED[0].upper()}{NO_MODEL_NAMED[1:]}.", file=sys.stderr)
