"""What a model takes of memory, and how many requests have room, before a weight is read.

Joins the parts as build.py does: this machine is asked what `duetto serve` would allocate, and
hardware elsewhere is priced (planner/fit.py). Allocates nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from duetto.build import companion_of
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.checkpoints.config import ModelConfig
from duetto.checkpoints.pooling import find_embedding_model
from duetto.core.config import scheduler_config
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.speculation import SpeculativeConfig
from duetto.models.find import find_config, find_draft_program
from duetto.models.programs import build_program
from duetto.planner.fit import Capacity, Change, device_changes, fewest_devices, fit_devices
from duetto.planner.layout import PRECISION_OF, KVName, Layout
from duetto.pricing.cost_model import check_devices
from duetto.pricing.find_hardware import HOST, find_hardware
from duetto.pricing.memory import MemoryFit, size_in_words
from duetto.program.activations import LargestStep
from duetto.program.dtype import Dtype, auto_kv_dtype
from duetto.program.program import Program
from duetto.program.rewrites.headless import headless
from duetto.runner.load import ModelPlan, plan_model

_ENOUGH = 2**62  # bytes
_ONLY_HERE = (
    *("backend", "threads", "packed_cache", "quantization_skip"),
    *("kv_offloading_size", "kv_offloading_disk", "kv_offloading_disk_size"),
)
FitReport = dict[str, Any]


def examine(
    model: str,
    args: EngineArgs,
    hardware: str = HOST,
    *,
    tp: int | None = None,
    pp: int = 1,
    length: int | None = None,
) -> FitReport:
    """All that `duetto fit` says. Raises ConfigError or CheckpointError for what cannot be.

    tp: None takes the fewest devices with which it fits.
    length: tokens of a request, answer included; None is the longest that is allowed.
    """
    if args.revision is not None:
        raise ConfigError("--revision: is for models on the hub, and what fits is told of others")
    config = find_config(model)
    program = _as_run(Path(model), config, build_program(config, args.asked_len), args)
    _check_headers(Path(model), program)
    if length is not None and not 1 <= length <= program.max_model_len:
        raise ConfigError(
            f"--length: must be from 1 to {program.max_model_len}, the longest that is allowed, "
            f"not {length}"
        )
    if hardware == HOST:
        tp = tp or args.tensor_parallel_size
        pp = max(pp, args.pipeline_parallel_size)
        args = replace(args, tensor_parallel_size=tp, pipeline_parallel_size=pp)
        fit = _fit_host(config, program, args)
        changes = _host_changes(config, program, args, length)
    else:
        spec = find_hardware(hardware)
        if args.tensor_parallel_size > 1 and tp is None:
            tp = args.tensor_parallel_size
        pp = max(pp, args.pipeline_parallel_size)
        layout = _layout(config, args, 1 if tp is None else tp, pp)
        draft = _draft(args, program)
        if tp is None:
            layout = fewest_devices(program, spec, layout, draft)
        check_devices(spec, layout.deployment(program))
        tp, fit = layout.tp, fit_devices(program, spec, layout, draft)
        changes = device_changes(program, spec, layout, length, draft)
    about = {"model": model, "hardware": hardware, "devices": tp * pp, "tp": tp}
    about |= {"parameters": program.num_parameters, "max_num_seqs": args.max_num_seqs}
    return about | _sizes(fit, length) | {"knobs": [_knob(change) for change in changes]}


def _sizes(fit: Capacity, length: int | None) -> FitReport:
    memory, length = fit.memory, length or fit.longest
    return {
        "fits": memory.fits,
        "max_model_len": fit.longest,
        **asdict(memory),
        "kv_bytes": memory.kv_bytes,
        "left_bytes": memory.left_bytes,
        "num_tokens": memory.num_tokens,
        "length": length,
        "num_requests": memory.num_requests(length) if fit.longest and memory.fits else 0,
        "notes": fit.notes,
    }


def _knob(change: Change) -> FitReport:
    return {
        "change": change.words,
        "weight_bytes": change.memory.weight_bytes,
        "num_tokens": change.memory.num_tokens,
        "length": change.length,
        "num_requests": change.num_requests,
    }


def _fit_host(config: ModelConfig, program: Program, args: EngineArgs) -> Capacity:
    """As `duetto serve` would allocate on this machine, now."""
    companion = companion_of(args, config.context_length)
    refusal: ConfigError | None = None
    try:
        plan = plan_model(config, program, args, companion=companion)
    except ConfigError as error:
        # What is too large is to be shown with its sizes; what cannot be at all is refused again.
        refusal, endless = error, replace(args, kv_cache_memory_bytes=_ENOUGH, max_model_len=None)
        plan = plan_model(config, program, endless, companion=companion)
    step = _largest_step(args, plan)
    loader, memory = plan.loader, plan.loader.memory
    fit = MemoryFit(
        memory_bytes=plan.available_bytes if memory is None else memory.memory_bytes,
        usable_bytes=plan.available_bytes,
        weight_bytes=loader.weight_bytes + (companion.fixed_bytes if companion else 0),
        activation_bytes=loader.step_bytes(step, plan.kv_dtype)
        + loader.held_bytes(plan.block_size, plan.kv_dtype),
        block_bytes=plan.kv.memory_bytes // (plan.kv.num_blocks * loader.num_batches),
        block_size=plan.block_size,
        num_blocks=0 if refusal else plan.kv.num_blocks * loader.num_batches,
    )
    notes = [*plan.notes, *plan.loader.notes, *(() if refusal else plan.kv.notes)]
    if companion is not None and companion.fixed_bytes:
        notes.append(f"weights and KV are those of the model and of its draft ({companion.name})")
    notes.append(f"{plan.loader.name} backend, {plan.dtype} weights, {plan.kv_dtype} KV")
    if plan.quantization != "none":
        notes.append(f"quantization {plan.quantization}")
    if refusal:
        return Capacity(fit, 0, [*notes, str(refusal)])
    if not fit.fits:
        notes.append(
            f"weights, activations and KV together are {size_in_words(-fit.left_bytes)} more than "
            f"the {size_in_words(fit.usable_bytes)} that may be used"
        )
    return Capacity(fit, plan.kv.max_model_len, notes)


def _largest_step(args: EngineArgs, plan: ModelPlan) -> LargestStep:
    """No token without a slot for its KV, and no logits without a token. Raises ConfigError where
    a scheduler would, as at a start."""
    config = scheduler_config(
        args, num_blocks=plan.kv.num_blocks, max_model_len=plan.kv.max_model_len
    )
    slots = config.num_blocks * config.block_size
    num_tokens = min(config.max_num_batched_tokens, slots)
    return LargestStep(
        num_tokens=num_tokens,
        num_logit_rows=min(config.max_num_seqs, num_tokens),
        max_model_len=config.max_model_len,
        num_kv_tokens=slots,
    )


def _as_run(model: Path, config: ModelConfig, program: Program, args: EngineArgs) -> Program:
    """Without its head, where the model is run for embeddings: of one that is not here, if that is
    asked for."""
    if not model.is_dir():
        return headless(program) if args.runner == "pooling" else program
    embeddings, _ = find_embedding_model(model, args.runner, config, matryoshka=args.matryoshka)
    return program if embeddings is None else headless(program)


def _check_headers(model: Path, program: Program) -> None:
    """What is wrong with a checkpoint is said now, and not when it is loaded."""
    if model.is_dir() and any(model.glob("*.safetensors")):
        with Checkpoint(model, program):
            pass


def _layout(config: ModelConfig, args: EngineArgs, tp: int, pp: int) -> Layout:
    """The flags of this host as those of a deployment elsewhere."""
    plain = EngineArgs()
    for name in _ONLY_HERE:
        if getattr(args, name) != getattr(plain, name):
            raise ConfigError(f"--{name.replace('_', '-')}: is for --hardware {HOST} only")
    dtype = config.dtype or "bfloat16" if args.dtype == "auto" else args.dtype
    return Layout(
        tp=tp,
        pp=pp,
        dtype=dtype if args.quantization == "none" else PRECISION_OF[args.quantization],
        kv_cache_dtype=_kv_elsewhere(dtype, args),
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.asked_len,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        speculative_config=_as_text(args.speculative_config),
        speculative_model=args.speculative_model,
    )


def _kv_elsewhere(dtype: Dtype, args: EngineArgs) -> KVName:
    if args.kv_cache_dtype == "auto":
        return auto_kv_dtype(dtype)
    return "float8" if args.kv_cache_dtype == "fp8" else args.kv_cache_dtype


def _as_text(config: str | dict[str, Any] | list[Any] | None) -> str | None:
    return config if config is None or isinstance(config, str) else json.dumps(config)


def _draft(args: EngineArgs, target: Program) -> Program | None:
    """The draft model beside the target, elsewhere."""
    config = SpeculativeConfig.parse(args.speculative_config, args.speculative_model)
    options = None if config is None else config.draft_model
    return None if options is None else find_draft_program(options, target)


def _host_changes(
    config: ModelConfig, program: Program, args: EngineArgs, length: int | None
) -> Iterator[Change]:
    changes: list[tuple[str, EngineArgs]] = [
        (f"--quantization {name}", replace(args, quantization=name))
        for name in ("int8", "int4")
        if args.quantization != name
    ]
    if args.kv_cache_dtype != "int8":
        changes.append(("--kv-cache-dtype int8", replace(args, kv_cache_dtype="int8")))
    for words, changed in changes:
        try:
            fit, longest, _ = _fit_host(config, program, changed)
        except ConfigError:  # not on this machine: no knob
            continue
        yield Change(words, fit, length or longest)
    fit, longest, _ = _fit_host(config, program, args)
    if not longest:
        return
    spare = max(0, fit.usable_bytes - fit.weight_bytes - fit.activation_bytes)
    more = replace(fit, num_blocks=spare // fit.block_bytes)
    yield Change(f"--kv-cache-memory-bytes {more.kv_bytes} (all)", more, length or longest)
    yield Change(f"requests of {longest // 2} tokens", fit, longest // 2)
