"""`duetto make-model`: a complete checkpoint with random weights, to try things on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.table import Table

from duetto.checkpoints.json_file import read_json
from duetto.checkpoints.other_formats import directory_of_others, other_format
from duetto.checkpoints.shapes import SHAPES
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.errors import ConfigError
from duetto.core.near import near_misses
from duetto.models.make_model import MadeModel
from duetto.models.make_model import make_model as write_model
from duetto.program.dtype import Dtype
from duetto.progress import show_progress


def make_model(
    shape: str,
    out: Path,
    *,
    dtype: Dtype = "bfloat16",
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 0,
    vocab_size: int | None = None,
    force: bool = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a random model in a named shape, with a tokenizer and a chat template.

    Parameters
    ----------
    shape
        tiny, smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, or the path of a config.json.
    out
        The directory to write.
    dtype
        What the weights are stored in.
    seed
        The same seed gives the same weights.
    vocab_size
        Rows of the embedding, if not as the shape has it.
    force
        Replace a model that is there.
    as_json
        The last line of stdout is one JSON document.
    """
    config, source = _find_config(shape)
    with show_progress(f"writing {out.name}") as bar:
        made = write_model(
            config,
            out,
            source=source,
            dtype=dtype,
            seed=seed,
            vocab_size=vocab_size,
            force=force,
            on_progress=bar.reach,
        )
    if as_json:
        print_json({"model": str(out), **asdict(made)})
    else:
        _print(made, out)


def _find_config(shape: str) -> tuple[Mapping[str, Any], Path]:
    """The shape's config.json, and what to call it in messages."""
    path = Path(shape)
    if (name := shape.lower()) in SHAPES:
        return SHAPES[name], Path(name)
    if shape and path.is_dir():
        if (why := directory_of_others(path)) is not None:
            raise ConfigError(f"{shape}: {why}")
        path /= "config.json"
    elif (why := other_format(shape)) is not None:
        raise ConfigError(f"{shape}: {why}")
    elif not path.is_file():
        raise ConfigError(
            f"{shape or 'an empty name'}: is neither a config.json nor one of the shapes "
            f"{', '.join(SHAPES)}{near_misses(shape, SHAPES)}"
        )
    return read_json(path).values, path


def _print(made: MadeModel, out: Path) -> None:
    table = Table(show_header=False, box=None)
    for name, size in made.file_bytes.items():
        table.add_row(name, f"{size:,} bytes")
    console = open_console()
    show_table(console, table)
    say(console, f"{out}: {made.num_parameters:,} random parameters, {made.num_tokens:,} tokens")
