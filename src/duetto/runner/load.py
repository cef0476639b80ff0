"""From a checkpoint directory to a ModelRunner that is ready to execute.

The one place where a model, a backend and a KV cache meet. Knows no scheduler, tokenizer or text;
says what it chose on the user's behalf in `LoadedModel.notes`, and prints nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from duetto.backends.reference import ReferenceBackend
from duetto.core.errors import ConfigError
from duetto.models.checkpoint import load_weights
from duetto.models.config import ModelConfig
from duetto.models.programs import load_program
from duetto.program.dtype import DTYPE_BYTES, DTYPES, Dtype
from duetto.program.program import Program
from duetto.runner.host_memory import available_memory_bytes
from duetto.runner.kv_size import KVPlan, plan_kv
from duetto.runner.model_runner import ModelRunner

BACKENDS = ("auto", "reference")
_REFERENCE_WEIGHTS: Dtype = "float32"  # it computes so, and holds its weights so


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and everything about it that was "auto"."""

    config: ModelConfig
    program: Program
    runner: ModelRunner
    backend: str
    dtype: Dtype
    kv_dtype: Dtype
    num_blocks: int
    block_size: int
    kv_memory_bytes: int
    notes: tuple[str, ...]  # for people: what was chosen on their behalf

    @property
    def max_model_len(self) -> int:
        return self.program.max_model_len


def load_model(
    model_dir: Path,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    backend: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    block_size: int = 32,
    kv_cache_memory_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model to be served. Names are vLLM's.

    dtype: what the weights are rounded to; "auto" is what config.json names, and float32 if it
        names none. The reference backend computes in fp32 whatever this is.
    kv_cache_dtype: what keys and values are stored in; "auto" is float32, which loses nothing.
    backend: "auto" is the reference backend, the only one in this version.
    max_model_len: the longest prompt and answer together; None is the model's own, or what fits.
    kv_cache_memory_bytes: None leaves the size to the rule of `plan_kv`.
    on_progress: called with (bytes loaded, bytes in all).

    Refuses before any weight is read, as far as that can be known: raises ConfigError, naming the
    flag, or CheckpointError, naming the file.
    """
    backend = _resolve_backend(backend)
    _check_no_quantization(quantization)
    kv_dtype = _resolve_dtype("--kv-cache-dtype", kv_cache_dtype, auto="float32")
    _check_positive("--block-size", block_size)
    _check_positive("--max-num-seqs", max_num_seqs)
    _check_positive("--kv-cache-memory-bytes", kv_cache_memory_bytes)

    config, program = load_program(model_dir, max_model_len)
    weight_dtype = _resolve_dtype("--dtype", dtype, auto=config.dtype or "float32")
    weight_bytes = program.num_parameters * DTYPE_BYTES[_REFERENCE_WEIGHTS]
    plan = plan_kv(
        program,
        block_size=block_size,
        kv_dtype=kv_dtype,
        max_num_seqs=max_num_seqs,
        memory_bytes=kv_cache_memory_bytes,
        available_bytes=max(0, available_memory_bytes() - weight_bytes),
        may_shorten=max_model_len is None,
    )
    # Not built anew: memory that happens to be free must not choose the frequencies of a rope.
    program = replace(program, max_model_len=plan.max_model_len)
    weights = load_weights(model_dir, program, weight_dtype, on_progress)
    return LoadedModel(
        config=config,
        program=program,
        runner=_start(program, ReferenceBackend(program, weights), plan, block_size, kv_dtype),
        backend=backend,
        dtype=weight_dtype,
        kv_dtype=kv_dtype,
        num_blocks=plan.num_blocks,
        block_size=block_size,
        kv_memory_bytes=plan.memory_bytes,
        notes=plan.notes,
    )


def _start(
    program: Program, backend: ReferenceBackend, plan: KVPlan, block_size: int, kv_dtype: Dtype
) -> ModelRunner:
    try:
        return ModelRunner(program, backend, plan.num_blocks, block_size, kv_dtype)
    except MemoryError:
        raise ConfigError(
            f"--kv-cache-memory-bytes: the system refuses {plan.memory_bytes} bytes for the KV "
            f"cache; give less"
        ) from None


def _resolve_backend(name: str) -> str:
    if name not in BACKENDS:
        accepted = ", ".join(BACKENDS)
        raise ConfigError(f"--backend: {name!r} is not in this version; accepted: {accepted}")
    return "reference"


def _check_no_quantization(quantization: str | None) -> None:
    if quantization is not None:
        raise ConfigError(
            f"--quantization: {quantization!r} is not in this version; leave it out, and weights "
            f"stay as the checkpoint has them"
        )


def _resolve_dtype(flag: str, name: str, auto: Dtype) -> Dtype:
    if name == "auto":
        return auto
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise ConfigError(f"{flag}: {name!r} is not one of {', '.join(('auto', *DTYPES))}")


def _check_positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{flag}: must be 1 or more, not {value}")
