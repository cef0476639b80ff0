"""`duetto doctor`: what this machine offers, and what of Duetto is ready on it."""

import sys
from typing import Any

from rich.markup import escape
from rich.table import Table

from duetto import __version__
from duetto.cli.output import JsonFlag, open_console, print_json, show_table
from duetto.measure.installation import OPTIONAL, describe_installation


def doctor(*, json_output: JsonFlag = False) -> None:
    """Print what was found; exit 1 if something that serving needs is missing.

    Parameters
    ----------
    json_output
        The last line of stdout is one JSON document.
    """
    report = {"duetto": __version__} | describe_installation()
    if json_output:
        print_json(report)
    else:
        _print(report)
    sys.exit(0 if report["ready"] else 1)


def _sets_in_words(sets: dict[str, Any]) -> str:
    def in_words(name: str, missing: list[str]) -> str:
        if name == sets["used"]:
            return f"[green]{name}[/] (used)"
        return f"[dim]{name} (needs {missing[-1]})[/]" if missing else name

    return ", ".join(in_words(name, missing) for name, missing in sets["missing"].items()) or "none"


def _gpu_in_words(gpu: dict[str, Any]) -> str:
    told = "[dim]none[/]"
    if gpu["num_devices"]:
        major, minor = gpu["capability"]
        sizes = [f"{gpu['memory_bytes'] / 2**30:.1f} GiB"]
        if gpu["free_bytes"] is not None:
            sizes.append(f"{gpu['free_bytes'] / 2**30:.1f} free")
        told = (
            f"{escape(gpu['name'])}, compute capability {major}.{minor}, "
            f"{gpu['multiprocessors']} multiprocessors, {', '.join(sizes)}; driver for CUDA "
            f"{gpu['driver']}"
        )
        if (others := gpu["num_devices"] - 1) > 0:
            told += f"; {others} more"
    if gpu["is_interpreted"]:
        told += "; TRITON_INTERPRET is set: kernels are interpreted"
    return f"{told}: {escape(gpu['why_not'])}" if gpu["why_not"] else told


def _print(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    mark = {True: "[green]yes[/]", False: "[red]no[/]"}
    table.add_row("Duetto", report["duetto"])
    table.add_row("Python", f"{report['python']} on {report['platform']}")
    table.add_row("processors usable", str(report["cpus_usable"]))
    table.add_row("memory available", f"{report['memory_available_bytes'] / 2**30:.1f} GiB")
    table.add_row("native module", mark[report["native_module"]])
    table.add_row("CPU features", " ".join(report["cpu_features"]) or "none known")
    table.add_row("instruction sets", _sets_in_words(report["instruction_sets"]))
    table.add_row("GPU", _gpu_in_words(report["gpu"]))
    table.add_row("backends", " ".join(report["backends"]))
    if report["cpu_backend_lacks"]:
        table.add_row("", report["cpu_backend_lacks"])
    cores = f"one a process, on up to {report['cpus_usable']} processors"
    table.add_row("ranks, stages", report["parts_lack"] or f"--tp and --pp: {cores}")
    table.add_row("installed size", f"{report['installed_bytes'] / 1e6:.0f} MB without extras")
    for name, found in report["packages"].items():
        missing = "[dim]not installed (optional)[/]" if name in OPTIONAL else "[red]missing[/]"
        table.add_row(name, found or missing)
    why_not = f": {escape(report['refusal'])}" if report["refusal"] else ""
    table.add_row("ready to serve", mark[report["ready"]] + why_not)
    show_table(open_console(), table, wrap=(1,))
