"""What counts as a hang, by a clock that the test moves; and that no pause of ours does."""

import threading
from dataclasses import dataclass, field

import pytest

from duetto.core.shape import BatchShape, RequestShape
from duetto.engine.compute import Computing
from duetto.engine.watchdog import (
    LEAST_S,
    LEAST_UNMEASURED_S,
    MAX_TICK_S,
    TICK_S,
    Watchdog,
    time_limit_s,
)


@dataclass
class Thread:
    computing: Computing | None = None
    has_work: bool = True
    has_failed: bool = False
    last_progress_time: float = 0.0


@dataclass
class Times:
    """Prices of steps, of which no size was measured, or each."""

    are_measured: bool

    def step_time(self, shape: BatchShape) -> float:
        raise NotImplementedError

    def has_measured(self, shape: BatchShape) -> bool:
        assert shape.requests
        return self.are_measured

    def observe(self, shape: BatchShape, seconds: float) -> None:
        raise NotImplementedError


def computation(num_requests: int, predicted_s: float | None, is_measured: bool = True):
    shape = BatchShape((RequestShape(1, 9),) * num_requests)
    return Computing(shape, predicted_s, None if predicted_s is None else Times(is_measured))


@dataclass
class World:
    """A watchdog whose looks are taken by hand."""

    thread: Thread = field(default_factory=Thread)
    now: float = 0.0

    def watch(self, **settings) -> Watchdog:
        return Watchdog(self.thread, lambda _: None, clock=lambda: self.now, **settings)

    def look_for(self, watchdog: Watchdog, seconds: float, tick_s: float = TICK_S) -> str | None:
        """Look until something is wrong, at most for so long."""
        end = self.now + seconds
        while self.now < end:
            self.now += tick_s
            if failure := watchdog.look():
                return failure
        return None


@pytest.mark.parametrize(
    ("predicted_s", "is_measured", "timeout", "limit_s"),
    [
        (0.01, True, "auto", LEAST_S),
        (3.0, True, "auto", 30.0),  # a slow step that is expected to be slow
        (30.0, False, "auto", 300.0),
        (0.01, False, "auto", LEAST_UNMEASURED_S),  # a guess: the first steps of a model
        (None, False, "auto", LEAST_UNMEASURED_S),
        (30.0, True, 5.0, 5.0),
        (30.0, True, 1, 1),
        (0.01, True, "off", float("inf")),
    ],
)
def test_how_long_a_step_may_take(predicted_s, is_measured, timeout, limit_s):
    assert time_limit_s(computation(8, predicted_s, is_measured), timeout) == limit_s


def test_a_step_beyond_its_limit_is_told_with_the_numbers():
    world = World(Thread(computation(7, 0.5, True)))
    watchdog = world.watch()
    assert world.look_for(watchdog, 9.9) is None
    failure = world.look_for(watchdog, 2.0)
    assert "7 requests" in failure and "0.5 s" in failure and "--step-timeout-s" in failure
    assert world.now <= 10 + 3 * TICK_S


def test_each_computation_has_its_own_time():
    """Also those of one step that is tried again request by request."""
    world = World()
    watchdog = world.watch()
    for _ in range(20):
        world.thread.computing = computation(1, 0.5, True)
        assert world.look_for(watchdog, 9.0) is None


def test_the_time_in_which_the_watch_did_not_run_itself_does_not_count():
    """SIGSTOP for an hour, a debugger, a laptop asleep; then a step that goes on."""
    world = World(Thread(computation(1, 0.5, True)))
    watchdog = world.watch()
    world.look_for(watchdog, 2.0)
    for _ in range(5):
        world.now += 3600.0
        assert watchdog.look() is None
    assert world.look_for(watchdog, 10 - 2 - 5 * MAX_TICK_S - TICK_S) is None
    assert world.look_for(watchdog, 1.0) is not None  # but it is watched on


def test_no_work_is_no_hang():
    world = World(Thread(has_work=False))
    watchdog = world.watch(stall_timeout_s=5.0)
    assert world.look_for(watchdog, 1000.0) is None
    world.thread.has_work = True
    assert world.look_for(watchdog, 4.5) is None


def test_work_without_a_step_is_a_hang_too_and_progress_is_none():
    world = World()
    watchdog = world.watch(stall_timeout_s=5.0)
    for time in range(10):
        world.thread.last_progress_time = float(time)
        assert world.look_for(watchdog, 4.0) is None
    assert "nothing was computed" in world.look_for(watchdog, 4.0)


def test_a_long_step_is_no_stall():
    world = World(Thread(computation(1, 100.0, True)))
    assert world.look_for(world.watch(stall_timeout_s=5.0), 900.0) is None


def test_a_thread_that_has_failed_is_told_once():
    told = []
    heard = threading.Event()

    def hear(failure):
        told.append(failure)
        heard.set()

    watchdog = Watchdog(Thread(has_failed=True, has_work=False), hear)
    watchdog.start()
    assert heard.wait(5)
    watchdog._thread.join(5)
    assert told == ["the engine's thread has ended"] == [watchdog.failure]


def test_off_never_ends_anything():
    world = World(Thread(computation(1, 0.5, True)))
    assert world.look_for(world.watch(step_timeout_s="off"), 5000.0) is None
