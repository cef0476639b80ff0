"""`duetto fit`: what a model takes of memory, and how many requests have room. Loads no weights."""

import re
import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.fit import FitReport, examine
from duetto.pricing.find_hardware import HOST
from duetto.pricing.memory import size_in_words


def fit(
    model: str,
    *,
    hardware: str = HOST,
    tp: int | None = None,
    pp: int = 1,
    length: int | None = None,
    json_output: JsonFlag = False,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Say whether a model fits, from its config.json alone (and its weights' headers, if there).

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3.1-8b.
    hardware
        host (this machine, as `duetto serve` would use it), a name like h100, or a .json file.
    tp
        Devices that share each layer; by default the fewest of those there are with which it fits.
    pp
        Stages that share the layers.
    length
        Prompt and answer of a request, in tokens; by default the longest that is allowed.
    json_output
        The last line of stdout is one JSON document.
    """
    report = examine(model, args or EngineArgs(), hardware, tp=tp, pp=pp, length=length)
    if json_output:
        print_json(report)
    else:
        show(report, open_console())
    sys.exit(0 if report["fits"] else 1)


def show_fit(model: str, args: EngineArgs, *, as_json: bool) -> None:
    """What `duetto serve` would take of this machine. Raises ConfigError if it does not fit."""
    report = examine(model, args)
    if as_json:
        print_json(report)
    else:
        show(report, open_console())
    if not report["fits"]:
        raise ConfigError(f"{model} does not fit into this machine's memory")


def show(report: FitReport, console: Console) -> None:
    """The report as a table."""
    name = re.sub(r":[0-9]+$", "", report["hardware"])  # without how many there are
    where = "this machine" if report["hardware"] == HOST else f"each {name}"
    verdict = "[green]fits[/]" if report["fits"] else "[red]does not fit[/]"
    if report["tp"] > 1:
        verdict += f" with --tp {report['tp']}"
    name = escape(report["model"])
    say(console, f"{name}: {report['parameters']:,} parameters, {verdict}", markup=True)
    table = Table(show_header=False, box=None)
    there, usable = (size_in_words(report[name]) for name in ("memory_bytes", "usable_bytes"))
    table.add_row("memory", f"of {there}, {usable} may be used", where)
    table.add_row("weights", size_in_words(report["weight_bytes"]))
    table.add_row("activations", size_in_words(report["activation_bytes"]), "of the largest step")
    table.add_row(
        "KV cache",
        size_in_words(report["kv_bytes"]),
        f"{report['num_tokens']:,} tokens in blocks of {report['block_size']}, "
        f"{report['block_bytes'] / report['block_size'] / 1024:.1f} KiB each",
    )
    table.add_row("left", size_in_words(report["left_bytes"]))
    fitting = min(report["num_requests"], report["max_num_seqs"])
    table.add_row(
        "requests",
        f"{fitting:,}",
        f"of {report['length']:,} tokens at one time (memory for {report['num_requests']:,}, "
        f"--max-num-seqs {report['max_num_seqs']})",
    )
    show_table(console, table, wrap=(2, 1))
    for note in report["notes"]:
        say(console, f"  note: {note}")
    columns = ("weights", "KV tokens", "requests", "memory for", "of tokens")
    knobs = Table("what would change", *columns, box=None)
    for knob in report["knobs"]:
        knobs.add_row(
            knob["change"],
            size_in_words(knob["weight_bytes"]),
            f"{knob['num_tokens']:,}",
            f"{min(knob['num_requests'], report['max_num_seqs']):,}",
            f"{knob['num_requests']:,}",
            f"{knob['length']:,}",
        )
    show_table(console, knobs, drop=("of tokens", "weights"), wrap=(0,))
