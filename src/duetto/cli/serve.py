"""`duetto serve`: a model over HTTP, with the OpenAI API."""

import gc
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from cyclopts import Parameter

from duetto import __version__
from duetto.build import Built, build, reuse_choice, reuse_rules
from duetto.cli.default_model import model_or_demo, say_that_none_was_named
from duetto.cli.fit import show_fit
from duetto.cli.output import JsonFlag
from duetto.core.embeddings import EmbeddingModel
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import OFF, ReuseRules
from duetto.demo import demo_model_dir
from duetto.engine.speech import Speech
from duetto.engine.thread import in_thread
from duetto.runner.load import LoadedModel
from duetto.server.app import create_app
from duetto.server.http.serve import listen
from duetto.server.http.serve import serve as run
from duetto.server.settings import STORED_BYTES, ServerSettings

API_KEY_VARIABLE = "DUETTO_API_KEY"


def serve(
    model: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    any_model_name: Annotated[bool, Parameter(negative="")] = False,
    api_key: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    insecure_no_auth: Annotated[bool, Parameter(negative="")] = False,
    allowed_origins: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: JsonFlag = False,
    max_num_queued_reqs: int = 256,
    sse_keep_alive_interval: float = 15.0,
    shutdown_timeout: float = 30.0,
    step_timeout_s: float | Literal["auto", "off"] = "auto",
    store_responses: bool = True,
    reuse: str = OFF,
    allow_unmeasured_reuse: Annotated[bool, Parameter(negative="")] = False,
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info",
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Serve a model over HTTP.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    host
        The address to listen on; one that others can reach needs --api-key.
    port
        The port to listen on.
    served_model_name
        The name clients ask for; may be repeated, and replies show the first. By default that of
        the directory.
    any_model_name
        Accept whatever name clients ask for; replies show the served one.
    api_key
        A key that clients must bring; may be repeated. Also read from DUETTO_API_KEY.
    insecure_no_auth
        Serve without a key, also on a public address or under a foreign host name.
    allowed_origins
        A web page that may use the server, as its origin: https://app.example, app://*, or * for
        all; may be repeated. By default those of this machine.
    dry_run
        Say what would fit into this machine's memory, as `duetto fit` does, and end.
    as_json
        With --dry-run: the last line of stdout is one JSON document.
    max_num_queued_reqs
        Most requests that wait; more are told to come back (503). While others ask, one client
        (an API key, or an address where there are none) may have half of them (then 429).
    sse_keep_alive_interval
        Seconds of silence after which a stream gets a comment.
    shutdown_timeout
        Seconds that running requests have to end once the server is told to stop.
    step_timeout_s
        Seconds that a step may take, after which the server ends with exit code 70, for a
        supervisor to start it again; auto is ten times what was predicted, and at least 10.
    store_responses
        Keep what /v1/responses answers in memory, so that clients may go on from it.
    reuse
        How texts are reused that callers mark as reusable (docs/api.md), where they do not choose
        themselves: off, or a method with its numbers, as first:16. This changes answers.
    allow_unmeasured_reuse
        Let --reuse and callers choose what was not measured to be good enough on this model.
    log_level
        How much is logged, on stderr. info: a line for each request, and one of throughput every
        ten seconds while busy. debug: also uvicorn's own, and replies beside answers.
    """
    is_named, args = model is not None, args or EngineArgs()
    if dry_run:
        show_fit(model_or_demo(model), args, as_json=as_json)
        return
    model = str(demo_model_dir()) if model is None else model
    if as_json:
        raise ConfigError("--json: needs --dry-run; a server prints nothing else on stdout")
    default_reuse = reuse_choice(reuse)
    keys = (*api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)]))
    settings = ServerSettings(
        served_model_name=served_model_name[0] if served_model_name else model,
        other_model_names=served_model_name[1:],
        accepts_any_model=any_model_name,
        version=__version__,
        seed=args.seed,
        api_keys=keys,
        allowed_origins=allowed_origins,
        only_local_hosts=not keys and not insecure_no_auth,
        max_num_queued_reqs=max_num_queued_reqs,
        sse_keep_alive_s=sse_keep_alive_interval,
        shutdown_timeout_s=shutdown_timeout,
        step_timeout_s=step_timeout_s,
        max_stored_bytes=STORED_BYTES if store_responses else 0,
    )
    with listen(host, port, api_keys=keys, insecure_no_auth=insecure_no_auth) as listener:
        built = build(model, args, on_status=lambda line: print(line, file=sys.stderr))
        settings = replace(
            settings,
            served_model_name=served_model_name[0] if served_model_name else built.name,
            default_sampling=built.default_sampling,
            model_root=str(built.root),
            dtype=built.model.dtype,
            quantization=built.model.quantization,
            kv_cache_dtype=built.model.kv_dtype,
            backend=built.model.computed_by,
            max_drafts=built.model.max_drafts,
            embeddings=built.model.embeddings,
            reuse=reuse_rules(built, default_reuse, allow_unmeasured=allow_unmeasured_reuse),
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
        _announce(built, settings, listener.getsockname())
        gc.freeze()  # what is there now stays: no collection looks at it between two tokens
        run(app, settings, listener, log_level=log_level)


def _announce(built: Built, settings: ServerSettings, address: tuple[str, int]) -> None:
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
