"""Part `roofs`: what memory and matrix units give, by which all other parts are divided."""

from dataclasses import asdict
from typing import Any

from duetto.backends.cuda.roofs import measure_roofs
from gpu.bench import Bench


def run(bench: Bench) -> dict[str, Any]:
    return asdict(measure_roofs(bench.watch, 64 if bench.rehearse else 1, bench.sizes.runs))
