"""Simulated drafts against the closed form, and what must not change without them."""

from itertools import pairwise
from statistics import mean

import pytest

from duetto.core.config import SchedulerConfig
from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.drafts import NO_ASKS, Ask
from duetto.simulation.perfetto import trace_events
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.speculation import SimulatedDrafts, SimulatedPrices
from duetto.simulation.uniform import uniform
from duetto.simulation.workload import Arrival, Traffic

CONFIG = SchedulerConfig(
    num_blocks=4096, max_model_len=40_000, max_num_seqs=8, max_num_batched_tokens=512
)


def price(shape):
    """Of a step: reading the weights, and a little for each token."""
    return 1.0 + 0.05 * shape.num_tokens


class Always:
    """As many drafts as there may be, in every step."""

    is_on = True

    def __init__(self, count):
        self.count = count

    def choose(self, candidates, _shape, room, _limit_s=None):
        assert room >= sum(len(c.drafts) for c in candidates)
        return {c.request.request_id: len(c.drafts) for c in candidates}

    def ask(self, planned):
        return {
            p.request.request_id: Ask("ngram", min(self.count, p.num_left))
            for p in planned
            if p.num_left
        } or NO_ASKS

    def learn(self, _outcomes, _drafting_s):
        pass

    def forget(self, _request):
        pass


def drafts(acceptance, count, **more):
    acceptance = acceptance if isinstance(acceptance, tuple) else (acceptance,)
    return SimulatedDrafts(
        method="ngram",
        max_drafts=count,
        acceptance=acceptance,
        make_policy=lambda _step_time: Always(count),
        **more,
    )


def run(drafts, num_requests=1, num_output=8000, **more):
    workload = Traffic(tuple(Arrival(0.0, 16, num_output) for _ in range(num_requests)))
    spec = ReplicaSpec(scheduler=CONFIG, step_time=price, drafts=drafts)
    return simulate(workload, Fleet(replica=spec), **more)


def expected_length(alpha, count):
    """Tokens of a step: Leviathan, Kalman and Matias (2023), (1 - a^(K+1)) / (1 - a)."""
    return (1 - alpha ** (count + 1)) / (1 - alpha)


def per_token(simulation):
    return mean(
        (s.timings.token_times[-1] - s.timings.token_times[0]) / (len(s.timings.token_times) - 1)
        for s in simulation.served
    )


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_speed_up_is_that_of_the_closed_form(alpha, count):
    simulation = run(drafts(alpha, count))
    verifying_s = price(BatchShape((RequestShape(1 + count, 0),)))
    expected = expected_length(alpha, count) * 1.05 / verifying_s
    assert per_token(run(None)) / per_token(simulation) == pytest.approx(expected, rel=0.03)
    report = sum_up(simulation, 1).report
    assert report.drafts.mean_length == pytest.approx(expected_length(alpha, count), rel=0.03)
    assert report.as_json()["tokens_per_step"] == pytest.approx(report.drafts.mean_length, rel=0.01)


def test_passes_of_a_draft_model_cost_their_price():
    alpha, count, pass_s = 0.8, 4, 0.1
    simulation = run(drafts(alpha, count, draft_time=lambda _shape: pass_s))
    step_s = 1.0 + 0.05 * (1 + count) + count * pass_s
    expected = expected_length(alpha, count) * 1.05 / step_s
    assert per_token(run(None)) / per_token(simulation) == pytest.approx(expected, rel=0.03)
    told = simulation.served[0].timings.speculation
    assert told.drafting_s == pytest.approx(told.num_asked * count * pass_s, rel=0.01)
    # What it says that it has saved is the difference of the two runs.
    plain_s, own_s = (s.served[0].timings.e2e_s for s in (run(None), simulation))
    assert told.saved_s == pytest.approx(plain_s - own_s, rel=1e-6)


