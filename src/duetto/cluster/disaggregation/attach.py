"""A role for an engine: what steps in its place, and where its KV link listens."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from duetto.cluster.disaggregation.decode_side import DecodeSide
from duetto.cluster.disaggregation.kv_frames import KVHello
from duetto.cluster.disaggregation.peer import LayerRows
from duetto.cluster.disaggregation.prefill_choice import PrefillChoice
from duetto.cluster.disaggregation.prefill_side import PrefillSide
from duetto.cluster.disaggregation.sending import LayersOf
from duetto.cluster.facts import WorkerFacts, WorkerRole
from duetto.cluster.links.calls import LinkListener
from duetto.cluster.links.choose import connect_link, listen_for_links
from duetto.cluster.links.link import LinkEnd, LinkUser
from duetto.cluster.links.tcp import LinkTLS
from duetto.cluster.secret import ClusterSecret
from duetto.core.errors import ConfigError
from duetto.engine.engine import Engine
from duetto.engine.handle import Deliver, EngineHandle, EngineOpener
from duetto.engine.thread import EngineThread, in_thread

DEFAULT_LINK = "shm://*"  # of a prefill worker: for others on its machine


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How KV links are made."""

    address: str = DEFAULT_LINK  # where a prefill worker listens
    secret: ClusterSecret | None = None
    tls: LinkTLS | None = None


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What links read and write of an engine."""

    rows: LayerRows  # of all layers
    layers_done: LayersOf


@dataclass(slots=True)
class WithRole:
    """An engine of a role."""

    open_engine: EngineOpener
    facts: WorkerFacts  # with the role, and where its link listens
    side: DecodeSide | PrefillSide | None = None
    _closers: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """End links. After the engine's thread has ended."""
        for close in self._closers:
            close()


def check_role(role: WorkerRole, *, has_prefix_caching: bool, backend: str) -> None:
    """Raises ConfigError for what cannot have a role, before a model is loaded."""
    if role == "both":
        return
    if not has_prefix_caching:
        raise ConfigError(
            f"--role {role} with --no-enable-prefix-caching: KV from another engine is a cached "
            f"prefix; leave one of the two out"
        )
    if backend == "cuda":
        raise ConfigError(
            f"--role {role} with --backend cuda: KV links do not read a GPU's memory yet; use "
            f"--role both, or --backend cpu"
        )


def attach_disaggregation(
    engine: Engine,
    memory: EngineMemory,
    facts: WorkerFacts,
    vocab_size: int,
    *,
    max_local_prefill: int | None = None,
    links: LinkOptions | None = None,
) -> WithRole:
    """Give an engine the role that its facts name; its steps have not begun.

    Raises ConfigError for an address that cannot be used, or a model that has no prefixes.
    """
    role, links = facts.role, links or LinkOptions()
    if role == "both":
        return WithRole(in_thread(engine), facts)
    config = facts.scheduler
    check_role(role, has_prefix_caching=config.enable_prefix_caching, backend="")
    if config.is_pooling:
        raise ConfigError(f"--role {role}: this model is served for embeddings, and keeps no KV")
    hello = _hello(facts, memory.rows)
    choice = PrefillChoice(
        hello.block_bytes,
        config.block_size,
        config.max_num_batched_tokens,
        engine.step_time,
        max_local_prefill,
    )
    if role == "decode":
        return _decodes(engine, memory, facts, hello, choice, links)
    return _prefills(engine, memory, facts, hello, choice, vocab_size, links)


def _decodes(
    engine: Engine,
    memory: EngineMemory,
    facts: WorkerFacts,
    hello: KVHello,
    choice: PrefillChoice,
    links: LinkOptions,
) -> WithRole:
    def open_link(address: str, user: LinkUser) -> LinkEnd:
        return connect_link(address, user, links.secret, tls=links.tls)

    side = DecodeSide(engine, memory.rows, hello, open_link, choice)
    return WithRole(_opener(side), facts, side, [side.close])


def _prefills(
    engine: Engine,
    memory: EngineMemory,
    facts: WorkerFacts,
    hello: KVHello,
    choice: PrefillChoice,
    vocab_size: int,
    links: LinkOptions,
) -> WithRole:
    side = PrefillSide(engine, memory.rows, memory.layers_done, hello, vocab_size, choice)

    def accept(link: LinkEnd) -> LinkUser:
        session = side.session()
        session.serve(link)
        return session

    listener: LinkListener = listen_for_links(links.address, accept, links.secret, tls=links.tls)
    facts = msgspec.structs.replace(facts, link=listener.address)
    return WithRole(_opener(side), facts, side, [listener.close, side.close])


def _opener(side: DecodeSide | PrefillSide) -> EngineOpener:
    def open_engine(deliver: Deliver) -> EngineHandle:
        thread = EngineThread(side, deliver)
        side.wake = lambda: thread.wake()
        return thread

    return open_engine


def _hello(facts: WorkerFacts, rows: LayerRows) -> KVHello:
    """The bytes of a block are those that are moved: an arena may pad what a program needs."""
    own = KVHello.of(facts, len(rows))
    return msgspec.structs.replace(
        own, block_bytes=sum([array.shape[1] for arrays in rows for array in arrays])
    )
