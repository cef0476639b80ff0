"""Parts that ask whether it is right: `smoke`, `tests`, `sanitizer`."""

import os
import re
import shutil
import subprocess
import sys
from time import time
from typing import Any

import torch

from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import launch_linear, linear_twin
from duetto.backends.cuda.tensors import Matrix
from gpu.bench import ROOT, Bench

TESTS = ROOT / "tests" / "kernels"
MARGIN_S = 12.0  # of a part's time, in which processes start and end
# Of few launches each, that touch memory by computed addresses.
SANITIZED = ("attention", "linear", "rope", "sampler")
TOOLS = ("memcheck", "racecheck")
LAST_LINES = 15


def smoke(bench: Bench) -> dict[str, Any]:
    """A product beside its twin. Raises if they differ by more than rounding explains."""
    outputs, inputs, rows = (64, 64, 3) if bench.rehearse else (512, 1024, 3)
    weight = torch.randn(outputs, inputs, device=bench.device).to(bench.dtype)
    x = torch.randn(rows, inputs, device=bench.device).to(bench.dtype)
    matrix = Matrix(GpuFormat(bench.dtype_name), (outputs, inputs), weight)  # type: ignore[arg-type]
    ours, twins = (torch.full((rows, outputs), torch.nan).to(x) for _ in range(2))
    launch_linear(x, matrix, ours)
    linear_twin(x, matrix, twins)
    error = float((ours.float() - twins.float()).norm() / twins.float().norm())
    if not error < 1e-2:
        raise RuntimeError(f"linear is {error:g} away from its twin")
    return {"relative_error": error}


def tests(bench: Bench) -> dict[str, Any]:
    """The kernels' own tests, on the device: as many as its time allows."""
    few = [str(TESTS / "test_small_kernels.py"), "-k", "soft_cap"]
    chosen = few if bench.rehearse else ["-n", "8", str(TESTS)]
    done = _pytest(bench, chosen, bench.limit_s - MARGIN_S)
    counts = _counts(done)
    if counts.get("failed") or counts.get("error") or not counts.get("passed"):
        raise RuntimeError(done[-2000:])
    return {"counts": counts, "whole": "skipped" not in counts}


def sanitizer(bench: Bench) -> dict[str, Any]:
    """Memory errors and races in small launches, by NVIDIA's tool. Absent: said, not failed."""
    program = shutil.which("compute-sanitizer")
    if bench.rehearse or program is None:
        return {"tools": {}, "lacks": "compute-sanitizer"}
    found = {}
    for tool in TOOLS:
        said = _pytest(
            bench,
            [str(TESTS), "-k", " or ".join(SANITIZED)],
            (bench.limit_s - MARGIN_S) / len(TOOLS),
            (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        found[tool] = {"summary": summary[-1:] or ["not reached"], "counts": _counts(said)}
    return {"tools": found}


def _pytest(bench: Bench, chosen: list[str], limit_s: float, under: tuple[str, ...] = ()) -> str:
    """What pytest says. Tests that its time does not reach are skipped."""
    command = [*under, sys.executable, "-m", "pytest", "--maxfail", "20"]
    command += ["-p", "no:cacheprovider", "-W", "default", "--tb", "line", *chosen]
    limits = {"DUETTO_TEST_DEVICE": bench.device.type, "DUETTO_TEST_UNTIL": f"{time() + limit_s}"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | limits,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, file=sys.stderr)
    return done.stdout


def _counts(said: str) -> dict[str, int]:
    """Of tests, by how they ended."""
    lines = reversed(said.splitlines())
    line = next((one for one in lines if re.search(r"\d+ (passed|failed|error)", one)), "")
    words = re.findall(r"(\d+) (passed|failed|errors?|skipped)", line)
    return {word.rstrip("s") if word.startswith("error") else word: int(n) for n, word in words}
