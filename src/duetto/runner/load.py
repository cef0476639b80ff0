"""From a checkpoint directory to a runner that is ready to execute.

The one place where a model, a backend and a KV cache meet. Knows no scheduler, tokenizer or text;
says what it chose on the user's behalf in `LoadedModel.notes`, and prints nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from duetto.backends.backend import Backend
from duetto.backends.device import DeviceBackend
from duetto.backends.parts.backend import PartsBackend
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.checkpoints.config import ModelConfig
from duetto.checkpoints.pooling import find_embedding_model
from duetto.core.embeddings import EmbeddingModel
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.files import Progress
from duetto.core.reuse_choice import ReuseLimits
from duetto.models.programs import load_program
from duetto.program.dtype import DTYPE_BYTES, Dtype, KVDtype
from duetto.program.kv_size import KVPlan, kv_number_bytes, plan_kv
from duetto.program.program import Program
from duetto.program.reuse import reuse_limits
from duetto.program.rewrites.headless import headless
from duetto.program.shape import Precision
from duetto.runner import device_room
from duetto.runner.choose_backend import choose_backend, host_quantization
from duetto.runner.cuda_loader import CudaLoader
from duetto.runner.device_runner import DeviceRunner
from duetto.runner.host_memory import available_memory_bytes
from duetto.runner.loaders import (
    CpuLoader,
    Loader,
    ReferenceLoader,
    default_cache_dir,
)
from duetto.runner.masks import Masks
from duetto.runner.model_runner import ModelRunner
from duetto.runner.parts_loader import Degrees, PartsLoader
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.tiers.load import fingerprint_of, open_room, reserved_bytes, tiers_in_words
from duetto.runner.tiers.mover import TierRoom


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and everything about it that was "auto"."""

    config: ModelConfig
    program: Program
    runner: ModelRunner | DeviceRunner
    runners: tuple[ModelRunner | DeviceRunner, ...]  # that one among them: one a batch under way
    backend: str  # "cpu", "reference" or "cuda"
    computed_by: str  # the backend, and whatever of it decides the last bits
    dtype: Dtype
    quantization: str  # "none", or how, and what is left out
    kv_dtype: KVDtype
    num_blocks: int  # of each runner
    block_size: int
    weight_bytes: int  # as they are held
    kv_memory_bytes: int  # a draft model's KV included
    notes: tuple[str, ...]  # for people: what was chosen on their behalf
    max_drafts: Mapping[str, int]  # of one request in one step, by method; empty: no speculation
    tiers: TierRoom | None = None  # where KV goes that leaves the arena
    embeddings: EmbeddingModel | None = None  # what it gives, if that is not answers
    device: str | None = None  # the name of the GPU; None: this machine computes

    @property
    def max_model_len(self) -> int:
        return self.program.max_model_len

    def close(self) -> None:
        """End its processes, if there are some; nothing can be computed any more then."""
        backend = self.runner.backend
        if isinstance(backend, PartsBackend):
            backend.close()

    @property
    def computed_s(self) -> tuple[float, ...]:
        """Seconds that each part of the model has computed steps; none: it is in one piece."""
        backend = self.runner.backend
        return backend.host.busy_s() if isinstance(backend, PartsBackend) else ()

    @property
    def reuse_limits(self) -> ReuseLimits:
        """What reuse of KV cannot do."""
        limits = reuse_limits(self.program)
        if isinstance(self.runner.backend, PartsBackend):
            return limits._replace(no_looks="parts of a model (--tp, --pp) are not looked at")
        return limits

    @property
    def precision(self) -> Precision:
        """Bytes per number as they are held; activations are fp32 on every backend of this host."""
        activation_bytes = 4 if self.device is None else DTYPE_BYTES[self.dtype]
        return Precision(
            weight_bytes=self.weight_bytes / self.program.num_parameters,
            activation_bytes=float(activation_bytes),
            kv_bytes=kv_number_bytes(self.program, self.kv_dtype),
        )

    @property
    def numerics(self) -> str:
        """All that decides what a token's KV is, bit for bit, beside the model and the tokens."""
        return _numerics(self.computed_by, self.dtype, self.quantization, self.kv_dtype)


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


