"""Reports against numbers worked out by hand, and against a naive twin on random records."""

import math
import random
from dataclasses import replace

import pytest

from duetto.core.draft_counts import Chains
from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO, distribution, parse_percentiles, parse_slo, summarize
from duetto.measure.records import Chunk, RequestOutcome, RequestRecord


def record(
    times: list[float],
    *,
    scheduled: float = 0.0,
    sent: float = 0.0,
    outcome: RequestOutcome = "ok",
    prompt: int = 10,
    cached: int = 0,
    error: str | None = None,
) -> RequestRecord:
    return RequestRecord(
        scheduled_s=scheduled,
        sent_s=sent,
        end_s=times[-1] if times else sent,
        chunks=tuple(Chunk(time, 1) for time in times),
        num_prompt_tokens=prompt,
        num_output_tokens=len(times),
        num_cached_tokens=cached,
        outcome=outcome,
        error=error,
    )


# --- distributions ---------------------------------------------------------------------------


def test_percentiles_interpolate_linearly() -> None:
    values = distribution([4.0, 1.0, 3.0, 2.0], (0, 25, 90, 100))
    # Position of p in n sorted values: p * (n - 1), here 0, 0.75, 1.5, 2.7 and 3.
    assert values.percentiles == pytest.approx({0: 1.0, 25: 1.75, 50: 2.5, 90: 3.7, 100: 4.0})
    assert values.median == 2.5
    assert (values.count, values.mean, values.max) == (4, 2.5, 4.0)
    assert values.std == pytest.approx(math.sqrt(1.25))


def test_nothing_measured_is_none_and_not_zero() -> None:
    values = distribution([])
    assert values.count == 0
    assert (values.mean, values.median, values.percentiles[99.0]) == (None, None, None)


# --- reports by hand -------------------------------------------------------------------------


def test_a_report_by_hand() -> None:
    records = [
        record([1.0, 2.0, 4.0], cached=4),  # TTFT 1, gaps 1 2, TPOT 1.5
        record([3.0, 3.5], sent=1.0, scheduled=0.5),  # TTFT 2, gap 0.5, TPOT 0.5
        record([9.0], outcome="failed", error="HTTP 500"),
        record([], outcome="aborted", error="late"),
    ]
    report = summarize(records, 5.0)
    assert (report.num_ok, report.num_failed, report.num_aborted) == (2, 1, 1)
    assert (report.num_input_tokens, report.num_output_tokens) == (20, 5)
    assert report.num_cached_tokens == 4
    assert report.ttft.mean == 1.5
    assert report.ttft_from_arrival.mean == 1.75
    assert report.itl.count == 3
    assert report.itl.mean == pytest.approx(3.5 / 3)
    assert report.tpot.mean == 1.0  # so ITL and TPOT differ: one weighs tokens, one requests
    assert report.e2e.mean == 3.25
    assert report.errors == {"HTTP 500": 1, "late": 1}
    shown = report.as_json()
    assert shown["request_throughput"] == 0.4
    assert shown["output_throughput"] == 1.0
    assert shown["total_token_throughput"] == 5.0
    assert shown["median_tpot_ms"] == 1000.0
    assert shown["p99_e2el_ms"] == pytest.approx(3985.0)
    assert "goodput" not in shown  # nobody said what is good


def test_the_names_of_vllm() -> None:
    shown = summarize([record([1.0, 2.0])], 2.0, slo=SLO(ttft=1.0)).as_json()
    expected = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens"}
    expected |= {"request_throughput", "output_throughput", "total_token_throughput"}
    expected |= {"request_goodput"}
    for name in ("ttft", "tpot", "itl", "e2el"):
        expected |= {f"{stat}_{name}_ms" for stat in ("mean", "median", "std", "p99")}
    assert expected <= shown.keys()


def test_drafts_have_the_names_of_vllm() -> None:
    drafted = replace(record([1.0, 2.0, 2.0, 3.0]), drafts=Chains(2, (2, 1), (1, 0)))
    other = replace(record([1.0, 2.0]), drafts=Chains(1, (1,), (1,)))
    shown = summarize([drafted, other], 1.0).as_json()
    assert (shown["spec_decode_draft_tokens"], shown["spec_decode_accepted_tokens"]) == (4, 2)
    assert shown["spec_decode_num_drafts"] == 3
    assert shown["spec_decode_acceptance_rate"] == 50.0  # percent, as there
    assert shown["spec_decode_acceptance_length"] == 1 + 2 / 3  # with the bonus token
    assert shown["spec_decode_per_position_acceptance_rates"] == [2 / 3, 0.0]
    assert shown["tokens_per_step"] == 6 / 4
    assert (shown["proposed_per_position"], shown["accepted_per_position"]) == ((3, 1), (2, 0))
    only_totals = replace(record([1.0, 2.0]), drafts=Chains(0, (5,), (1,)))
    shown = summarize([only_totals], 1.0).as_json()
    assert shown["tokens_per_step"] == 2.0 and "spec_decode_acceptance_length" not in shown
    plain = summarize([record([1.0])], 1.0).as_json()
    assert not [name for name in plain if "spec_decode" in name or "per_step" in name]


def test_tokens_that_no_chunk_showed_are_reported() -> None:
    hidden = RequestRecord(
        scheduled_s=0, sent_s=0, end_s=1, chunks=(Chunk(1, 2),), num_output_tokens=5
    )
    assert summarize([hidden], 1.0).num_untimed_tokens == 3


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        summarize([], 1.0)
    with pytest.raises(ValueError, match="duration"):
        summarize([record([1.0])], 0.0)


