"""Workers and doors in one process, over real sockets: engines without a model behind them."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

from fakes import ByteCodec, FunctionExecutor, ShadowExecutor

from duetto.cluster.address import read_address
from duetto.cluster.doorway import Doorway
from duetto.cluster.facts import WorkerFacts, why_not_together
from duetto.cluster.wire import Wire
from duetto.cluster.worker import WorkerServer
from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=64, max_model_len=128, block_size=4, max_num_batched_tokens=32)
CODEC = ByteCodec()
FACTS = WorkerFacts(
    version="1",
    worker_id="w1",
    name="fake",
    model="f",
    numerics="n",
    kv_layout="k",
    block_bytes=64,
    scheduler=CONFIG,
)
DEADLINE_S = 20.0  # CI machines are slow


def decode(ids, skip):
    return CODEC.decode(ids, skip_special_tokens=skip)


def shadow_engine(config=CONFIG):
    """An engine whose answers show any wrong read."""
    executor = ShadowExecutor(config.num_blocks, config.block_size)
    return Engine(Scheduler(config), executor, decode)


class GatedExecutor:
    """Says the letter 'a'; each step waits for the gate, which closes after so many steps."""

    def __init__(self):
        self.inner = FunctionExecutor(lambda *_: ord("a"))
        self.gate = threading.Event()
        self.gate.set()
        self.closes_after = None

    def submit(self, batch):
        self.gate.wait(DEADLINE_S)
        if self.closes_after is not None:
            self.closes_after -= 1
            if self.closes_after == 0:
                self.gate.clear()
        return self.inner.submit(batch)


class Heard:
    """A dispatcher that keeps all it is told; it takes nothing back, unless `rescues`."""

    def __init__(self, ours=None, rescues=False):
        self.changed = threading.Condition()
        self.ours = ours
        self.rescues = rescues
        self.workers, self.reports, self.gone, self.left = [], [], [], []
        self.rescued = []

    def _note(self, where, what):
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def why_not(self, facts):
        return None if self.ours is None else why_not_together(self.ours, facts)

    def joined(self, worker):
        self._note(self.workers, worker)

    def deliver(self, worker, report):
        self._note(self.reports, report)

    def leaving(self, worker):
        self._note(self.left, worker)

    def lost(self, worker, reason, unbegun):
        if self.rescues:
            for request in unbegun:
                self._note(self.rescued, request)
            unbegun = ()
        self._note(self.gone, (worker, reason))
        return unbegun

    def not_taken(self, worker, request, reason):
        if self.rescues:
            self._note(self.rescued, request)
        return self.rescues

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S), "it did not happen in time"
            return condition()

    def worker(self, number=0):
        self.wait(lambda: len(self.workers) > number)
        return self.workers[number]

    def updates(self, request_id):
        return [u for r in self.reports for u in r.updates if u.request_id == request_id]

    def finals(self, request_id):
        return [u for u in self.updates(request_id) if u.finish_reason is not None]

    def final(self, request_id):
        return self.wait(lambda: self.finals(request_id))[0]

    def tokens(self, request_id):
        return [t.token_id for u in self.updates(request_id) for t in u.tokens]


def until(condition):
    """Wait for what nobody tells."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def address_of(text):
    return read_address(str(text), "--listen", listens=True)


@contextmanager
def worker_server(engine=None, facts=FACTS, secret=None, dead_after_s=5.0, **options):
    """A WorkerServer that runs, and nobody's yet."""
    wire = Wire(secret, dead_after_s)
    engine = shadow_engine(facts.scheduler) if engine is None else engine
    server = WorkerServer(facts, in_thread(engine), wire, vocab_size=2**20, **options)
    server.start()
    server.wire = wire
    server.engine = engine
    try:
        yield server
    finally:
        server.leave(0.0)


@contextmanager
def door(heard, secret=None, dead_after_s=5.0, version="1"):
    """A Doorway with its wire."""
    wire = Wire(secret, dead_after_s)
    doorway = Doorway(wire, heard, version, "test")
    doorway.wire = wire
    wire.start()
    try:
        yield doorway
    finally:
        doorway.stop()
        for worker in heard.workers:
            worker.stop(1.0)
        assert wire.stop()


@contextmanager
def pair(tmp_path, heard=None, is_joining=False, door_dead_after_s=5.0, **options):
    """A worker and a door that have met, and the worker as the door has it."""
    heard = heard or Heard()
    with worker_server(**options) as server, door(heard, dead_after_s=door_dead_after_s) as doorway:
        address = address_of(f"ipc://{tmp_path}/s")
        if is_joining:
            doorway.listen(doorway.wire.bind(address, "--listen"))
            server.join(address)
        else:
            server.listen(server.wire.bind(address, "--listen"))
            doorway.call(address)
        yield server, heard, heard.worker()


def other_facts(**changes):
    scheduler = changes.pop("scheduler", {})
    return replace_struct(FACTS, scheduler=replace(CONFIG, **scheduler), **changes)


def replace_struct(facts, **changes):
    return WorkerFacts(**{f: getattr(facts, f) for f in facts.__struct_fields__} | changes)
