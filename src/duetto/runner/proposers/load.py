"""From a SpeculativeConfig to proposers that can be asked.

Refuses before a weight is read, as far as that can be known. Knows no hub and no tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from duetto.backends.backend import Backend
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.files import Progress
from duetto.core.speculation import (
    FLAG,
    DraftModelOptions,
    MethodOptions,
    NgramOptions,
    SpeculativeConfig,
    SuffixOptions,
)
from duetto.models.programs import load_program
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import MAX_SLOTS
from duetto.program.program import Program
from duetto.runner.load import Companion, ModelPlan, hold
from duetto.runner.loaders import Loader
from duetto.runner.proposers.draft_model import MAX_TOKENS, DraftModelProposer
from duetto.runner.proposers.ngram import NgramProposer
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.proposers.suffix import SuffixProposer


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A draft model that can be loaded: all that is known before a weight is read."""

    name: str
    model_dir: Path
    program: Program
    loader: Loader
    kv_dtype: KVDtype
    block_size: int
    num_scratch_blocks: int  # beyond the target's

    @property
    def block_bytes(self) -> int:
        return self.loader.kv_block_bytes(self.block_size, self.kv_dtype)

    @property
    def fixed_bytes(self) -> int:
        held = self.loader.held_bytes(self.block_size, self.kv_dtype)
        return self.loader.weight_bytes + held + self.num_scratch_blocks * self.block_bytes


def plan_draft(model_dir: Path, options: DraftModelOptions, args: EngineArgs) -> DraftPlan:
    """The draft is held as `args` say of the model, where its options do not say otherwise.

    Raises ConfigError or CheckpointError, naming the draft.
    """
    changes: dict[str, Any] = {"speculative_config": None, "speculative_model": None}
    if options.quantization is not None:
        changes["quantization"] = options.quantization
    if options.kv_cache_dtype is not None:
        changes["kv_cache_dtype"] = options.kv_cache_dtype
    try:
        # Patterns are of the model's own tensors.
        own = replace(
            args,
            max_model_len=options.max_model_len,
            max_num_batched_tokens=MAX_TOKENS + args.max_num_seqs,
            quantization_skip=(),
            **changes,
        )
        config, program = load_program(model_dir, own.asked_len)
        held = hold(config, program, own)
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: the draft model {options.model}: {error}") from error
    blocks_each = -(-options.num_speculative_tokens // args.block_size)
    return DraftPlan(
        name=options.model,
        model_dir=model_dir,
        program=program,
        loader=held.loader,
        kv_dtype=held.kv_dtype,
        block_size=args.block_size,
        num_scratch_blocks=blocks_each * args.max_num_seqs,
    )


def check_contexts(config: SpeculativeConfig, max_model_len: int, draft: DraftPlan | None) -> None:
    """Raise ConfigError for more drafts than a context, the model's or the draft's, can hold."""
    for method, options in config.methods.items():
        limits = {"the model's context": max_model_len}
        if method == "draft_model" and draft is not None:
            limits[f"the context of the draft model {draft.name}"] = draft.program.max_model_len
        for whose, limit in limits.items():
            if options.num_speculative_tokens >= limit:
                raise ConfigError(
                    f"{FLAG}: num_speculative_tokens {options.num_speculative_tokens} of method "
                    f"{method} and {whose}, {limit} tokens: there must be fewer drafts than that"
                )


def plan_companion(
    config: SpeculativeConfig, draft: DraftPlan | None, max_num_seqs: int
) -> Companion:
    """The proposers as what is held beside the model."""

    def load(plan: ModelPlan, on_progress: Progress | None) -> Mapping[str, Proposer]:
        made: dict[str, Proposer] = {
            method: _make(options, draft, plan, max_num_seqs, on_progress)
            for method, options in config.methods.items()
        }
        check_methods(made, plan.loader.name)
        return made

    return Companion(
        name=f"{FLAG}: the draft model {draft.name}" if draft else FLAG,
        weight_bytes=draft.loader.weight_bytes if draft else 0,
        fixed_bytes=draft.fixed_bytes if draft else 0,
        block_bytes=draft.block_bytes if draft else 0,
        max_drafts=config.max_drafts,
        load=load,
    )


def _make(
    options: MethodOptions,
    draft: DraftPlan | None,
    plan: ModelPlan,
    max_num_seqs: int,
    on_progress: Progress | None,
) -> Proposer:
    # Requests that have ended are remembered for a while, as nobody says that they have.
    max_requests = 2 * max_num_seqs + 16
    if isinstance(options, NgramOptions):
        return NgramProposer(options, max_requests)
    if isinstance(options, SuffixOptions):
        return SuffixProposer(options, max_requests)
    assert draft is not None
    if (plan.kv.num_blocks + draft.num_scratch_blocks) * plan.block_size > MAX_SLOTS:
        _refuse_arena(draft, plan)
    backend = _load_weights(draft, plan, on_progress)
    try:
        return DraftModelProposer(
            draft.program,
            backend,
            vocab_size=plan.program.vocab_size,
            num_blocks=plan.kv.num_blocks,
            num_scratch_blocks=draft.num_scratch_blocks,
            block_size=plan.block_size,
            kv_dtype=draft.kv_dtype,
            max_requests=max_requests,
            max_model_len=draft.program.max_model_len,
        )
    except MemoryError:
        _refuse_arena(draft, plan)


def _load_weights(draft: DraftPlan, plan: ModelPlan, on_progress: Progress | None) -> Backend:
    try:
        return draft.loader.load(draft.program, draft.model_dir, on_progress, plan.loader)
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: the draft model {draft.name}: {error}") from error
    except MemoryError:
        raise ConfigError(
            f"{FLAG}: the system refuses {draft.loader.weight_bytes} bytes for the weights of the "
            f"draft model {draft.name}"
        ) from None


def _refuse_arena(draft: DraftPlan, plan: ModelPlan) -> NoReturn:
    num_bytes = (plan.kv.num_blocks + draft.num_scratch_blocks) * draft.block_bytes
    raise ConfigError(
        f"{FLAG}: {num_bytes} bytes for the KV cache of the draft model {draft.name} are more than "
        f"the system gives; lower --kv-cache-memory-bytes"
    ) from None


def check_methods(proposers: Mapping[str, Proposer], backend: str) -> None:
    """Raise ConfigError for a method that needs what no backend gives yet."""
    for method, proposer in proposers.items():
        if proposer.needs_hidden:
            raise ConfigError(
                f"{FLAG}: method {method} reads hidden rows of the model, which the {backend} "
                f"backend does not give; it can run ngram, suffix and draft_model"
            )
