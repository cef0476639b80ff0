"""Flags of KV events: who may follow which blocks an engine has cached."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from duetto.build import Built
from duetto.cluster.address import WireAddress, read_address
from duetto.cluster.events.publisher import EVENTS_FLAG, EventPublisher, PublisherAddresses
from duetto.cluster.events.vllm_config import CONFIG_FLAG, read_vllm_config
from duetto.cluster.secret import ClusterSecret, read_secret
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.engine.engine import Engine

AUTO, OFF = "auto", "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventFlags:
    """Of a server."""

    kv_events: str | None = None
    """Publish which prefix blocks are cached, in vLLM's format, for routers: tcp://HOST:PORT or
    ipc:///PATH. What was missed is asked for at the next port, or at PATH.replay. Beyond this
    machine it needs the secret of a cluster, DUETTO_CLUSTER_SECRET."""
    kv_events_config: str | None = None
    """The same as vLLM's JSON: enable_kv_cache_events, endpoint, replay_endpoint, topic,
    buffer_steps; block hashes are then 64-bit numbers."""
    insecure_kv_events: Annotated[bool, Parameter(negative="")] = False
    """Publish KV events beyond this machine without a secret, token ids of prompts among them."""


@contextmanager
def opened_publisher(
    flags: KVEventFlags, args: EngineArgs, *, num_workers: int = 0
) -> Iterator[EventPublisher | None]:
    """A publisher, before a model is loaded; it follows an engine's pool once there is one. Raises
    ConfigError, in one line."""
    addresses = _server_addresses(flags)
    if addresses is None:
        yield None
        return
    flag = EVENTS_FLAG if flags.kv_events is not None else CONFIG_FLAG
    why_not = _why_no_events(args)
    if num_workers:
        why_not = (
            "with --replicas each worker has a cache of its own; see duetto worker --kv-events"
        )
    if why_not is not None:
        raise ConfigError(f"{flag}: {why_not}")
    publisher = EventPublisher(addresses, read_secret(None), flag=flag)
    try:
        yield publisher
    finally:
        publisher.close()


def worker_publisher(
    given: str,
    args: EngineArgs,
    secret: ClusterSecret | None,
    listen: WireAddress | None,
    doors: Sequence[WireAddress],
) -> EventPublisher | None:
    """Of a worker, for its doors. `auto` is where they find the worker too, if that is known."""
    if given == OFF:
        return None
    why_not = _why_no_events(args)
    if given == AUTO:
        host = _host_for(listen, doors)
        if why_not is not None or host is None:
            return None
        return EventPublisher(PublisherAddresses(str(WireAddress("tcp", host, 0))), secret)
    if why_not is not None:
        raise ConfigError(f"{EVENTS_FLAG}: {why_not}")
    address = read_address(given, EVENTS_FLAG, listens=True)
    if _is_wildcard(address):
        raise ConfigError(f"{EVENTS_FLAG} {given}: doors go there; name an address of this machine")
    return EventPublisher(PublisherAddresses(given), secret)


def follow_pool(publisher: EventPublisher | None, built: Built) -> None:
    """Before the engine runs."""
    if publisher is not None:
        engine = built.engine
        assert isinstance(engine, Engine), "several pools were refused"
        publisher.follow(engine.scheduler.pool, built.scheduler_config.block_size)


def _server_addresses(flags: KVEventFlags) -> PublisherAddresses | None:
    is_open = flags.insecure_kv_events
    if flags.kv_events is not None and flags.kv_events_config is not None:
        raise ConfigError(f"{EVENTS_FLAG} and {CONFIG_FLAG}: give one of them")
    if flags.kv_events_config is not None:
        return read_vllm_config(flags.kv_events_config, is_open=is_open)
    if flags.kv_events is None:
        if is_open:
            raise ConfigError(f"--insecure-kv-events: needs {EVENTS_FLAG} or {CONFIG_FLAG}")
        return None
    return PublisherAddresses(flags.kv_events, is_open=is_open)


def _why_no_events(args: EngineArgs) -> str | None:
    if not args.enable_prefix_caching:
        return "needs the prefix cache, which is turned off"
    if args.pipeline_parallel_size > 1:
        return "with --pp each of the batches under way has a cache of its own"
    return None


def _host_for(listen: WireAddress | None, doors: Sequence[WireAddress]) -> str | None:
    """Where doors can reach this worker; None if nobody has said."""
    if all(address.is_local for address in (*doors, *([listen] if listen else []))):
        return "127.0.0.1"
    if listen is None or listen.is_local or _is_wildcard(listen):
        return None
    return listen.host


def _is_wildcard(address: WireAddress) -> bool:
    return address.kind == "tcp" and address.host in ("0.0.0.0", "::")
