"""Several engines of this process behind one handle, and one door that hears all."""

import threading
from contextlib import contextmanager

from cluster_world import CONFIG, DEADLINE_S, decode, shadow_engine

from duetto.cluster.members import add_local
from duetto.cluster.router import RoutedEngine
from duetto.core.errors import DeviceLost
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.routing.policies import make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.scheduler.scheduler import Scheduler


class Collected:
    """A door's ear: keeps every report, and refuses a second final update."""

    def __init__(self):
        self.reports, self.ended, self.wrong = [], {}, []
        self.changed = threading.Condition()

    def __call__(self, report):
        with self.changed:
            for update in report.updates:
                if update.request_id in self.ended:
                    self.wrong.append(update)
                elif update.finish_reason is not None:
                    self.ended[update.request_id] = update
            self.reports.append(report)
            self.changed.notify_all()

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S), "it did not happen in time"

    def final(self, request_id):
        self.wait(lambda: request_id in self.ended)
        return self.ended[request_id]

    def updates(self, request_id):
        return [u for r in self.reports for u in r.updates if u.request_id == request_id]

    def tokens(self, request_id):
        return [token for update in self.updates(request_id) for token in update.tokens]

    def records(self):
        return [r.record for r in self.reports if r.record is not None]


class Breakable:
    """An executor whose device is lost once it is told so; each step waits for the gate."""

    def __init__(self, inner):
        self.inner = inner
        self.gate, self.entered, self.is_lost = threading.Event(), threading.Event(), False
        self.gate.set()

    def submit(self, batch):
        self.entered.set()
        self.gate.wait(DEADLINE_S)
        if self.is_lost:
            raise DeviceLost("d", "it fell")
        return self.inner.submit(batch)

    def lose(self):
        self.is_lost = True
        self.gate.set()


def breakable_engine(inner, config=CONFIG):
    executor = Breakable(inner)
    return Engine(Scheduler(config), executor, decode), executor


def step_time(shape):
    return 0.001 + 1e-5 * shape.num_tokens


@contextmanager
def routed(engines, policy="least-loaded", config=CONFIG, **options):
    """A router of these engines, and what its door hears."""
    heard = Collected()
    router = RoutedEngine(make_policy(policy, WaitPrices(step_time, config)), heard, **options)
    workers = [
        add_local(router, f"w{i}", engine.scheduler.config, in_thread(engine))
        for i, engine in enumerate(engines)
    ]
    for worker in workers:
        worker.handle.start()
    try:
        yield router, heard
        assert not heard.wrong
    finally:
        router.stop(DEADLINE_S)


def shadow_engines(count, config=CONFIG):
    return [shadow_engine(config) for _ in range(count)]
