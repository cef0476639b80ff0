"""Which model a command takes when none is named: the reader that ships, and it says so."""

import sys

from duetto.demo import NO_MODEL_NAMED, demo_model_dir


def model_or_demo(model: str | None) -> str:
    """The model as named, or the reader's directory, with a line on stderr.

    Raises ConfigError if none is named and the reader was left out of this installation.
    """
    if model is not None:
        return model
    directory = demo_model_dir()
    print(f"{NO_MODEL_NAMED[0].upper()}{NO_MODEL_NAMED[1:]}.", file=sys.stderr)
    return str(directory)
