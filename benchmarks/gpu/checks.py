"""Parts that ask whether it is right: `smoke`, `tests`, `sanitizer`."""

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import linear, linear_twin
from duetto.backends.cuda.tensors import Matrix
from gpu.bench import ROOT, Bench

TESTS = ROOT / "tests" / "kernels"
TESTS_S, SANITIZER_S = 92.0, 40.0
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
    linear(x, matrix, ours)
    linear_twin(x, matrix, twins)
    error = float((ours.float() - twins.float()).norm() / twins.float().norm())
    if not error < 1e-2:
        raise RuntimeError(f"linear is {error:g} away from its twin")
    return {"relative_error": error}


def tests(bench: Bench) -> dict[str, Any]:
    """The kernels' own tests, on the device: as many as its time allows."""
    chosen = ["-k", "rms_norm"] if bench.rehearse else []
    done = _pytest(bench, chosen, TESTS_S)
    counts = _counts(done)
    if counts.get("failed") or counts.get("error") or not counts.get("passed"):
        raise RuntimeError(done[-2000:])
    return {"counts": counts, "whole": " passed" in done}


def sanitizer(bench: Bench) -> dict[str, Any]:
    """Memory errors and races in small launches, by NVIDIA's tool. Absent: said, not failed."""
    program = shutil.which("compute-sanitizer")
    if bench.rehearse or program is None:
        return {"tools": {}, "lacks": "compute-sanitizer"}
    found = {}
    for tool in TOOLS:
        said = _pytest(
            bench,
            ["-k", " or ".join(SANITIZED), "--maxfail", "1"],
            SANITIZER_S,
            (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        found[tool] = {"summary": summary[-1:] or ["not reached"], "counts": _counts(said)}
    return {"tools": found}


def _pytest(bench: Bench, chosen: list[str], limit_s: float, under: tuple[str, ...] = ()) -> str:
    """What pytest says, as far as it came within its time; it ends by itself after a test."""
    command = [*under, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-o", "timeout=0", "-W", "default", str(TESTS), *chosen]
    environment = os.environ | {"DUETTO_TEST_DEVICE": bench.device.type}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate()
        said += f"\nended after {limit_s:.0f} s"
    print(said, file=sys.stderr)
    return said


def _counts(said: str) -> dict[str, int]:
    """Of tests, by how they ended; of one that was stopped, by its dots."""
    line = next((one for one in reversed(said.splitlines()) if re.search(r"\d+ passed", one)), "")
    if line:
        return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", line)}
    dots = "".join(re.findall(r"^([.FEsx]+)(?:\s+\[|$)", said, re.MULTILINE))
    return {"passed": dots.count("."), "failed": dots.count("F"), "error": dots.count("E")}