class Holding(NamedTuple):
    """How a model is held: by which loader, in which numbers."""

    loader: Loader
    dtype: Dtype
    quantization: str  # "none", or how, and what is left out
    kv_dtype: KVDtype
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Companion:
    """What is held beside a model in the same memory: what proposes drafts for it."""

    name: str
    weight_bytes: int
    fixed_bytes: int  # weights, and blocks of its own
    block_bytes: int  # of KV, for each of the model's blocks; 0: it takes no memory
    max_drafts: Mapping[str, int]  # of one request in one step, by method
    load: Callable[[ModelPlan, Progress | None], Mapping[str, Proposer]]  # after the model itself

    def needs(self, num_blocks: int) -> str:
        """What it takes beside so many of the model's blocks, to end a sentence about memory."""
        if not self.block_bytes:
            return ""
        own = num_blocks * self.block_bytes
        return (
            f" ({self.name} takes {self.fixed_bytes / 2**20:.1f} MiB with its weights, and "
            f"{own / 2**20:.1f} MiB of KV beside {num_blocks} blocks)"
        )


def load_model(
    model_dir: Path,
    args: EngineArgs,
    *,
    on_progress: Progress | None = None,
    on_status: Callable[[str], None] | None = None,
    companion: Companion | None = None,
    masks: Masks | None = None,
) -> LoadedModel:
    """Load a model to be served, and its companion.

    on_progress: called with (bytes loaded, bytes in all), the companion's among them.
    on_status: called with a line about work that will take a while.
    masks: of grammars that answers must follow; without them none may be asked for.

    Refuses before any weight is read, as far as that can be known: raises ConfigError, naming the
    flag, or CheckpointError, naming the file.
    """
    config, program = load_program(model_dir, args.asked_len)
    embeddings, told_of_runner = find_embedding_model(
        model_dir, args.runner, config, matryoshka=args.matryoshka
    )
    if embeddings is not None:
        _check_pooling(args)
        program = headless(program)
    plan = plan_model(config, program, args, on_status=on_status, companion=companion)
    loader, program = plan.loader, plan.program
    device_room.check_room(loader, plan.block_size, plan.kv_dtype, plan.kv)
    computing, proposers = _load_weights(model_dir, plan, companion, on_progress)
    tiers = _open_tiers(model_dir, plan, args)
    told = [] if tiers is None else [tiers_in_words(tiers, args)]
    runners = [_start(computing, plan, proposers, companion, tiers, masks)]
    for _ in range(1, loader.num_batches):
        more = None if masks is None else masks.for_another()
        runners.append(_start(computing, plan, proposers, companion, tiers, more))
    return LoadedModel(
        config=config,
        program=program,
        runner=runners[0],
        runners=tuple(runners),
        backend=loader.name,
        computed_by=loader.computed_by,
        dtype=plan.dtype,
        quantization=plan.quantization,
        kv_dtype=plan.kv_dtype,
        num_blocks=plan.kv.num_blocks,
        block_size=plan.block_size,
        weight_bytes=loader.weight_bytes,
        kv_memory_bytes=plan.kv.memory_bytes,
        notes=(*plan.notes, *loader.notes, *plan.kv.notes, *told, *told_of_runner),
        max_drafts=companion.max_drafts if companion is not None else {},
        tiers=tiers,
        embeddings=embeddings,
        device=None if loader.memory is None else loader.memory.device,
    )


def _check_pooling(args: EngineArgs) -> None:
    """Raise ConfigError, naming the pair, for what only answers have."""
    given = {
        "--speculative-config": args.speculative_config,
        "--speculative-model": args.speculative_model,
        "--tool-call-parser": args.tool_call_parser,
        "--reasoning-parser": args.reasoning_parser,
    }
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{flag} and embeddings (--runner pooling, or a model that is made for them): "
                f"nothing is generated; leave one of the two out, or say --runner generate"
            )


def _numerics(computed_by: str, dtype: Dtype, quantization: str, kv_dtype: KVDtype) -> str:
    return "/".join((computed_by, dtype, quantization, kv_dtype))


