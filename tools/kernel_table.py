"""Compile the GPU's kernels without a GPU; write what they take: docs/benchmarks/gpu-kernels.md.

Every `variants()` in backends/cuda/kernels is compiled for each compute capability: registers of a
thread, shared memory of a program, and bytes of stack, which are registers that were spilled, are
read from the binary. `--check` only says whether the table is current: for the pinned Triton it is
exact. Runs in the kernels' environment: `make kernels`.

usage: kernel_table.py [--check] [--only FILE]     FILE: a kernel's file, as linear; prints its rows
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from difflib import unified_diff
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duetto.backends.cuda import kernels
from duetto.backends.cuda.kernels.variant import KernelVariant

TARGET = Path(__file__).parent.parent / "docs" / "benchmarks" / "gpu-kernels.md"
# Each compute capability that is compiled for, and the most shared memory that a program may have.
# See "technical specifications per compute capability" in NVIDIA's CUDA C++ programming guide.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    shared_bytes: int
    stack_bytes: int

    def __str__(self) -> str:
        spilled = f", **{self.stack_bytes} B spilled**" if self.stack_bytes else ""
        return f"{self.registers}, {self.shared_bytes / 1024:.1f} KiB{spilled}"


class Job(NamedTuple):
    file: str
    number: int  # of the file's variants
    capability: int


class Row(NamedTuple):
    file: str
    name: str
    warps: int
    usages: dict[int, Usage]  # by compute capability


def source_of(variant: KernelVariant) -> ASTSource:
    """As a launch would have it compiled, where pointers are aligned."""
    names = variant.kernel.arg_names
    known = variant.constexprs
    if set(names) != {*known, *variant.signature} or set(known) & set(variant.signature):
        differing = sorted(set(names) ^ {*known, *variant.signature})
        raise ValueError(f"{variant.name}: arguments that are not named once: {differing}")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")}
    aligned |= set(variant.multiples_of_16)
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=dict(known), attrs=attrs)


def compile_variant(job: Job) -> tuple[Job, Usage | str]:
    """What it takes, or the last line of why it cannot be compiled."""
    variant = variants_of(job.file)[job.number]
    target = GPUTarget("cuda", job.capability, 32)
    try:
        compiled = triton.compile(source_of(variant), target=target, options=dict(variant.options))
    except Exception as error:  # of whatever kind: the table names the kernel
        return job, str(error).strip().splitlines()[-1]
    registers, stack = registers_of(compiled.asm["cubin"])
    return job, Usage(registers, compiled.metadata.shared, stack)


def registers_of(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(OBJDUMP), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(word.split(":", 1) for word in told.split() if word.count(":") == 1)
    return int(facts["REG"]), int(facts["STACK"]) + int(facts["LOCAL"])


def variants_of(file: str) -> list[KernelVariant]:
    module = import_module(f"{kernels.__name__}.{file}")
    return list(module.variants()) if hasattr(module, "variants") else []


def kernel_files() -> list[str]:
    folder = Path(kernels.__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def compile_all(files: Iterable[str]) -> Iterator[Row]:
    """Raises ValueError, naming all of them, for kernels that do not compile, or have no room."""
    listed = [(file, number, v) for file in files for number, v in enumerate(variants_of(file))]
    jobs = [
        Job(file, number, capability)
        for file, number, variant in listed
        for capability in SHARED_LIMITS
        if capability >= variant.least_capability
        and capability in (variant.capabilities or SHARED_LIMITS)
    ]
    spawned = get_context("spawn")  # Triton's compiler has threads
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), spawned) as pool:
        found = dict(pool.map(compile_variant, jobs, chunksize=4))
    problems = [
        f"{job.file}: {variants_of(job.file)[job.number].name}: sm_{job.capability}: {problem}"
        for job, usage in found.items()
        if (problem := problem_of(job.capability, usage)) is not None
    ]
    if problems:
        raise ValueError("\n".join(problems))
    for file, number, variant in listed:
        usages = {j.capability: u for j, u in found.items() if j[:2] == (file, number)}
        yield Row(file, variant.name, variant.options.get("num_warps", 4), usages)


def problem_of(capability: int, usage: Usage | str) -> str | None:
    if isinstance(usage, str):
        return usage
    if usage.shared_bytes > (limit := SHARED_LIMITS[capability]):
        return f"takes {usage.shared_bytes} bytes of shared memory, of {limit}"
    return None


def in_words(rows: Iterable[Row]) -> str:
    names = [f"sm_{capability}" for capability in SHARED_LIMITS]
    lines = [
        "# What the GPU's kernels take",
        "",
        f"Written by `tools/kernel_table.py` (Triton {triton.__version__}), compared by `make "
        "kernels`: registers of a thread and shared memory of a program, compiled without a GPU.",
        "",
        f"| kernel | variant | warps | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in rows:
        cells = (str(row.usages.get(capability, "–")) for capability in SHARED_LIMITS)
        lines.append(f"| {row.file} | {row.name} | {row.warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = sys.argv[1:]
    os.environ.setdefault("TRITON_CACHE_DIR", str(TARGET.parents[2] / "build" / "triton"))
    try:
        if arguments[:1] == ["--only"]:
            print(in_words(compile_all(arguments[1:])), end="")
            return
        text = in_words(compile_all(kernel_files()))
    except ValueError as error:
        sys.exit(str(error))
    if arguments != ["--check"]:
        TARGET.write_text(text)
    elif text != (old := TARGET.read_text() if TARGET.exists() else ""):
        lines = unified_diff(old.splitlines(), text.splitlines(), "as written", "as compiled", n=0)
        print("\n".join(lines))
        sys.exit(f"{TARGET.name} is not current: .venv-kernels/bin/python tools/kernel_table.py")


if __name__ == "__main__":
    main()
