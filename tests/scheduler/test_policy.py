import random

import pytest
from fakes import make_request
from scheduler.scripted import SMALL

from duetto.core.config import SchedulerConfig
from duetto.scheduler.policy import POLICIES, anyone, batch_by_batch, by_arrival, by_priority

CONFIG = SchedulerConfig(**SMALL | {"ageing_s": 10.0})


def test_first_come_first_served_looks_at_nothing_else() -> None:
    requests = [make_request(priority=p, arrival_time=t) for p, t in [(5, 0.0), (0, 3.0)]]
    assert {by_arrival(request, CONFIG) for request in requests} == {0.0}


@pytest.mark.parametrize(
    ("waited_s", "goes_first"), [(9.0, "urgent"), (11.0, "old"), (1000.0, "old")]
)
def test_waiting_is_worth_a_level_of_priority(waited_s: float, goes_first: str) -> None:
    old = make_request("old", priority=1, arrival_time=0.0)
    urgent = make_request("urgent", priority=0, arrival_time=waited_s)
    first = min(old, urgent, key=lambda request: by_priority(request, CONFIG))
    assert first.request_id == goes_first


def test_a_constant_key_orders_as_ageing_by_the_clock_does_at_every_instant() -> None:
    rng = random.Random(0)
    requests = [
        make_request(f"r{i}", priority=rng.randrange(5), arrival_time=rng.uniform(0, 100))
        for i in range(50)
    ]
    by_key = sorted(requests, key=lambda request: by_priority(request, CONFIG))
    for now in (100.0, 123.4, 1e5):
        aged = sorted(requests, key=lambda r: r.priority - (now - r.arrival_time) / CONFIG.ageing_s)
        assert [r.request_id for r in aged] == [r.request_id for r in by_key]


def test_continuous_batching_lets_anyone_in() -> None:
    assert anyone(None, [make_request()], 3, 4) is None


@pytest.mark.parametrize(
    ("chosen", "num_running", "expected"),
    [
        (None, 0, {"r0", "r1"}),  # nothing runs: choose as many as there are places
        (frozenset({"old"}), 0, {"r0", "r1"}),  # the batch before does not count
        (frozenset({"old"}), 1, {"old"}),  # one is left of the batch: nobody joins
    ],
)
def test_static_batching_chooses_when_nothing_runs(chosen, num_running, expected) -> None:
    waiting = [make_request(f"r{i}") for i in range(3)]
    assert batch_by_batch(chosen, waiting, num_running, max_num_seqs=2) == expected


def test_only_static_batches_are_closed() -> None:
    waiting = [make_request()]
    closed = {name for name, policy in POLICIES.items() if policy.choose(None, waiting, 0, 1)}
    assert closed == {"static"}
