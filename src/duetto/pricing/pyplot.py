"""matplotlib for pictures without a screen, loaded only when one is drawn."""

from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any

from duetto.core.errors import ConfigError
from duetto.core.files import check_folder


def pyplot_for(flag: str, file: Path) -> Any:
    """matplotlib.pyplot, set up so that the same figure gives the same file.

    Raises ConfigError, naming the flag, for a file that is neither PNG nor SVG, and without
    matplotlib.
    """
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"{flag} {file}: accepted: a name that ends in .png or .svg")
    check_folder(flag, file)
    try:
        import_module("matplotlib").use("Agg")
        plt = import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigError(
            f"{flag} needs matplotlib: pip install matplotlib, or in a checkout of Duetto "
            "pip install -e '.[plot]'"
        ) from None
    plt.rcParams["svg.hashsalt"] = "duetto"  # names within an SVG would differ from run to run
    return plt


def titled(words: str) -> list[str]:
    """A title's lines, of words that may be long and have signs that mean mathematics."""
    return [line.replace("$", r"\$") for line in wrap(words, 100)[:4]]


def no_date(file: Path) -> dict[str, None]:
    """Metadata for savefig: an SVG is not to hold the time at which it was drawn."""
    return {"Date": None} if file.suffix == ".svg" else {}
