"""The planner that watches: when it changes what, in virtual time, and that it does not flap."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, sin

import pytest

from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO
from duetto.models.find import find_program
from duetto.planner.buckets import Buckets
from duetto.planner.decision import Decision
from duetto.planner.fleet import make_fleet
from duetto.planner.forecast import FleetForecaster, Forecast, RoleCounts, slower
from duetto.planner.layout import Layout
from duetto.planner.observed import Window
from duetto.planner.resampled import MeasuredLoad
from duetto.planner.watch import Watcher
from duetto.planner.watch_options import WatchOptions
from duetto.pricing.gpus import HARDWARE
from duetto.simulation.simulation import simulate

STEP_S = 30.0
ONE = RoleCounts(1)
OPTIONS = WatchOptions()
LIMITS = SLO(ttft=1.0, tpot=0.05)
BOUNDS = (*(0.001 * 1.5**i for i in range(25)), inf)
LENGTHS = (*(float(2**i) for i in range(16)), inf)


def buckets(values: Sequence[float], bounds: Sequence[float] = BOUNDS) -> Buckets:
    counts = [0.0] * len(bounds)
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    return Buckets(tuple(bounds), tuple(counts), sum(values))


@dataclass
class Capacity:
    """A cluster that is easy to reckon with: a replica serves 10 requests/s of 1,000 prompt tokens,
    a prefill worker takes off the prompts, and beyond capacity what is too much is too late."""

    per_replica: float = 10.0
    slowdown: float = 1.0  # of the cluster itself
    asked: list[RoleCounts] = field(default_factory=list)

    def forecast(self, counts: RoleCounts, load: MeasuredLoad, slowdown: float) -> Forecast:
        self.asked.append(counts)
        work = load.rate * slowdown * self.slowdown
        prompt, answer = (load.prompts.mean or 1000) / 1000, (load.answers.mean or 100) / 100
        able = self.per_replica * counts.replicas / (0.5 * prompt + 0.5 * answer)
        able *= 0.7 if prompt > 4 else 1.0  # long prompts hold up the streams beside them
        if counts.prefill:
            able = min(
                self.per_replica * counts.prefill / (0.5 * prompt),
                self.per_replica * counts.replicas / (0.5 * answer),
            )
        late = max(0.0, work / able - 1)
        within = max(0.0, 1 - 5 * late)
        return Forecast(counts, within, 0.1 + late, 0.5 + late, 0.02 * slowdown * self.slowdown)


def window(
    end_s: float, rate: float, cluster: Capacity, counts: RoleCounts, prompt: float = 1000.0
) -> Window:
    """What the cluster shows under a rate."""
    num = round(rate * STEP_S)
    load = MeasuredLoad(rate, buckets([prompt] * num, LENGTHS), buckets([100.0] * num, LENGTHS))
    got = Capacity(cluster.per_replica, cluster.slowdown).forecast(counts, load, 1.0)
    good = round(num * got.within)
    return Window(
        end_s=end_s,
        duration_s=STEP_S,
        num_finished=num,
        rate=rate,
        ttft=buckets([0.2] * good + [5.0] * (num - good)),
        tpot=buckets([got.tpot_mean_s or 0.0] * num),
        prompts=load.prompts,
        answers=load.answers,
        num_running=rate,
    )


def run(
    rates: Sequence[float],
    *,
    options: WatchOptions = OPTIONS,
    cluster: Capacity | None = None,
    start: RoleCounts = ONE,
    prompt: Callable[[int], float] = lambda _step: 1000.0,
) -> tuple[list[Decision], Watcher]:
    """A loop that does what is decided, at once."""
    cluster, counts = cluster or Capacity(), start
    watcher = Watcher(options, LIMITS, Capacity())
    decisions = []
    for step, rate in enumerate(rates):
        seen = window((step + 1) * STEP_S, rate, cluster, counts, prompt(step))
        decisions.append(watcher.decide(seen, counts))
        counts = decisions[-1].target
    return decisions, watcher


def changes(decisions: Sequence[Decision]) -> list[Decision]:
    return [decision for decision in decisions if decision.action == "change"]


def test_a_steady_load_changes_nothing() -> None:
    decisions, _ = run([15.0] * 40, start=RoleCounts(2))
    assert not changes(decisions)


def test_more_load_adds_workers_at_once_and_no_more_than_a_step() -> None:
    decisions, _ = run([5.0] * 4 + [60.0] * 10)
    grown = changes(decisions)
    assert decisions[4] is grown[0]  # the first window of it
    assert all(abs(d.target.total - d.current.total) <= OPTIONS.max_step for d in grown)
    assert decisions[-1].target.total >= 6 and decisions[-1].forecasts[0].within >= OPTIONS.target


def test_less_load_takes_workers_away_slowly_one_by_one() -> None:
    decisions, _ = run([35.0] * 3 + [5.0] * 60, start=RoleCounts(5))
    taken = changes(decisions)
    assert [d.target.total for d in taken] == [4, 3, 2, 1]
    assert taken[0].time_s >= (3 + OPTIONS.agree_fewer) * STEP_S
    gaps = [b.time_s - a.time_s for a, b in pairwise(taken)]
    assert min(gaps) >= OPTIONS.dwell_fewer


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 12])
def test_a_load_that_swings_does_not_make_it_flap(period: int) -> None:
    """Two hours. Swings within a dwell are served for their peaks; slower ones are followed less
    and less often."""
    rates = [30.0 if (step // period) % 2 else 8.0 for step in range(240)]
    decisions, _ = run(rates)
    assert len(changes(decisions)) <= 16
    late = decisions[120:]
    assert len(changes(late)) <= 8


def test_a_smooth_swing_is_followed_and_kept_within_the_target() -> None:
    rates = [20 + 12 * sin(step / 40) for step in range(500)]
    decisions, _ = run(rates)
    assert len(changes(decisions)) <= 24
    kept = [d.forecasts[0].within >= OPTIONS.target for d in decisions[5:] if d.forecasts]
    assert sum(kept) >= 0.95 * len(kept)


def test_never_below_the_minimum_and_never_above_the_maximum() -> None:
    options = replace(OPTIONS, min_replicas=2, max_workers=4)
    decisions, _ = run([0.5] * 60 + [500.0] * 20, options=options, start=RoleCounts(3))
    totals = [d.target for d in decisions]
    assert min(t.replicas for t in totals) == 2 and max(t.total for t in totals) == 4
    assert "nothing within reach" in decisions[-1].why


def test_workers_that_do_not_answer_are_no_reason_to_have_fewer() -> None:
    watcher, cluster = Watcher(OPTIONS, LIMITS, Capacity()), Capacity()
    for step in range(30):
        seen = window((step + 1) * STEP_S, 5.0, cluster, RoleCounts(3))
        decision = watcher.decide(seen, RoleCounts(3), live=2)
        assert decision.action == "stay"
    assert "only 2 of 3 workers answer" in decision.why


def test_long_prompts_change_roles() -> None:
    """From chat to long prompts, at a rate that three workers serve, but with other roles."""
    decisions, _ = run(
        [20.0] * 5 + [2.65] * 6,
        start=RoleCounts(3),
        options=replace(OPTIONS, max_workers=3),
        prompt=lambda step: 1000.0 if step < 5 else 13_000.0,
    )
    assert not changes(decisions[:5])
    assert decisions[-1].target == RoleCounts(1, 2)
    assert len(changes(decisions)) == 1


@pytest.mark.parametrize("slowdown", [0.7, 1.3])
def test_a_model_that_is_wrong_by_a_third_is_corrected(slowdown: float) -> None:
    cluster = Capacity(slowdown=slowdown)
    decisions, watcher = run([25.0] * 40, cluster=cluster, start=RoleCounts(3))
    assert watcher.slowdown == pytest.approx(slowdown, rel=0.02)
    needed = 4 if slowdown > 1 else 3  # 25 * 1.15 * 1.3 and * 0.7, by 10
    assert decisions[-1].target.total == needed
    assert len(changes(decisions)) <= 2
    assert "times their price" in decisions[3].learned


def test_what_is_missed_counts_though_the_model_says_all_is_well() -> None:
    """Requests wait where the model knows of no reason: TPOT is as expected, TTFT is not."""
    watcher, counts, grown = Watcher(OPTIONS, LIMITS, Capacity()), RoleCounts(2), []
    for step in range(4):
        seen = window((step + 1) * STEP_S, 10.0, Capacity(), counts)
        late = buckets([4.0] * round(seen.num_finished))
        decision = watcher.decide(replace(seen, ttft=late), counts)
        counts = decision.target
        grown += [decision] if decision.action == "change" else []
    assert grown[0].target.total == 3 and "whatever the model says" in grown[0].why
    assert grown[0].time_s == 2 * STEP_S


def test_what_waits_must_be_served_too() -> None:
    watcher = Watcher(OPTIONS, LIMITS, Capacity())
    seen = replace(window(STEP_S, 8.0, Capacity(), RoleCounts(1)), num_waiting=500.0)
    assert watcher.decide(seen, RoleCounts(1)).target.total == 3


def test_nobody_asks_and_nothing_is_known() -> None:
    watcher = Watcher(OPTIONS, LIMITS, Capacity())
    decision = watcher.decide(window(STEP_S, 0.0, Capacity(), RoleCounts(2)), RoleCounts(2))
    assert decision.action == "stay" and "nothing is known" in decision.why


def test_nobody_asks_any_more() -> None:
    decisions, _ = run([15.0] * 3 + [0.0] * 30, start=RoleCounts(2))
    assert decisions[-1].target == RoleCounts(1)


def test_the_same_windows_give_the_same_decisions() -> None:
    rates = [5.0, 30.0, 12.0, 50.0, 3.0] * 10
    assert [d.as_json() for d in run(rates)[0]] == [d.as_json() for d in run(rates)[0]]


def test_a_decision_says_what_was_seen_what_would_be_and_why() -> None:
    decisions, _ = run([5.0] * 3 + [25.0])
    words = "\n".join(decisions[-1].words)
    for part in ("25.00 requests/s", "prompts 1000", "within 1000 ms", "1 replica:", "wanted"):
        assert part in words, words
    assert decisions[-1].words[-1].startswith("change to 3 replicas: ")
    told = decisions[-1].as_json()
    assert told["target"] == {"replicas": 3, "prefill_replicas": 0}


def test_not_yet_says_what_it_waits_for() -> None:
    decisions, _ = run([15.0] * 3 + [4.0] * 3, start=RoleCounts(2))
    assert "1 of 3 windows in a row say so" in decisions[-1].why


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 1.5},
        {"margin": -0.1},
        {"headroom": 0.0},
        {"min_replicas": 9},
        {"max_step": 0},
        {"dwell_more": -1.0},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        replace(OPTIONS, **wrong)  # type: ignore[arg-type]


# --- with the simulator as the model, and as the cluster -----------------------------------------

PROGRAM = find_program("llama-3.2-1b", 4096)
A100 = replace(HARDWARE["a100-80g"].ideal(), num_devices=8)
MODEL = FleetForecaster(
    program=PROGRAM,
    hardware=A100,
    base=Layout(max_num_seqs=16),
    limits=SLO(ttft=0.05, tpot=0.01),
    horizon_s=0.5,
)


def simulated_window(end_s: float, rate: float, counts: RoleCounts, slowdown: float) -> Window:
    """What a simulated cluster shows whose steps last longer than their price."""
    load = MeasuredLoad(rate, buckets([900.0] * 9 + [2000.0], LENGTHS), buckets([12.0], LENGTHS))
    layout = replace(MODEL.base, replicas=counts.replicas, prefill_replicas=counts.prefill)
    fleet = slower(make_fleet(PROGRAM, A100, layout), slowdown)
    served = simulate(load.traffic(round(rate), block=32, longest=4096), fleet).served
    timings = [s.timings for s in served]
    return Window(
        end_s=end_s,
        duration_s=2.0,
        num_finished=len(served),
        rate=rate,
        ttft=buckets([t.token_times[0] - t.arrival_time for t in timings]),
        tpot=buckets([t.tpot_s for t in timings if t.tpot_s is not None]),
        prompts=buckets([float(s.num_prompt_tokens) for s in served], LENGTHS),
        answers=buckets([float(len(t.token_times)) for t in timings], LENGTHS),
        num_running=1.0,
    )


def test_a_simulated_cluster_that_is_slower_than_its_prices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("duetto.planner.forecast.FEWEST", 30)
    options = replace(OPTIONS, dwell_more=1.0, dwell_fewer=8.0, disaggregate=False)
    watcher, counts, within = Watcher(options, MODEL.limits, MODEL), RoleCounts(1), []
    for step in range(4):
        seen = simulated_window(2.0 * (step + 1), 70.0, counts, 1.3)
        within.append(seen.within(MODEL.limits) or 0.0)
        counts = watcher.decide(seen, counts).target
    assert watcher.slowdown == pytest.approx(1.3, rel=0.12)
    assert min(within[-2:]) >= options.target > within[0]


def test_slower_by_one_is_the_same_and_by_two_takes_twice_as_long() -> None:
    load = MeasuredLoad(0.5, buckets([900.0], LENGTHS), buckets([24.0], LENGTHS))
    one, two = (MODEL.forecast(RoleCounts(1, 1), load, factor) for factor in (1.0, 2.0))
    assert two.ttft_p50_s == pytest.approx(2 * one.ttft_p50_s)
    staged = FleetForecaster(
        program=PROGRAM, hardware=A100, base=Layout(pp=2), limits=SLO(ttft=1.0)
    )
    one, two = (staged.forecast(RoleCounts(1), load, factor) for factor in (1.0, 2.0))
    assert two.ttft_p50_s == pytest.approx(2 * one.ttft_p50_s, rel=0.02)  # sending is not slower


def test_a_layout_that_cannot_be_is_within_nothing() -> None:
    load = MeasuredLoad(1.0, buckets([900.0], LENGTHS), buckets([24.0], LENGTHS))
    forecast = MODEL.forecast(RoleCounts(9), load, 1.0)
    assert forecast.within == 0.0 and "devices" in str(forecast)


def test_what_was_cached_is_shared_again() -> None:
    load = MeasuredLoad(5.0, buckets([1000.0], LENGTHS), buckets([10.0], LENGTHS), hit_rate=0.5)
    traffic = load.traffic(100, block=32, longest=4096)
    assert all(len(a.hash_ids) == int(0.5 * a.num_prompt_tokens) // 32 for a in traffic.arrivals)
    assert len({a.hash_ids[0] for a in traffic.arrivals}) == 8
    warm = MODEL.forecast(RoleCounts(1), load, 1.0)
    assert (
        warm.ttft_p50_s < MODEL.forecast(RoleCounts(1), replace(load, hit_rate=0.0), 1.0).ttft_p50_s
    )