def test_a_draft_model_computes_each_token_about_once():
    """Of its drafts the right ones keep their KV; it reads a prompt once."""
    shapes = []

    def passed(shape):
        shapes.extend(shape.requests)
        return 0.0

    run(drafts(1.0, 4, draft_time=passed), num_output=1001)
    positions = [p for each in shapes for p in range(each.num_past, each.num_past + each.num_new)]
    assert sorted(set(positions)) == list(range(max(positions) + 1))
    assert len(positions) == len(set(positions))
    shapes.clear()
    run(drafts(0.0, 4, draft_time=passed), num_output=101)
    assert all(a.num_past <= b.num_past + 4 for a, b in pairwise(shapes))
    assert max(each.num_past + each.num_new for each in shapes) <= 16 + 101 + 4


def test_acceptance_by_place():
    simulation = run(drafts((0.9, 0.5, 0.2), 4))
    chains = sum_up(simulation, 1).report.drafts
    parts = [a / p for a, p in zip(chains.accepted, chains.proposed, strict=True)]
    assert parts == pytest.approx([0.9, 0.45, 0.09, 0.018], abs=0.02)


def test_requests_accept_apart_and_the_same_input_gives_the_same_output():
    one, other = (run(drafts(0.7, 3), num_requests=8, num_output=300) for _ in range(2))
    assert one.served == other.served and one.steps == other.steps
    chains = {s.timings.speculation.chains for s in one.served}
    assert len(chains) > 1, "each has its own coins"


def test_uniform_is():
    values = [uniform(seed, position) for seed in range(40) for position in range(250)]
    assert len(set(values)) == len(values) and min(values) >= 0 and max(values) < 1
    for low in (0.0, 0.25, 0.5, 0.75):
        part = sum(low <= v < low + 0.25 for v in values) / len(values)
        assert part == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_the_shipped_policy_does_not_lose_and_wins_where_it_can(alpha):
    spec = SimulatedDrafts(
        method="draft_model", max_drafts=8, acceptance=(alpha,), draft_time=lambda _shape: 0.1
    )
    ratio = per_token(run(None, num_output=2000)) / per_token(run(spec, num_output=2000))
    best = max(
        expected_length(alpha, count) * 1.05 / (1.0 + 0.05 * (1 + count) + 0.1 * count)
        for count in range(9)
    )
    assert ratio >= 0.97
    assert ratio >= 0.9 * best


def test_rows_are_priced_as_they_are():
    def kinked(shape):
        return max(1.0, 0.1 * shape.num_tokens) + 0.01 * shape.num_logit_rows

    shape = BatchShape((RequestShape(1, 5), RequestShape(1, 9), RequestShape(7, 0)))
    prices = SimulatedPrices(kinked)
    times = prices.row_times(shape, 13)
    assert len(times) == 14 and times == sorted(times)
    for count in (0, 1, 2, 4, 8, 13):
        exact = max(1.0, 0.1 * (9 + count)) + 0.01 * (3 + count)
        assert times[count] == pytest.approx(exact)
    assert prices.row_times(shape, 0) == [kinked(shape)]


@pytest.mark.parametrize("fast", [False, True])
def test_with_drafts_nothing_is_fast_forwarded(fast):
    own, other = (run(drafts(0.5, 2), num_output=200, fast=f) for f in (fast, False))
    assert own.served == other.served and own.steps == other.steps
    assert {s.timings.speculation is None for s in own.served} == {False}


def test_the_trace_has_drafts_and_drafting():
    simulation = run(drafts(0.8, 3, draft_time=lambda _shape: 0.25), num_output=50)
    events = [e for e in trace_events(simulation) if e["ph"] == "X" and e["pid"] > 1]
    steps = [e for e in events if e["name"] != "drafting"]
    log = simulation.steps[0]
    assert [e["args"].get("drafts", 0) for e in steps] == list(log.num_drafts)
    told = simulation.served[0].timings.speculation
    assert (sum(log.num_drafts), sum(log.num_accepted)) == told.total
    assert sum(log.drafting_s) == pytest.approx(told.drafting_s)
    drafting = [e for e in events if e["name"] == "drafting"]
    assert sum(e["dur"] for e in drafting) == pytest.approx(1e6 * told.drafting_s)
    plain = run(None, num_output=50)
    assert not [e for e in trace_events(plain) if "drafts" in e.get("args", {})]
    assert not any(plain.steps[0].num_drafts) and len(plain.steps[0].num_drafts) == len(
        plain.steps[0]
    )
