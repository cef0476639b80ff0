"""`duetto router`: the door of a server whose engines are elsewhere."""

import sys
from typing import Annotated

from cyclopts import Parameter

from duetto import __version__
from duetto.build import build_front
from duetto.cli.door_options import DoorOptions
from duetto.cli.output import Flat
from duetto.cli.serve_workers import serve_joined, wait_for_first
from duetto.cluster.address import WireAddress, check_exposure_of, read_address
from duetto.cluster.secret import read_secret
from duetto.core.embeddings import Runner
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.demo import demo_model_dir
from duetto.routing.policies import RouterName
from duetto.server.http.serve import listen as listen_http
from duetto.workers_door import WorkersDoor, door_model


def router(
    model: str | None = None,
    *,
    listen: str | None = None,
    workers: Annotated[
        tuple[str, ...], Parameter(show_default=False, negative="", consume_multiple=True)
    ] = (),
    router: RouterName = "predicted",
    cluster_secret_file: str | None = None,
    join_timeout: float = 60.0,
    revision: str | None = None,
    max_model_len: int | None = None,
    runner: Runner = "auto",
    matryoshka: bool = False,
    chat_template: str | None = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
    seed: int | None = None,
    options: Annotated[DoorOptions | None, Flat] = None,
) -> None:
    """Serve a model over HTTP whose engines are workers, here or elsewhere (duetto worker).

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto. Its weights need not be here.
    listen
        Where workers may join: tcp://HOST:PORT (* for any port that is free), or ipc:///PATH.
    workers
        Addresses of workers that listen; several, or one with commas. Each is called until it
        answers, and again whenever it is lost.
    router
        Which worker gets a request: round-robin, least-loaded, prefix-affinity, or predicted,
        where its first token should come first.
    cluster_secret_file
        A file of its owner alone with what all workers and doors of a cluster know, at least 16
        bytes; also read from DUETTO_CLUSTER_SECRET. Addresses beyond this machine need it.
    join_timeout
        Seconds to wait for the workers that are called; those that join are waited for.
    revision
        Branch, tag or commit of a model on the hub.
    max_model_len
        As the workers have it, if they do.
    runner
        As the workers have it: generate, pooling, or what the model's files say.
    matryoshka
        As the workers have it: embeddings may be cut to fewer dimensions.
    chat_template
        A file with a Jinja template, instead of the checkpoint's own.
    tool_call_parser
        How this model writes calls of tools; by default what its chat template shows.
    reasoning_parser
        How this model marks its reasoning; by default what its chat template shows.
    seed
        Seeds requests that bring none; by default each is drawn.
    """
    options = options or DoorOptions()
    model = str(demo_model_dir()) if model is None else model
    args = EngineArgs(
        revision=revision,
        max_model_len=max_model_len,
        runner=runner,
        matryoshka=matryoshka,
        chat_template=chat_template,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        seed=seed,
    )
    settings = options.settings(model, seed)
    _ = options.default_reuse  # a word that is none is refused before anything else
    called = _called(workers)
    if listen is None and not called:
        raise ConfigError("needs --listen ADDRESS for workers to join, or --workers ADDRESSES")
    if not 0.0 <= join_timeout <= 86_400.0:
        raise ConfigError(f"--join-timeout {join_timeout:g}: must be from 0 to 86400 seconds")
    secret = read_secret(cluster_secret_file)
    for address in called:
        check_exposure_of(address, "--workers", secret)
    insecure = options.insecure_no_auth
    with listen_http(
        options.host, options.port, api_keys=options.keys, insecure_no_auth=insecure
    ) as listener:
        front = build_front(model, args)
        known = door_model(front, args)
        door = WorkersDoor(known, router, __version__, secret)
        try:
            bound = None if listen is None else door.listen(listen, "--listen")
            door.wire.start()
            door.call(called)
            if bound is not None:
                print(f"Duetto {__version__}: workers may join {bound}", file=sys.stderr)
                print(
                    f"  HTTP is answered once one has joined, at port {options.port}",
                    file=sys.stderr,
                )
            is_patient = bound is not None
            wait_for_first(door, len(called), None if is_patient else join_timeout, "--workers")
            serve_joined(front, known, door, options, listener, settings, len(called))
        finally:
            door.close()


def _called(workers: tuple[str, ...]) -> list[WireAddress]:
    """Raises ConfigError for what is no address, or is there twice."""
    words = [word.strip() for each in workers for word in each.split(",")]
    called = [read_address(word, "--workers", listens=False) for word in words]
    if len(set(called)) < len(called):
        raise ConfigError("--workers: an address is there twice")
    return called
