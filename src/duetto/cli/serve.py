"""`duetto serve`: a model over HTTP, with the OpenAI API."""

import gc
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from duetto import __version__
from duetto.build import Built, build, reuse_rules
from duetto.cli.default_model import model_or_demo, say_that_none_was_named
from duetto.cli.door_options import DoorOptions
from duetto.cli.fit import show_fit
from duetto.cli.kv_events import KVEventFlags, follow_pool, opened_publisher
from duetto.cli.output import Flat, JsonFlag
from duetto.cli.serve_workers import MAX_WORKERS, serve_replicas
from duetto.cluster.events.publisher import EventPublisher
from duetto.cluster.facts import WorkerRole
from duetto.core.embeddings import EmbeddingModel
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import ReuseRules
from duetto.demo import demo_model_dir
from duetto.engine.speech import Speech
from duetto.engine.thread import in_thread
from duetto.routing.policies import RouterName
from duetto.runner.load import LoadedModel
from duetto.server.app import create_app
from duetto.server.http.serve import listen
from duetto.server.http.serve import serve as run
from duetto.server.settings import ServerSettings


def serve(
    model: str | None = None,
    *,
    replicas: int = 1,
    prefill_replicas: int = 0,
    router: RouterName | None = None,
    max_local_prefill: int | None = None,
    pin: bool | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: JsonFlag = False,
    options: Annotated[DoorOptions | None, Flat] = None,
    events: Annotated[KVEventFlags | None, Flat] = None,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Serve a model over HTTP.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    replicas
        Engines that answer, each a process of its own (duetto worker) that is started again if it
        ends.
    prefill_replicas
        Engines beside them that compute prompts and send their KV.
    router
        Which of several engines gets a request: round-robin, least-loaded, prefix-affinity, or
        predicted (the default), where its first token should come first.
    max_local_prefill
        With --prefill-replicas: prompts of up to so many uncached tokens are computed where they
        are answered; by default those for which that is the cheaper way.
    pin
        Give each engine processors of its own, as far as there are enough; by default on.
    dry_run
        Say what would fit into this machine's memory, as `duetto fit` does, and end.
    as_json
        With --dry-run: the last line of stdout is one JSON document.
    """
    is_named, args = model is not None, args or EngineArgs()
    if dry_run:
        show_fit(model_or_demo(model), args, as_json=as_json)
        return
    model = str(demo_model_dir()) if model is None else model
    if as_json:
        raise ConfigError("--json: needs --dry-run; a server prints nothing else on stdout")
    options = options or DoorOptions()
    roles = _roles(replicas, prefill_replicas, router, pin)
    _check_local_prefill(max_local_prefill, prefill_replicas)
    default_reuse, settings = options.default_reuse, options.settings(model, args.seed)
    insecure = options.insecure_no_auth
    listener = listen(options.host, options.port, api_keys=options.keys, insecure_no_auth=insecure)
    events = events or KVEventFlags()
    with listener, opened_publisher(events, args, num_workers=len(roles)) as publisher:
        if roles:
            serve_replicas(
                *(model, args, options, listener, settings),
                roles=roles,
                router=router or "predicted",
                max_local_prefill=max_local_prefill,
                pin=pin is not False,
            )
            return
        built = build(model, args, on_status=lambda line: print(line, file=sys.stderr))
        follow_pool(publisher, built)
        settings = replace(
            settings,
            served_model_name=(*options.served_model_name, built.name)[0],
            default_sampling=built.default_sampling,
            model_root=str(built.root),
            dtype=built.model.dtype,
            quantization=built.model.quantization,
            kv_cache_dtype=built.model.kv_dtype,
            backend=built.model.computed_by,
            max_drafts=built.model.max_drafts,
            embeddings=built.model.embeddings,
            reuse=reuse_rules(
                built, default_reuse, allow_unmeasured=options.allow_unmeasured_reuse
            ),
        )
        app = create_app(
            open_engine=in_thread(built.engine),
            codec=built.codec,
            config=built.scheduler_config,
            settings=settings,
            roof_time=built.prices.roof_time,
            grammars=built.grammars,
            speech=built.speech,
        )
        if not is_named:
            say_that_none_was_named()
        _announce(built, settings, listener.getsockname(), publisher)
        gc.freeze()  # what is there now stays: no collection looks at it between two tokens
        run(app, settings, listener, log_level=options.log_level)


def _check_local_prefill(max_local_prefill: int | None, prefill_replicas: int) -> None:
    if max_local_prefill is None:
        return
    if not prefill_replicas:
        raise ConfigError("--max-local-prefill: needs --prefill-replicas of 1 or more")
    if max_local_prefill < 0:
        raise ConfigError(f"--max-local-prefill {max_local_prefill}: must be 0 or more")


def _roles(
    replicas: int, prefill_replicas: int, router: RouterName | None, pin: bool | None
) -> dict[WorkerRole, int]:
    """How many workers of which role are to be started; none: the engine is the server's own.
    Raises ConfigError."""
    if replicas < 1:
        raise ConfigError(f"--replicas {replicas}: must be 1 or more")
    if prefill_replicas < 0:
        raise ConfigError(f"--prefill-replicas {prefill_replicas}: must be 0 or more")
    if replicas + prefill_replicas > MAX_WORKERS:
        raise ConfigError(
            f"--replicas {replicas} and --prefill-replicas {prefill_replicas}: at most "
            f"{MAX_WORKERS} together"
        )
    if prefill_replicas:
        return {"decode": replicas, "prefill": prefill_replicas}
    if replicas > 1:
        return {"both": replicas}
    for flag, value in (("--router", router), ("--pin", pin)):
        if value is not None:
            raise ConfigError(f"{flag}: needs --replicas of 2 or more, or --prefill-replicas")
    return {}


def _announce(
    built: Built,
    settings: ServerSettings,
    address: tuple[str, int],
    publisher: EventPublisher | None,
) -> None:
    """What a person wants to know before the first request, on stderr."""
    model, config, name = built.model, built.scheduler_config, settings.served_model_name
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    lines = [
        f"Duetto {__version__} serves {name} at http://{host}:{address[1]}/v1",
        f"  {model.config.model_type}, {model.program.num_parameters / 1e6:.1f} M parameters in "
        f"{_kept_as(model)} ({model.weight_bytes / 2**20:.0f} MiB), {model.computed_by} backend, "
        f"context {config.max_model_len}",
        f"  KV cache: {_batches(model)}{config.num_blocks} blocks of {config.block_size} tokens "
        f"({model.kv_memory_bytes / 2**20:.0f} MiB, {model.kv_dtype}); "
        f"{config.scheduling_policy}, {config.max_num_batched_tokens} tokens a step",
        *_embeddings(settings.embeddings),
        *_drafts(model.max_drafts),
        *_reuse(settings.reuse),
        *_speech(built.speech),
        *([] if publisher is None else [f"  KV events: {publisher.where}"]),
        *(f"  note: {note}" for note in built.notes),
    ]
    print("\n".join(lines), file=sys.stderr)


def _batches(model: LoadedModel) -> str:
    count = len(model.runners)
    return f"for each of {count} batches under way " if count > 1 else ""


def _embeddings(model: EmbeddingModel | None) -> list[str]:
    if model is None:
        return []
    named = f"; prompts: {', '.join(sorted(model.prompts))}" if model.prompts else ""
    return [f"  embeddings of {model.size} numbers at /v1/embeddings, and nothing else{named}"]


def _drafts(max_drafts: Mapping[str, int]) -> list[str]:
    if not max_drafts:
        return []
    methods = ", ".join(f"{method} (at most {count})" for method, count in max_drafts.items())
    return [f"  drafts: {methods}; as many as pay"]


def _reuse(rules: ReuseRules) -> list[str]:
    if rules.default is None:
        return []
    return [f"  reuse: {rules.default} of what callers mark as reusable; this changes answers"]


def _speech(speech: Speech) -> list[str]:
    calls, reasoning = speech.dialects
    known = {
        "calls of tools": None if calls is None else calls.name,
        "reasoning": None if reasoning is None else reasoning.name,
    }
    told = [f"{what} as {name}" for what, name in known.items() if name is not None]
    return [f"  answers are read: {', '.join(told)}"] if told else []


def _kept_as(model: LoadedModel) -> str:
    return model.dtype if model.quantization == "none" else model.quantization
