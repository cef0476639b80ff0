"""What a worker says of itself, and what it makes its own of what others send."""

import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import msgspec

from duetto.build import Built
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.checkpoints.tokenizer import Tokenizer
from duetto.cluster.disaggregation.attach import (
    EngineMemory,
    LinkOptions,
    WithRole,
    attach_disaggregation,
)
from duetto.cluster.facts import WorkerFacts, WorkerRole
from duetto.core.errors import ConfigError, EngineError
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.grammars.compile import CompiledGrammars
from duetto.pricing.host import hardware_here
from duetto.program.kv_size import bytes_per_block
from duetto.program.program import Program
from duetto.runner.load import LoadedModel
from duetto.runner.model_runner import ModelRunner


def facts_of(
    built: Built,
    version: str,
    role: WorkerRole = "both",
    *,
    link: str = "",
    events: str = "",
    replay: str = "",
) -> WorkerFacts:
    """`version` is Duetto's. Each call gives another worker_id: a worker asks once, when it
    starts."""
    loaded = built.model
    return WorkerFacts(
        version=version,
        worker_id=uuid4().hex,
        role=role,
        name=built.name,
        model=model_fingerprint(built.root, loaded.program, built.codec),
        numerics=loaded.numerics,
        kv_layout=kv_layout(loaded),
        block_bytes=bytes_per_block(loaded.program, loaded.block_size, loaded.kv_dtype),
        scheduler=built.scheduler_config,
        hardware=msgspec.json.encode(hardware_here(loaded.device)),
        weight_bytes=loaded.precision.weight_bytes,
        kv_bytes=loaded.precision.kv_bytes,
        process=os.getpid(),
        link=link,
        events=events,
        replay=replay,
    )


def engine_of_role(
    built: Built, facts: WorkerFacts, max_local_prefill: int | None, links: LinkOptions
) -> WithRole:
    """The engine of a worker, whose steps have not begun, as its role wants it."""
    engine, runner = built.engine, built.model.runner
    if facts.role == "both":
        return WithRole(in_thread(engine), facts)
    if not isinstance(engine, Engine) or not isinstance(runner, ModelRunner):
        raise ConfigError(
            f"--role {facts.role}: KV links read the memory of one engine on the CPU, and this is "
            f"{built.model.computed_by}; use --role both, or --backend cpu without --pp"
        )
    try:
        memory = EngineMemory(runner.block_rows, lambda: runner.backend.layers_done)
    except EngineError as error:
        raise ConfigError(f"--role {facts.role}: {error}") from None
    return attach_disaggregation(
        *(engine, memory, facts, built.codec.vocab_size),
        max_local_prefill=max_local_prefill,
        links=links,
    )


def model_fingerprint(root: Path, program: Program, codec: Tokenizer) -> str:
    """Of weights and of what each token id says: the same for a copy on another machine."""
    with Checkpoint(root, program) as checkpoint:
        weights = checkpoint.fingerprint(is_dated=False)
    tokens = _tokens_digest(codec.tokens())
    return sha256(f"{weights}/{tokens}".encode()).hexdigest()[:32]


def _tokens_digest(tokens: Mapping[int, tuple[str, bool]]) -> str:
    digest = sha256()
    for token_id, (token, is_special) in sorted(tokens.items()):
        digest.update(f"{token_id} {is_special} {token}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def kv_layout(loaded: LoadedModel) -> str:
    """Equal if a block's bytes mean the same: what computes, and sizes."""
    heads = [f"{layer.num_kv_heads}x{layer.head_dim}" for layer in loaded.program.kv]
    runs = [f"{len(list(run))} layers of {size}" for size, run in groupby(heads)]
    block = f"blocks of {loaded.block_size}"
    return ", ".join((loaded.computed_by, loaded.kv_dtype, block, *runs))


def with_own_grammar(request: Request, grammars: CompiledGrammars) -> Request:
    """A request from another process, its grammar compiled and kept here under a name of ours.
    Raises InvalidRequest for a grammar that is none."""
    if request.grammar is None:
        return request
    return replace(request, grammar=grammars.adopt(request.grammar, request.tenant))