def _open_tiers(model_dir: Path, plan: ModelPlan, args: EngineArgs) -> TierRoom | None:
    """What was asked for beside the arena. Files are told apart by the checkpoint and all that
    decides its KV."""
    block_bytes = plan.loader.kv_block_bytes(plan.block_size, plan.kv_dtype)
    names: list[str] = []
    if args.kv_offloading_disk is not None:
        with Checkpoint(model_dir, plan.program) as checkpoint:
            names.append(checkpoint.fingerprint())
        computed_by = plan.loader.computed_by
        names.append(_numerics(computed_by, plan.dtype, plan.quantization, plan.kv_dtype))
        names += [fingerprint_of(plan.program), str(plan.block_size)]
    longest = -(-plan.kv.max_model_len // plan.block_size)
    return open_room(args, plan.kv.num_blocks, block_bytes, names, longest=longest)


def _load_weights(
    model_dir: Path, plan: ModelPlan, companion: Companion | None, on_progress: Progress | None
) -> tuple[Backend, Mapping[str, Proposer]]:
    loader, program = plan.loader, plan.program
    if companion is None:
        return loader.load(program, model_dir, on_progress), {}
    own, beside = loader.weight_bytes, companion.weight_bytes
    first = _part(on_progress, 0, own, own + beside)
    second = _part(on_progress, own, beside, own + beside)
    computing = loader.load(program, model_dir, first)
    return computing, companion.load(plan, second)


def _part(on_progress: Progress | None, before: int, own: int, whole: int) -> Progress | None:
    """Takes the progress of one of two loads, each in bytes of its own kind; tells that of both."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(before + own * done // max(1, total), whole)


def plan_model(
    config: ModelConfig,
    program: Program,
    args: EngineArgs,
    *,
    on_status: Callable[[str], None] | None = None,
    companion: Companion | None = None,
) -> ModelPlan:
    """Decide how a program will be held in this machine's memory. Reads no weight, so the model may
    be one that is not here. What is left to choose in `args`:

    max_model_len: None lets requests be shorter than the program's max_model_len, if memory asks.
    dtype: what the weights are rounded to; "auto" is what config.json names, and float32 if it
        names none. What is quantized is quantized from that, so any dtype may be. The reference
        backend computes in fp32 whatever this is.
    kv_cache_dtype: what keys and values are stored in; "auto" is the weights' dtype on the cpu
        backend, as with all who serve, and float32 on the reference, which loses nothing.
    backend: "auto" is cuda where there is a GPU that can be used, else cpu, or the reference where
        the native module is missing.
    threads: of the cpu backend; None is DUETTO_NUM_THREADS, or as many as this process may use.
    packed_cache: a directory for quantized weights, "off", or "auto" for the user's cache.
    kv_cache_memory_bytes: None leaves the size to the rule of `plan_kv`.
    gpu_memory_utilization: of the cuda backend; None is 0.9.

    Raises ConfigError, naming the flag.
    """
    held = hold(config, program, args, on_status)
    memory = held.loader.memory
    if memory is None:
        available = max(0, available_memory_bytes() - reserved_bytes(args))
    else:
        available = memory.usable_bytes
    kv, notes = _plan_kv(program, args, held, available, companion), held.notes
    if memory is not None:
        notes = [*notes, device_room.device_note(held.loader, args.block_size, held.kv_dtype, kv)]
    return ModelPlan(
        config=config,
        # Not built anew: memory that happens to be free must not choose the frequencies of a rope.
        program=replace(program, max_model_len=kv.max_model_len),
        loader=held.loader,
        dtype=held.dtype,
        quantization=held.quantization,
        kv_dtype=held.kv_dtype,
        block_size=args.block_size,
        available_bytes=available,
        kv=kv,
        notes=tuple(notes),
    )


def _plan_kv(
    program: Program,
    args: EngineArgs,
    held: Holding,
    available_bytes: int,
    companion: Companion | None,
) -> KVPlan:
    """The blocks of the model, and of its companion beside them."""
    # Each batch under way has an arena of its own, of as many blocks.
    block_bytes = held.loader.num_batches * held.loader.kv_block_bytes(
        args.block_size, held.kv_dtype
    )
    left = available_bytes - held.loader.weight_bytes
    left -= held.loader.held_bytes(args.block_size, held.kv_dtype)
    if companion is not None:
        left = _left_beside(companion, left, block_bytes)
        block_bytes += companion.block_bytes
    try:
        return plan_kv(
            program,
            block_size=args.block_size,
            block_bytes=block_bytes,
            max_num_seqs=-(-args.max_num_seqs // held.loader.num_batches),
            memory_bytes=args.kv_cache_memory_bytes,
            available_bytes=max(0, left),
            may_shorten=args.asked_len is None,
            takes_all=held.loader.memory is not None,
        )
    except ConfigError as error:
        num_blocks = -(-program.max_model_len // args.block_size)
        beside = companion.needs(num_blocks) if companion is not None else ""
        needs = device_room.device_needs(held.loader, args.block_size, held.kv_dtype)
        raise ConfigError(f"{error}{beside}{needs}") from None


def _left_beside(companion: Companion, left: int, block_bytes: int) -> int:
    """What is left for KV. Raises ConfigError, with both numbers, if that is not a block."""
    needed = companion.fixed_bytes + block_bytes + companion.block_bytes
    if companion.fixed_bytes and block_bytes <= left < needed:  # else the model alone has no room
        raise ConfigError(
            f"{companion.name}: takes {needed / 2**20:.1f} MiB with its weights and the least KV, "
            f"and {max(0, left) / 2**20:.1f} MiB are left beside the model's own weights; take a "
            f"smaller draft, or quantize one of the two"
        )
    return left - companion.fixed_bytes


def hold(
    config: ModelConfig,
    program: Program,
    args: EngineArgs,
    on_status: Callable[[str], None] | None = None,
) -> Holding:
    """The part of `plan_model` that asks for no room: nothing "auto" is left."""
    backend, gpu, notes = choose_backend(args)
    weight_dtype: Dtype = config.dtype or "float32" if args.dtype == "auto" else args.dtype
    cache_dir = _resolve_cache(args.packed_cache)
    degrees = Degrees(args.tensor_parallel_size, args.pipeline_parallel_size)

    def on_host(part: Program, whole: Program | None = None) -> Loader:
        if backend == "reference":
            return ReferenceLoader(part, weight_dtype)
        return CpuLoader(
            part,
            weight_dtype,
            host_quantization(args),
            args.quantization_skip,
            threads=args.threads,
            cache_dir=cache_dir,
            on_status=on_status,
            whole=whole,
        )

    loader: Loader
    if gpu is not None:
        loader = CudaLoader(program, weight_dtype, args, gpu)
    elif degrees.num_parts > 1:
        loader = PartsLoader(program, args, degrees, weight_dtype, on_host, cache_dir)
    else:
        loader = on_host(program)
    kv_dtype = loader.auto_kv_dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    shown = _shown(args.quantization, args.quantization_skip)
    return Holding(loader, weight_dtype, shown, kv_dtype, notes)


def _start(
    backend: Backend,
    plan: ModelPlan,
    proposers: Mapping[str, Proposer],
    companion: Companion | None,
    tiers: TierRoom | None,
    masks: Masks | None,
) -> ModelRunner | DeviceRunner:
    program, num_blocks = plan.program, plan.kv.num_blocks
    sizes = num_blocks, plan.block_size, plan.kv_dtype
    try:
        if isinstance(backend, DeviceBackend):
            return DeviceRunner(program, backend, *sizes, proposers, tiers=tiers, masks=masks)
        return ModelRunner(program, backend, *sizes, proposers, tiers=tiers, masks=masks)
    except (MemoryError, RuntimeError) as error:
        if not device_room.is_out_of_memory(error):
            raise
        own = num_blocks * plan.loader.kv_block_bytes(plan.block_size, plan.kv_dtype)
        beside = companion.needs(num_blocks) if companion is not None else ""
        raise ConfigError(
            f"--kv-cache-memory-bytes: {device_room.who_refuses(plan.loader)} {own} bytes for the "
            f"KV cache; give less{beside}"
        ) from None


def _resolve_cache(name: str) -> Path | None:
    if name == "off":
        return None
    return default_cache_dir() if name == "auto" else Path(name)


def _shown(quantization: str, skip: Sequence[str]) -> str:
    return " ".join((quantization, *(f"-{pattern}" for pattern in sorted(skip))))
