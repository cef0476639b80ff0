"""The numbers of a simulation are those that bench makes of records."""

from dataclasses import replace

import pytest
from simulation.loads import fleet, mixed_load, replica

from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO, summarize
from duetto.measure.records import RequestRecord, record_from_timings
from duetto.simulation.disaggregation import Disaggregation, KVLink
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Served, simulate
from duetto.simulation.workload import Arrival, Traffic

LIMITS = SLO(ttft=0.03, itl=0.01, tpot=0.006, e2e=1.0)


def record(served: Served) -> RequestRecord:
    return record_from_timings(
        served.timings,
        num_prompt_tokens=served.num_prompt_tokens,
        num_cached_tokens=served.num_cached_tokens,
        finish_reason="length",
    )


@pytest.mark.parametrize("slo", [None, LIMITS, SLO(itl=0.0065)])
def test_columns_and_records_agree(slo: SLO | None) -> None:
    run = simulate(mixed_load(2), fleet())
    records = [record(s) for s in run.served]
    expected = summarize(records, run.duration_s, slo=slo).as_json()
    found = sum_up(run, 1, slo=slo).report.as_json()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_goodput_counts_something_and_not_all() -> None:
    report = sum_up(simulate(mixed_load(2), fleet()), 1, slo=LIMITS).report
    assert report.num_good is not None
    assert 0 < report.num_good < report.num_ok


def test_the_cost_of_a_million_tokens() -> None:
    run = simulate(mixed_load(2), fleet(2))
    outcome = sum_up(run, 2, price_per_hour=3.6)
    num_tokens = sum(len(s.timings.token_times) for s in run.served)
    assert outcome.cost_per_million == pytest.approx(
        2 * 3.6 / 3600 * run.duration_s / num_tokens * 1e6
    )
    assert sum_up(run, 2).cost_per_million is None


def test_use_by_hand() -> None:
    """One request of 8 + 4 tokens in blocks of 8: one block of 16, then two."""
    run = simulate(Traffic((Arrival(0.0, 8, 4),)), fleet(num_blocks=16, max_model_len=64))
    use = sum_up(run, 1).pools["serve"]
    spent = [b - a for a, b in zip(run.steps[0].start_time, run.steps[0].end_time, strict=True)]
    assert use.busy == pytest.approx(1)
    assert use.mean_tokens == pytest.approx((8 + 3) / 4)
    # The last token ends the request, whose blocks are free when its step is over.
    owned = [1 / 16, 2 / 16, 2 / 16, 0]
    weighted = sum(a * b for a, b in zip(owned, spent, strict=True))
    assert use.kv_mean == pytest.approx(weighted / sum(spent))
    assert use.kv_max == pytest.approx(2 / 16)


def test_idle_time_is_no_use() -> None:
    load = Traffic((Arrival(0.0, 8, 1), Arrival(10.0, 8, 1)))
    assert sum_up(simulate(load, fleet()), 1).pools["serve"].busy < 0.01


def test_parts_add_up_to_the_mean_latency() -> None:
    outcome = sum_up(simulate(mixed_load(2), fleet(num_blocks=64)), 1)
    assert sum(outcome.parts_s.values()) == pytest.approx(outcome.report.e2e.mean)
    assert outcome.pools["serve"].num_preemptions > 0


def test_refused_requests_are_failures() -> None:
    load = Traffic((Arrival(0.0, 500, 100), Arrival(0.0, 10, 2)))
    report = sum_up(simulate(load, fleet()), 1, slo=LIMITS).report
    assert (report.num_ok, report.num_failed, report.num_good) == (1, 1, 1)
    assert report.as_json()["slo_attainment"] == 0.5
    with pytest.raises(ConfigError, match=r"no request can .* context length is 512"):
        sum_up(simulate(load.first(1), fleet()), 1)


def test_both_pools_of_a_disaggregated_fleet() -> None:
    link = KVLink(num_layers=2, bytes_per_token=100, bytes_per_s=1e6)
    apart = Disaggregation(prefill=replica(num_blocks=512), num_replicas=1, link=link)
    outcome = sum_up(simulate(mixed_load(2), replace(fleet(2), disaggregation=apart)), 3)
    assert {name: use.num_replicas for name, use in outcome.pools.items()} == {
        "prefill": 1,
        "decode": 2,
    }
    assert len(outcome.transfer) > 0
    assert outcome.as_json()["mean_kv_transfer_ms"] == pytest.approx(1000 * outcome.transfer.mean())
