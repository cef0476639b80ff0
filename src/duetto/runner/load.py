"""From a checkpoint directory to a ModelRunner that is ready to execute.

The one place where a model, a backend and a KV cache meet. Knows no scheduler, tokenizer or text;
says what it chose on the user's behalf in `LoadedModel.notes`, and prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

from duetto.backends.backend import Backend
from duetto.backends.cpu.formats import QUANTIZED, Quantization
from duetto.backends.cpu.native import why_unavailable
from duetto.checkpoints.config import ModelConfig
from duetto.core.errors import ConfigError
from duetto.models.programs import load_program
from duetto.program.dtype import DTYPES, KV_DTYPES, Dtype, KVDtype
from duetto.program.kv_size import KVPlan, plan_kv
from duetto.program.program import Program
from duetto.runner.host_memory import available_memory_bytes
from duetto.runner.loaders import (
    CpuLoader,
    Loader,
    Progress,
    ReferenceLoader,
    default_cache_dir,
)
from duetto.runner.model_runner import ModelRunner

BACKENDS = ("auto", "cpu", "reference")
DEFAULT_CACHE = "auto"

_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and everything about it that was "auto"."""

    config: ModelConfig
    program: Program
    runner: ModelRunner
    backend: str  # "cpu" or "reference"
    computed_by: str  # the backend, and whatever of it decides the last bits
    dtype: Dtype
    quantization: str  # "none", or how, and what is left out
    kv_dtype: KVDtype
    num_blocks: int
    block_size: int
    weight_bytes: int  # as they are held
    kv_memory_bytes: int
    notes: tuple[str, ...]  # for people: what was chosen on their behalf

    @property
    def max_model_len(self) -> int:
        return self.program.max_model_len

    @property
    def numerics(self) -> str:
        """All that decides what a token's KV is, bit for bit, beside the model and the tokens."""
        return "/".join((self.computed_by, self.dtype, self.quantization, self.kv_dtype))


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model that can be loaded: all that is known before a weight is read, and nothing "auto"."""

    config: ModelConfig
    program: Program  # for requests of the length that fits
    loader: Loader
    dtype: Dtype
    quantization: str  # "none", or how, and what is left out
    kv_dtype: KVDtype
    block_size: int
    available_bytes: int  # of memory, before anything was loaded
    kv: KVPlan
    notes: tuple[str, ...]  # for people; the loader and `kv` have more


class LoadOptions(TypedDict, total=False):
    """How `plan_model` is to plan; it says what each means."""

    dtype: str
    quantization: str | None
    quantization_skip: Sequence[str]
    kv_cache_dtype: str
    backend: str
    threads: int | None
    packed_cache: str
    max_num_seqs: int
    block_size: int
    kv_cache_memory_bytes: int | None
    on_status: Callable[[str], None] | None


def load_model(
    model_dir: Path,
    *,
    max_model_len: int | None = None,
    on_progress: Progress | None = None,
    **options: Unpack[LoadOptions],
) -> LoadedModel:
    """Load a model to be served.

    max_model_len: the longest prompt and answer together; None is the model's own, or what fits.
    on_progress: called with (bytes loaded, bytes in all).

    Refuses before any weight is read, as far as that can be known: raises ConfigError, naming the
    flag, or CheckpointError, naming the file.
    """
    config, program = load_program(model_dir, max_model_len)
    plan = plan_model(config, program, may_shorten=max_model_len is None, **options)
    loader, program = plan.loader, plan.program
    computing = loader.load(program, model_dir, on_progress)
    return LoadedModel(
        config=config,
        program=program,
        runner=_start(program, computing, plan.kv, plan.block_size, plan.kv_dtype),
        backend=loader.name,
        computed_by=loader.computed_by,
        dtype=plan.dtype,
        quantization=plan.quantization,
        kv_dtype=plan.kv_dtype,
        num_blocks=plan.kv.num_blocks,
        block_size=plan.block_size,
        weight_bytes=loader.weight_bytes,
        kv_memory_bytes=plan.kv.memory_bytes,
        notes=(*plan.notes, *loader.notes, *plan.kv.notes),
    )


def plan_model(
    config: ModelConfig,
    program: Program,
    *,
    may_shorten: bool,
    dtype: str = "auto",
    quantization: str | None = None,
    quantization_skip: Sequence[str] = (),
    kv_cache_dtype: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    packed_cache: str = DEFAULT_CACHE,
    max_num_seqs: int = 64,
    block_size: int = 32,
    kv_cache_memory_bytes: int | None = None,
    on_status: Callable[[str], None] | None = None,
) -> ModelPlan:
    """Decide how a program will be held in this machine's memory. Names are vLLM's, where it has
    them. Reads no weight, so the model may be one that is not here.

    may_shorten: whether requests may be shorter than the program's max_model_len, if memory asks.
    dtype: what the weights are rounded to; "auto" is what config.json names, and float32 if it
        names none. What is quantized is quantized from that, so any dtype may be. The reference
        backend computes in fp32 whatever this is.
    quantization: "int8", "int4", or None or "none"; of projections (backends/cpu/formats.py).
    quantization_skip: patterns of tensors that are not quantized.
    kv_cache_dtype: what keys and values are stored in; "auto" is the weights' dtype on the cpu
        backend, as with all who serve, and float32 on the reference, which loses nothing.
    backend: "auto" is cpu, or the reference where the native module is missing.
    threads: of the cpu backend; None is DUETTO_NUM_THREADS, or as many as this process may use.
    packed_cache: a directory for quantized weights, "off", or "auto" for the user's cache.
    kv_cache_memory_bytes: None leaves the size to the rule of `plan_kv`.
    on_status: called with a line about work that will take a while.

    Raises ConfigError, naming the flag.
    """
    for flag, value in (
        ("--block-size", block_size),
        ("--max-num-seqs", max_num_seqs),
        ("--kv-cache-memory-bytes", kv_cache_memory_bytes),
        ("--threads", threads),
    ):
        _check_positive(flag, value)
    asked_dtype = _one_of("--dtype", dtype, DTYPES)
    asked_kv_dtype = _one_of("--kv-cache-dtype", kv_cache_dtype, KV_DTYPES)
    method = _resolve_quantization(quantization, quantization_skip)
    backend, notes = _resolve_backend(backend, method, threads)

    weight_dtype: Dtype = asked_dtype or config.dtype or "float32"
    loader: Loader
    if backend == "reference":
        loader = ReferenceLoader(program, weight_dtype)
    else:
        cache_dir = _resolve_cache(packed_cache)
        loader = CpuLoader(
            program,
            weight_dtype,
            method,
            quantization_skip,
            threads=threads,
            cache_dir=cache_dir,
            on_status=on_status,
        )
    kv_dtype = asked_kv_dtype or loader.auto_kv_dtype
    available = available_memory_bytes()
    kv = plan_kv(
        program,
        block_size=block_size,
        block_bytes=loader.kv_block_bytes(block_size, kv_dtype),
        max_num_seqs=max_num_seqs,
        memory_bytes=kv_cache_memory_bytes,
        available_bytes=max(0, available - loader.weight_bytes),
        may_shorten=may_shorten,
    )
    return ModelPlan(
        config=config,
        # Not built anew: memory that happens to be free must not choose the frequencies of a rope.
        program=replace(program, max_model_len=kv.max_model_len),
        loader=loader,
        dtype=weight_dtype,
        quantization=_shown(method, quantization_skip),
        kv_dtype=kv_dtype,
        block_size=block_size,
        available_bytes=available,
        kv=kv,
        notes=tuple(notes),
    )


def _start(
    program: Program, backend: Backend, plan: KVPlan, block_size: int, kv_dtype: KVDtype
) -> ModelRunner:
    try:
        return ModelRunner(program, backend, plan.num_blocks, block_size, kv_dtype)
    except MemoryError:
        raise ConfigError(
            f"--kv-cache-memory-bytes: the system refuses {plan.memory_bytes} bytes for the KV "
            f"cache; give less"
        ) from None


def _resolve_backend(
    name: str, quantization: Quantization | None, threads: int | None
) -> tuple[str, list[str]]:
    """The backend to use, and what is to be said if it is not the one that was wished for."""
    if name not in BACKENDS:
        raise ConfigError(f"--backend: {name!r} is not one of {', '.join(BACKENDS)}")
    missing = why_unavailable() if name != "reference" else None
    if name == "cpu" and missing is not None:
        raise ConfigError(f"--backend cpu: {missing}")
    if name != "reference" and missing is None:
        return "cpu", []
    if quantization is not None:
        reason = f", and {missing}" if missing else ""
        raise ConfigError(
            f"--quantization {quantization} and the reference backend: it computes with whole "
            f"weights only; --backend cpu quantizes{reason}"
        )
    if threads is not None and threads > 1:
        raise ConfigError(
            f"--threads {threads} and the reference backend: it computes on one thread"
        )
    if missing is None:
        return "reference", []
    return "reference", [f"the reference backend computes, which is slow: {missing}"]


def _resolve_quantization(name: str | None, skip: Sequence[str]) -> Quantization | None:
    accepted = ", ".join((*QUANTIZED, "none"))
    if name is None or name == "none":
        if skip:
            raise ConfigError(
                f"--quantization-skip {skip[0]}: there is no --quantization ({accepted})"
            )
        return None
    for method in QUANTIZED:
        if name == method:
            return method
    raise ConfigError(f"--quantization: {name!r} is not one of {accepted}")


def _resolve_cache(name: str) -> Path | None:
    if not name:
        raise ConfigError("--packed-cache: must be a directory, auto or off, not ''")
    if name == "off":
        return None
    return default_cache_dir() if name == DEFAULT_CACHE else Path(name)


def _shown(quantization: Quantization | None, skip: Sequence[str]) -> str:
    if quantization is None:
        return "none"
    return " ".join((quantization, *(f"-{pattern}" for pattern in sorted(skip))))


def _one_of(flag: str, name: str, accepted: Sequence[_Name]) -> _Name | None:
    """The name, checked; None for "auto"."""
    if name == "auto":
        return None
    for known in accepted:
        if name == known:
            return known
    raise ConfigError(f"{flag}: {name!r} is not one of {', '.join(('auto', *accepted))}")


def _check_positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{flag}: must be 1 or more, not {value}")
