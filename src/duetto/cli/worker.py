"""`duetto worker`: an engine whose doors are elsewhere."""

import gc
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from duetto import __version__
from duetto.build import Built, build
from duetto.cli.kv_events import AUTO, follow_pool, worker_publisher
from duetto.cluster.address import (
    WireAddress,
    check_answers,
    check_exposure_of,
    read_address,
)
from duetto.cluster.disaggregation.attach import DEFAULT_LINK, LinkOptions, check_role
from duetto.cluster.facts import ROLES, WorkerRole
from duetto.cluster.links.tcp import LinkTLS
from duetto.cluster.secret import read_secret
from duetto.cluster.sockets import BoundSocket
from duetto.cluster.wire import DEAD_AFTER_S, Wire
from duetto.cluster.worker import WorkerServer
from duetto.cluster.worker_process import WorkerProcess
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.demo import demo_model_dir
from duetto.server.observe.logs import logged
from duetto.worker_facts import engine_of_role, facts_of, with_own_grammar


def worker(
    model: str | None = None,
    *,
    listen: str | None = None,
    join: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    role: WorkerRole = "both",
    kv_link: str = DEFAULT_LINK,
    kv_events: str = AUTO,
    kv_link_tls: str | None = None,
    max_local_prefill: int | None = None,
    cluster_secret_file: str | None = None,
    join_timeout: float = 30.0,
    dead_after: float = DEAD_AFTER_S,
    shutdown_timeout: float = 30.0,
    step_timeout_s: float | Literal["auto", "off"] = "auto",
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info",
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Run an engine for doors in other processes: duetto router, or duetto serve.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    listen
        Where doors may come: tcp://HOST:PORT (* for any port that is free), or ipc:///PATH.
    join
        The address of a door to go to; may be repeated. It is joined again whenever it comes back.
    role
        What the worker does: prefill of others' prompts, decode of prompts that others may have
        computed, or both.
    kv_link
        Where a prefill worker listens for decode workers: shm://* on one machine, or
        tcp://HOST:PORT (* for any port that is free).
    kv_link_tls
        CERTIFICATE,KEY,AUTHORITY: PEM files with which KV links over TCP are encrypted. Both sides
        show a certificate that the authority has signed; all workers of a cluster need them, or
        none.
    kv_events
        Where the worker publishes which prefix blocks it has cached: tcp://HOST:PORT,
        ipc:///PATH, or off. auto is a free port where doors reach the worker, if that is known.
    max_local_prefill
        Prompts of up to so many uncached tokens are computed by a decode worker itself; by default
        those for which that is the cheaper way.
    cluster_secret_file
        A file of its owner alone with what all workers and doors of a cluster know, at least 16
        bytes; also read from DUETTO_CLUSTER_SECRET. Addresses beyond this machine need it.
    join_timeout
        Seconds to wait for the first door.
    dead_after
        Seconds of silence after which a door counts as dead, and its requests are aborted.
    shutdown_timeout
        Seconds that running requests have to end once the worker is told to stop.
    step_timeout_s
        Seconds that a step may take, after which the worker ends with exit code 70, for a
        supervisor to start it again; auto is ten times what was predicted, and at least 10.
    log_level
        How much is logged, on stderr.
    """
    if role not in ROLES:
        raise ConfigError(f"--role {role!s:.40}: accepted: {', '.join(ROLES)}")
    if role != "both" and args is not None and args.num_parts > 1:
        raise ConfigError(
            f"--role {role} and --tp or --pp: KV is sent from this process's memory, and theirs is "
            f"in others; leave one of the two out"
        )
    if max_local_prefill is not None and role != "decode":
        raise ConfigError(f"--max-local-prefill with --role {role}: it is of --role decode")
    args = args or EngineArgs()
    check_role(role, has_prefix_caching=args.enable_prefix_caching, backend=args.backend)
    tls = _tls(kv_link_tls)
    _check_seconds(join_timeout, dead_after, shutdown_timeout)
    secret = read_secret(cluster_secret_file)
    doors = [read_address(text, "--join", listens=False) for text in join]
    for door in doors:
        check_exposure_of(door, "--join", secret)
    if listen is None and not doors:
        raise ConfigError("needs --listen ADDRESS for doors to come to, or --join ADDRESS of one")
    wire, publisher = Wire(secret, dead_after), None
    try:
        bound = None
        if listen is not None:  # before a model is loaded, as it is what most often fails
            bound = wire.bind(read_address(listen, "--listen", listens=True), "--listen")
        for door in doors:
            check_answers(door, "--join", join_timeout)
        at = None if bound is None else bound.address
        publisher = worker_publisher(kv_events, args, secret, at, doors)
        model = str(demo_model_dir()) if model is None else model
        built = build(model, args, lambda line: print(line, file=sys.stderr))
        follow_pool(publisher, built)
        events, replay = ("", "") if publisher is None else (publisher.events, publisher.replay)
        facts = facts_of(built, __version__, role, events=events, replay=replay)
        links = LinkOptions(kv_link, secret, tls)
        engine = engine_of_role(built, facts, max_local_prefill, links)
    except BaseException:
        wire.stop()
        if publisher is not None:
            publisher.close()
        raise
    server = WorkerServer(
        *(engine.facts, engine.open_engine, wire),
        vocab_size=built.codec.vocab_size,
        prepare=lambda request: with_own_grammar(request, built.grammars),
        step_timeout_s=step_timeout_s,
    )
    process = WorkerProcess(
        server,
        shutdown_timeout_s=shutdown_timeout,
        join_timeout_s=join_timeout if bound is None else None,
    )
    _announce(built, role, bound, doors)
    gc.freeze()  # what is there now stays: no collection looks at it between two tokens
    with logged(log_level):
        server.start()
        if bound is not None:
            server.listen(bound)
        for door in doors:
            server.join(door)
        try:
            process.run()
        finally:
            engine.close()
            if publisher is not None:
                publisher.close()


def _tls(files: str | None) -> LinkTLS | None:
    """Raises ConfigError for what is not three files that make TLS."""
    if files is None:
        return None
    paths = [Path(name) for name in files.split(",") if name]
    if len(paths) != 3:
        raise ConfigError(f"--kv-link-tls {files:.80}: CERTIFICATE,KEY,AUTHORITY is accepted")
    tls = LinkTLS(*paths)
    tls.context(listens=True)  # read before a model is loaded
    return tls


def _check_seconds(join_timeout: float, dead_after: float, shutdown_timeout: float) -> None:
    if not 1.0 <= dead_after <= 3600.0:
        raise ConfigError(f"--dead-after {dead_after:g}: must be from 1 to 3600 seconds")
    for flag, seconds in (("join", join_timeout), ("shutdown", shutdown_timeout)):
        if not 0.0 <= seconds <= 86_400.0:
            raise ConfigError(f"--{flag}-timeout {seconds:g}: must be from 0 to 86400 seconds")


def _announce(
    built: Built, role: WorkerRole, bound: BoundSocket | None, doors: list[WireAddress]
) -> None:
    """What a person wants to know before the first request, on stderr."""
    where = [f"listens at {bound.address}"] if bound is not None else []
    where += [f"joins {door}" for door in doors]
    model, config = built.model, built.scheduler_config
    lines = [
        f"Duetto {__version__}: a worker of {built.name} ({role}) {', '.join(where)}",
        f"  {model.computed_by}, context {config.max_model_len}, {config.num_blocks} blocks "
        f"of {config.block_size} tokens ({model.kv_dtype})",
        *(f"  note: {note}" for note in built.notes),
    ]
    print("\n".join(lines), file=sys.stderr)