# --- goodput ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slo", "num_good"),
    [
        (SLO(), 2),  # without limits: whatever came through
        (SLO(ttft=1.0), 1),
        (SLO(ttft=2.0), 2),
        (SLO(itl=1.0), 1),  # the largest gap, not the mean one
        (SLO(tpot=1.0), 2),
        (SLO(tpot=0.9), 1),
        (SLO(e2e=3.0), 1),
        (SLO(ttft=1.0, itl=0.5), 0),  # each is met by one request, both by none
    ],
)
def test_goodput_is_joint(slo: SLO, num_good: int) -> None:
    records = [
        record([1.0, 1.5, 3.0]),  # TTFT 1, largest gap 1.5, TPOT 1
        record([2.0, 2.5, 3.0, 3.25]),  # TTFT 2, largest gap 0.5, TPOT 0.42
        record([0.1, 0.2], outcome="failed"),
        record([0.1, 0.2], outcome="aborted"),
    ]
    report = summarize(records, 2.0, slo=slo)
    assert report.num_good == num_good
    assert report.as_json()["goodput"] == num_good / 2.0
    assert report.as_json()["slo_attainment"] == num_good / 4


def test_a_late_client_does_not_shorten_the_wait() -> None:
    late = record([3.0, 3.1], scheduled=0.0, sent=2.5)
    assert late.ttft_s == 0.5
    assert not SLO(ttft=1.0).is_met(late)
    assert not SLO(e2e=3.0).is_met(late)
    assert SLO(ttft=3.0, e2e=3.2).is_met(late)


def test_one_token_has_no_gap_and_no_token_has_no_first() -> None:
    assert SLO(ttft=1.0, itl=0.001, tpot=0.001).is_met(record([1.0]))
    assert not SLO(ttft=1.0).is_met(record([]))


@pytest.mark.parametrize(
    ("texts", "slo"),
    [
        (["ttft=200ms,itl=50ms"], SLO(ttft=0.2, itl=0.05)),
        (["ttft:200ms", "tpot:.05s", "e2el:2s"], SLO(ttft=0.2, tpot=0.05, e2e=2.0)),
        (["e2e=1.5s, itl = 5 ms"], SLO(e2e=1.5, itl=0.005)),
        (["ttft=1s,itl=50ms", "ttft=2s"], SLO(ttft=2.0, itl=0.05)),  # the flag again
    ],
)
def test_slo_is_read(texts: list[str], slo: SLO) -> None:
    assert parse_slo(texts) == slo


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=", "ttf=3", "ttft=-1", "ttft=0", "ttft=1.2.3", "ttft=1h", "", "a=1,,"]
)
def test_a_bad_slo_names_its_part(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--slo: .* ttft, itl, tpot, e2e"):
        parse_slo([text])


def test_a_limit_is_given_once() -> None:
    with pytest.raises(ConfigError, match="ttft is given twice"):
        parse_slo(["ttft=1s,ttft=2s"])


@pytest.mark.parametrize("text", ["itl=50", "tpot:0.05", "ttft=1s,itl=50", "e2el=3"])
def test_a_number_without_a_unit_is_asked_about(text: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a unit: (\w+)=([0-9.]+)ms or \1=\2s\?"):
        parse_slo([text])


@pytest.mark.parametrize("text", ["101", "-1", "50,nan", "", "a"])
def test_a_bad_percentile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--metric-percentiles"):
        parse_percentiles(text)


# --- the naive twin --------------------------------------------------------------------------


def naive_percentile(sample: list[float], percent: float) -> float:
    ordered = sorted(sample)
    position = percent / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def token_instants(record: RequestRecord) -> list[float]:
    return [chunk.time_s for chunk in record.chunks for _ in range(chunk.num_tokens)]


def random_record(rng: random.Random) -> RequestRecord:
    scheduled = rng.uniform(0, 10)
    sent = scheduled + rng.choice([0.0, rng.uniform(0, 1)])
    time, chunks = sent, []
    for _ in range(rng.randrange(6)):
        time += rng.expovariate(5)
        chunks.append(Chunk(time, rng.choice([1, 1, 1, 4])))
    return RequestRecord(
        scheduled_s=scheduled,
        sent_s=sent,
        end_s=time,
        chunks=tuple(chunks),
        num_prompt_tokens=rng.randrange(1, 50),
        num_output_tokens=sum(c.num_tokens for c in chunks),
        outcome=rng.choice(["ok", "ok", "ok", "failed", "aborted"]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_report_equals_its_naive_twin(seed: int) -> None:
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(40)]
    report = summarize(records, 12.0, slo=SLO(ttft=0.6, itl=0.4), percentiles=(90.0, 99.0))

    ttfts, tpots, gaps, num_good = [], [], [], 0
    for one in (r for r in records if r.outcome == "ok"):
        instants = token_instants(one)
        own_gaps = [instants[i + 1] - instants[i] for i in range(len(instants) - 1)]
        gaps += own_gaps
        if instants:
            ttfts.append(instants[0] - one.sent_s)
            in_time = instants[0] - one.scheduled_s <= 0.6
            num_good += in_time and all(gap <= 0.4 for gap in own_gaps)
        if len(instants) > 1:
            tpots.append(sum(own_gaps) / len(own_gaps))

    for values, sample in ((report.ttft, ttfts), (report.tpot, tpots), (report.itl, gaps)):
        assert values.count == len(sample)
        assert values.mean == pytest.approx(sum(sample) / len(sample))
        for percent in (50.0, 90.0, 99.0):
            assert values.percentiles[percent] == pytest.approx(naive_percentile(sample, percent))
    assert report.num_good == num_good
    assert report.num_untimed_tokens == 0
