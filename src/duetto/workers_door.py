"""A door whose engines are workers: what it needs of them, and how it is joined to them."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import msgspec

from duetto.build import FrontEnd, ReusedModel
from duetto.checkpoints.pooling import find_embedding_model
from duetto.cluster.address import WireAddress, read_address
from duetto.cluster.doorway import Doorway
from duetto.cluster.events.subscriber import EventSubscriber
from duetto.cluster.facts import WorkerFacts
from duetto.cluster.members import RemoteMembers
from duetto.cluster.router import RoutedEngine
from duetto.cluster.secret import ClusterSecret
from duetto.cluster.wire import Wire
from duetto.core.batch import StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.embeddings import EmbeddingModel
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError
from duetto.core.shape import StepTime
from duetto.models.programs import load_program
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.host import HostPrices, prices_on
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.reuse import LookShare, look_share
from duetto.program.program import Program
from duetto.program.reuse import reuse_limits
from duetto.program.rewrites.headless import headless
from duetto.program.shape import Precision
from duetto.routing.policies import RouterName, make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.routing.prefix_index import PrefixIndex
from duetto.worker_facts import model_fingerprint

logger = logging.getLogger(__name__)

LEARNED_STEPS = 64  # after which prices are asked for again
_DTYPES = ("float32", "float16", "bfloat16")


class DoorModel(NamedTuple):
    """What a door must know of the model that its workers compute."""

    program: Program
    embeddings: EmbeddingModel | None
    fingerprint: str | None  # None: there are no weights here, so the first worker's counts


def door_model(front: FrontEnd, args: EngineArgs) -> DoorModel:
    """Raises CheckpointError or ConfigError."""
    config, program = load_program(front.root, args.asked_len)
    embeddings, _ = find_embedding_model(
        front.root, args.runner, config, matryoshka=args.matryoshka
    )
    if embeddings is not None:
        program = headless(program)
    fingerprint = None
    with suppress(CheckpointError):
        fingerprint = model_fingerprint(front.root, program, front.codec)
    return DoorModel(program, embeddings, fingerprint)


class WorkersDoor:
    """Listens for workers, or calls them, and routes between them. To be closed."""

    def __init__(
        self,
        model: DoorModel,
        router: RouterName,
        version: str,
        secret: ClusterSecret | None = None,
    ) -> None:
        self._model = model
        self._router = router
        self.wire = Wire(secret)
        self._index = PrefixIndex()
        self._events = EventSubscriber(self._index, secret)
        self.members = RemoteMembers(self._make_router, self._why_not, self._events)
        self.unanswered: dict[WireAddress, str] = {}  # why no worker of an address is here
        self.doorway = Doorway(self.wire, self.members, version, "", self._not_answered)
        self.prices: HostPrices | None = None  # of the first worker's steps, at the beginning

    def listen(self, address: str, flag: str) -> WireAddress:
        """Raises ConfigError, naming the flag."""
        bound = self.wire.bind(read_address(address, flag, listens=True), flag)
        self.doorway.listen(bound)
        return bound.address

    def call(self, addresses: Sequence[WireAddress]) -> None:
        for address in addresses:
            self.doorway.call(address)

    def close(self) -> None:
        self.doorway.stop()
        if self.members.facts is not None:
            for worker in self.members.router.workers:
                worker.handle.stop(0.0)
        self._events.close()
        self.wire.stop()

    @property
    def num_answering(self) -> int:
        return sum(worker.takes_requests for worker in self.members.joined_workers)

    @property
    def num_prefilling(self) -> int:
        return sum(worker.role == "prefill" for worker in self.members.joined_workers)

    def _why_not(self, facts: WorkerFacts) -> str | None:
        ours = self._model.fingerprint
        if ours is None or ours == facts.model:
            return None
        return f"another model: {facts.model!r:.120}, and here it is {ours!r}"

    def _not_answered(self, address: WireAddress, reason: str, is_refused: bool) -> None:
        said = "does not serve here" if is_refused else "does not answer"
        if self.unanswered.get(address) != reason:
            logger.warning("the worker at %s %s: %s", address, said, reason)
        self.unanswered[address] = reason

    def _make_router(self, facts: WorkerFacts) -> RoutedEngine:
        self.prices = worker_prices(facts, self._model.program)
        share = look_share(self._model.program)
        learned = LearnedPrices(self.prices.step_time, facts.scheduler, share)
        policy = make_policy(self._router, learned.waits)
        return RoutedEngine(policy, index=self._index, observe=learned.observe)


class LearnedPrices:
    """Prices of waits, which follow what the steps of workers took. One thread at a time."""

    def __init__(self, start: StepTime, config: SchedulerConfig, share: LookShare) -> None:
        self._times = LearnedStepTime(start, share)
        self.waits = WaitPrices(self._times.step_time, config)
        self._num_seen = 0

    def observe(self, record: StepRecord) -> None:
        self._times.observe(record.shape, record.end_time - record.start_time)
        self._num_seen += 1
        if self._num_seen % LEARNED_STEPS == 0:
            self.waits.forget()


def worker_prices(facts: WorkerFacts, program: Program) -> HostPrices:
    """Of a worker's steps, by the hardware that it says it has; it may say anything."""
    precision = Precision(
        weight_bytes=min(max(facts.weight_bytes, 0.1), 8.0),
        activation_bytes=4.0,
        kv_bytes=min(max(facts.kv_bytes, 0.1), 8.0),
    )
    try:
        hardware = msgspec.json.decode(facts.hardware, type=HardwareSpec)
        return prices_on(program, hardware, precision)
    except (ValueError, ConfigError) as error:  # msgspec's are ValueErrors
        logger.warning("prices of workers are guessed: %s", str(error)[:200])
        return prices_on(program, None, precision)


class Numerics(NamedTuple):
    """How workers compute, for people and replies."""

    computed_by: str
    dtype: str
    quantization: str
    kv_dtype: str


def numerics_in_words(numerics: str) -> Numerics:
    """Of WorkerFacts (runner/load.py makes it)."""
    parts = numerics.split("/")
    place = next((i for i, part in enumerate(parts) if part in _DTYPES), None)
    if place is None or place + 2 > len(parts) - 1:
        return Numerics(numerics, "unknown", "none", "unknown")
    return Numerics(
        "/".join(parts[:place]), parts[place], "/".join(parts[place + 1 : -1]), parts[-1]
    )


def door_config(config: SchedulerConfig, num_workers: int) -> SchedulerConfig:
    """A worker's configuration as that of a door of so many: as many requests run. What one request
    can be stays a worker's."""
    return replace(config, max_num_seqs=min(config.max_num_seqs * max(1, num_workers), 2**16))


def reused_model(front: FrontEnd, model: DoorModel, facts: WorkerFacts) -> ReusedModel:
    return ReusedModel(
        *(front.root, model.program, facts.numerics, model.embeddings),
        *(reuse_limits(model.program), facts.scheduler),
    )
