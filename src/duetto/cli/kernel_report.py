"""What `duetto bench kernels` shows, on a CPU or a GPU: at its end, or when it is interrupted."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from duetto.cli.output import print_json


def kernel_report(
    machine: Callable[[], Any | None],
    results: Sequence[Any],
    show: Callable[[Any, Any], None],
    *,
    as_json: bool,
) -> Callable[[bool], None]:
    """A function that shows what there is so far, and is told whether it was interrupted.

    machine: what was measured of it; None before that.
    show: prints a table of the machine and the results, for people.
    """

    def report(is_interrupted: bool) -> None:
        found = machine()
        if as_json:
            shown = [] if found is None else [result.as_json(found) for result in results]
            print_json({"machine": found, "kernels": shown, "interrupted": is_interrupted})
        elif found is not None:
            show(found, results)
        if is_interrupted:
            print(f"interrupted: {len(results)} measurements so far", file=sys.stderr)

    return report
