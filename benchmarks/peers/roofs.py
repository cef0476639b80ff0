"""What the machine allows in each cell: the model's own program, priced at the probed limits."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peers.workload import ANSWER_TOKENS, CELLS, PROMPT_TOKENS

DTYPES = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}
# What multiplies: rows are int8 where weights are int8 or int4. Attention, which is not, is priced
# like the rest; it is a small part of these cells.
ARITHMETIC = {"bf16": "bf16", "int8": "int8", "int4": "int8"}


def roofs(model: Path, machine: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Tokens per second by precision and cell if every operation reached its roof and nothing else
    took any time. `machine` is what `duetto bench kernels` says of it."""
    with TemporaryDirectory() as directory:
        return {
            precision: _of_precision(model, precision, machine, Path(directory))
            for precision in DTYPES
        }


def _of_precision(
    model: Path, precision: str, machine: Mapping[str, Any], directory: Path
) -> dict[str, float]:
    peaks = machine["peaks"]
    spec = {
        "name": precision,
        "peaks": {"float32": peaks["f32"], "bfloat16": peaks[ARITHMETIC[precision]]},
        "memory_bandwidth": machine["read_bandwidth"],
        "memory_bytes": 1 << 40,
    }
    hardware = directory / f"{precision}.json"
    hardware.write_text(json.dumps(spec), encoding="utf-8")
    rates = {}
    for cell, (kind, size) in CELLS.items():
        if kind == "prefill":
            found = _roofline(model, hardware, precision, batch=1, context=size)
            rates[cell] = size / found["prefill_time_s"]
        else:
            context = PROMPT_TOKENS + ANSWER_TOKENS // 2
            found = _roofline(model, hardware, precision, batch=size, context=context)
            rates[cell] = size / found["decode_step_time_s"]
    return rates


def _roofline(
    model: Path, hardware: Path, precision: str, *, batch: int, context: int
) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "duetto", "roofline", str(model), "--hardware", str(hardware),
        "--dtype", DTYPES[precision], "--batch", str(batch), "--context", str(context),
        "--datasheet", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
