"""Which model a command takes when none is named: the reader that ships, and it says so."""

import sys

from duetto.demo import READER, demo_model_dir


def model_or_demo(model: str | None) -> str:
    """The model as named, or the reader's directory, with a line on stderr.

    Raises ConfigError if none is named and the reader was left out of this installation.
    """
    if model is not None:
        return model
    directory = demo_model_dir()
    print(
        f"No model named: this is {READER}, a small one that answers questions about a few "
        "documents and nothing else.",
        file=sys.stderr,
    )
    return str(directory)
