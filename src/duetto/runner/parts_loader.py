"""How a model is taken in parts: ranks and stages, each in a process of its own on its own cores.

Sizes are sums over the parts, which lie in one machine's memory. Knows no KV plan and no batch.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from duetto.backends.backend import Backend
from duetto.backends.cpu.native import native, why_unavailable
from duetto.backends.parts.backend import PartsBackend
from duetto.backends.parts.host import HANG_S, PartHost
from duetto.backends.parts.joined import join_parts
from duetto.backends.parts.part import PartPlace
from duetto.backends.parts.wiring import Wiring
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.files import Progress
from duetto.program.activations import LargestStep
from duetto.program.dtype import Dtype, KVDtype
from duetto.program.program import Program
from duetto.runner.loaders import DeviceMemory, Loader
from duetto.runner.part_process import PartLoad, part_program

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; from duetto.runner.part_process import main; "
    "main(int(sys.argv[1]))"
)


class Degrees(NamedTuple):
    """Into how many parts a model is cut."""

    num_ranks: int  # --tensor-parallel-size
    num_stages: int  # --pipeline-parallel-size

    @property
    def num_parts(self) -> int:
        return self.num_ranks * self.num_stages


class PartsLoader:
    """`of_part` takes one part, by its program and the whole one."""

    def __init__(
        self,
        program: Program,
        args: EngineArgs,
        degrees: Degrees,
        dtype: Dtype,
        of_part: Callable[[Program, Program], Loader],
        cache_dir: Path | None,
    ) -> None:
        """Raises ConfigError for a degree that does not divide, with the nearest that do."""
        if (why_not := why_no_parts(degrees)) is not None:
            raise ConfigError(f"{why_not}; accepted here: 1")
        self.memory: DeviceMemory | None = None
        self.num_batches = degrees.num_stages  # so that one is in each
        self._args, self._degrees = args, degrees
        self._dtype, self._cache_dir = dtype, cache_dir
        own = [part for stage in programs_of_parts(program, degrees) for part in stage]
        self._loaders = [of_part(part, program) for part in own]
        first = self._loaders[0]
        self.name, self.auto_kv_dtype = first.name, first.auto_kv_dtype
        ranks = degrees.num_ranks
        self.computed_by = first.computed_by + (f"/tp{ranks}" if ranks > 1 else "")
        self.weight_bytes = sum(loader.weight_bytes for loader in self._loaders)
        self._cores = shared_out(sorted(os.sched_getaffinity(0)), degrees.num_parts)
        self.notes = [*dict.fromkeys(note for loader in self._loaders for note in loader.notes)]
        num_cores = len({core for own in self._cores for core in own})
        if degrees.num_parts > num_cores:
            self.notes.append(
                f"{degrees.num_parts} parts of the model (--tp {ranks}, --pp {degrees.num_stages}) "
                f"share {num_cores} core{'s' * (num_cores > 1)}, and wait for each other"
            )

    def kv_block_bytes(self, block_size: int, dtype: KVDtype) -> int:
        return sum(loader.kv_block_bytes(block_size, dtype) for loader in self._loaders)

    def held_bytes(self, block_size: int, kv_dtype: KVDtype) -> int:
        return sum(loader.held_bytes(block_size, kv_dtype) for loader in self._loaders)

    def step_bytes(self, step: LargestStep, kv_dtype: KVDtype) -> int:
        return sum(loader.step_bytes(step, kv_dtype) for loader in self._loaders)

    def load(
        self,
        program: Program,
        model_dir: Path,
        on_progress: Progress | None,
        beside: Loader | None = None,  # noqa: ARG002  its threads are in other processes
    ) -> Backend:
        degrees = self._degrees

        def spec(wiring: Wiring) -> bytes:
            return msgspec.msgpack.encode(self._spec(program, model_dir, wiring))

        groups = [
            native.Group(degrees.num_ranks, timeout_s=HANG_S)
            for _ in range(degrees.num_stages if degrees.num_ranks > 1 else 0)
        ]
        host = PartHost(
            join_parts(degrees.num_stages, degrees.num_ranks, [g.descriptor for g in groups]),
            _command,
            spec,
            on_progress=on_progress,
        )
        self.weight_bytes = sum(ready.weight_bytes for ready in host.ready)
        self.notes += dict.fromkeys(
            note for ready in host.ready for note in ready.notes if note not in self.notes
        )
        return PartsBackend(program, programs_of_parts(program, degrees), host)

    def _spec(self, program: Program, model_dir: Path, wiring: Wiring) -> PartLoad:
        args, cores = self._args, self._cores[wiring.index]
        return PartLoad(
            wiring=wiring,
            model_dir=str(model_dir),
            asked_len=args.asked_len,
            is_headless=program.is_headless,
            backend=self.name,
            dtype=self._dtype,
            quantization=args.quantization,
            quantization_skip=tuple(args.quantization_skip),
            threads=threads_of_part(args.threads, len(cores), self._degrees.num_parts),
            cores=cores,
            cache_dir=None if self._cache_dir is None else str(self._cache_dir),
        )


def why_no_parts(degrees: Degrees) -> str | None:
    """Why this machine cannot run a model in so many parts, whatever the model; None if it can."""
    if not hasattr(os, "memfd_create"):
        return "--tp and --pp: parts share memory as Linux has it"
    missing = why_unavailable()
    if degrees.num_ranks > 1 and missing is not None:
        return f"--tp: ranks meet in native code, and {missing}"
    return None


def programs_of_parts(program: Program, degrees: Degrees) -> list[list[Program]]:
    """Of each stage, its ranks' programs."""
    return [
        [
            part_program(program, PartPlace(stage, degrees.num_stages, rank, degrees.num_ranks))
            for rank in range(degrees.num_ranks)
        ]
        for stage in range(degrees.num_stages)
    ]


def shared_out(cores: Sequence[int], num_parts: int) -> list[tuple[int, ...]]:
    """Neighbours for each part, none for two of them; in turn where there are too few."""
    if len(cores) < num_parts:
        return [(cores[part % len(cores)],) for part in range(num_parts)]
    bounds = [part * len(cores) // num_parts for part in range(num_parts + 1)]
    return [tuple(cores[bounds[i] : bounds[i + 1]]) for i in range(num_parts)]


def threads_of_part(threads: int | None, num_cores: int, num_parts: int) -> int:
    """Of one part: its share of what was asked for, or of what this process may use."""
    if threads is None:
        usable = num_cores * num_parts if native is None else native.available_threads()
        return max(1, min(num_cores, usable // num_parts))
    return max(1, threads // num_parts)


def _command(descriptor: int) -> list[str]:
    return [sys.executable, "-c", _START, str(descriptor), *sys.path]
