"""The models that ship with Duetto: where they are. docs/design/demo-models.md says what they read.

Knows no format of a checkpoint, and nothing of how the models were trained.
"""

from pathlib import Path

from duetto.core.errors import ConfigError

READER, DRAFT = "duetto-demo", "duetto-demo-draft"
NO_MODEL_NAMED = (
    f"no model named: this is {READER}, a small one that answers questions about a few documents "
    "and nothing else"
)
DEMO_MODELS = (READER, DRAFT)  # names that every command takes for a model


def demo_model_dir(name: str = READER) -> Path:
    """The checkpoint directory of `READER` or `DRAFT`.

    Raises ConfigError if it was left out of this installation.
    """
    directory = Path(__file__).parent / name
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{name} is not part of this installation (no {directory}): name a model, "
            "a checkpoint directory or org/name"
        )
    return directory
