"""`duetto planner` watches running servers, recommends, and acts."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2 as httpx
import pytest
from cli.in_process import duetto
from planner.test_observed import snapshot
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running

from duetto.cli.planner import Watching
from duetto.measure.metrics import SLO
from duetto.planner.forecast import Forecast, RoleCounts
from duetto.planner.observed import MetricsError, Snapshot
from duetto.planner.resampled import MeasuredLoad
from duetto.planner.watch import Watcher
from duetto.planner.watch_options import WatchOptions


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duetto.planner.forecast.MOST", 60)


LIMITS = ("--slo-ttft", "1s", "--slo-tpot", "50ms", "--hardware", "h100:8")
SHAPE = ("--model", "llama-3.2-1b", *LIMITS)


@contextmanager
def under_load(url: str) -> Iterator[None]:
    """Requests one after the other, until the end of the block."""
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url) as client:
            while not is_over.is_set():
                client.post(
                    "/v1/completions",
                    json={"model": MODEL, "prompt": "a prompt of some words", "max_tokens": 4},
                )

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_two_servers_are_watched_and_one_would_do() -> None:
    app, _ = make_app(SpeakingExecutor("Hi!"))
    other, _ = make_app(SpeakingExecutor("Hi!"))
    with running(app) as url, running(other) as second, under_load(url):
        words = ("planner", f"decode={url}", f"prefill={second}", *SHAPE, "--interval", "1s")
        done = duetto(*words, "--num-windows", "2", "--agree-fewer", "1", "--json")
    assert done.returncode == 0, done.stderr
    decisions = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(decisions) == 2
    assert decisions[0]["current"] == {"replicas": 1, "prefill_replicas": 1}
    assert decisions[0]["action"] == "change"
    assert decisions[0]["target"] == {"replicas": 1, "prefill_replicas": 0}
    assert "requests/s" in decisions[0]["seen"] and "TTFT 100.0%" in decisions[0]["seen"]


def test_in_words() -> None:
    app, _ = make_app(SpeakingExecutor("Hi!"))
    with running(app) as url, under_load(url):
        words = ("planner", url, *SHAPE, "--interval", "1s", "--num-windows", "1")
        done = duetto(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("seen: 1 s, ") and lines[-1].startswith("stay at 1 replica: ")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("127.0.0.1:9",), "no server answers there"),
        (("prefill=127.0.0.1:9", "--interval", "1"), "nobody answers"),
        (("a:1", "b:1", "--replicas", "2"), "of one address"),
        (("a:1", "--interval", "10ms"), "--interval"),
        (("a:1", "--num-windows", "0"), "--num-windows"),
        (("a:1", "--headroom", "0"), "--headroom"),
        (("a:1", "--apply"), "--worker"),
        (("a:1", "--worker", "x --join tcp://h:1"), "need --apply"),
        (("a:1", "--apply", "--worker", "it's"), "--worker"),
        (("a:1", "--slo-tpot", "50"), "needs a unit"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], why: str) -> None:
    done = duetto("planner", *SHAPE, *words)
    assert done.returncode == 1 and why in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- the loop, in virtual time -----------------------------------------------------------------


@dataclass
class Servers:
    """One server, which counts as many requests as there are seconds, times its rate."""

    rate: float = 10.0
    now: float = 0.0
    num_finished: float = 0.0
    role: str | None = None
    is_down: bool = False
    client: httpx.Client = field(default_factory=lambda: httpx.Client(base_url="http://there"))

    def look(self) -> Snapshot | None:
        return None if self.is_down else snapshot(self.num_finished)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.num_finished += seconds * self.rate


@dataclass
class Recorded:
    """An actuator that does what it is told, and remembers it."""

    told: list[tuple[int, int]] = field(default_factory=list)

    def scale(self, replicas: int, prefill: int) -> None:
        self.told.append((replicas, prefill))

    def live(self) -> tuple[int, int]:
        return self.told[-1]

    def stop(self) -> None:
        self.scale(0, 0)


class TenEach:
    def forecast(self, counts: RoleCounts, load: MeasuredLoad, slowdown: float) -> Forecast:
        return Forecast(counts, min(1.0, 10 * counts.replicas / load.rate), 0.1, 0.2, 0.4)


def watching_of(
    server: Servers, watcher: Watcher, replicas: int, acts: Recorded | None = None
) -> Watching:
    clock = lambda: server.now  # noqa: E731
    counts = RoleCounts(replicas)
    return Watching([server], watcher, counts, acts, clock=clock, sleep=server.sleep)  # type: ignore[list-item]


def test_decisions_are_carried_out_and_the_dead_are_started_again() -> None:
    server, acts = Servers(), Recorded()
    watcher = Watcher(WatchOptions(disaggregate=False), SLO(ttft=1.0, tpot=1.0), TenEach())
    watching = watching_of(server, watcher, 1, acts)
    decisions = watching.decisions(30.0, 6, lambda: False)
    assert next(decisions).target == RoleCounts(2)  # 11.5 requests/s with headroom
    server.rate = 28.0
    assert next(decisions).target == RoleCounts(4)
    assert [d.target.total for d in decisions] == [4, 4, 4, 4]
    assert acts.told[0] == (1, 0) and acts.told[-1] == (4, 0)
    assert len(acts.told) == 7  # after every window, so that what has died is started again


def test_a_window_in_which_nobody_answers_is_left_out() -> None:
    server = Servers()
    watcher = Watcher(WatchOptions(), SLO(ttft=1.0, tpot=1.0), TenEach())
    watching = Watching(
        [server], watcher, RoleCounts(2), clock=lambda: server.now, sleep=server.sleep
    )
    decisions = watching.decisions(30.0, 4, lambda: False)
    assert next(decisions)
    server.is_down = True
    assert not [*decisions]


def test_workers_that_were_just_started_are_waited_for() -> None:
    server, acts = Servers(is_down=True), Recorded()
    watcher = Watcher(WatchOptions(disaggregate=False), SLO(ttft=1.0, tpot=1.0), TenEach())
    watching = watching_of(server, watcher, 1, acts)

    def rises() -> bool:
        server.is_down = server.now < 40.0
        return False

    assert len([*watching.decisions(30.0, 1, rises)]) == 1 and server.now >= 70.0
    with pytest.raises(MetricsError, match="no server answers there"):
        next(watching_of(Servers(is_down=True), watcher, 1, Recorded()).decisions(30.0, 1, bool))


def test_ctrl_c_ends_it_between_two_windows() -> None:
    server = Servers()
    watcher = Watcher(WatchOptions(), SLO(ttft=1.0, tpot=1.0), TenEach())
    watching = Watching(
        [server], watcher, RoleCounts(1), clock=lambda: server.now, sleep=server.sleep
    )
    assert not [*watching.decisions(30.0, None, lambda: server.now > 7.0)]
