"""What a cluster's /metrics say between two looks: differences, restarts, and wrong text."""

from math import inf

import pytest
from server.fakes_server import CONFIG, MODEL

from duetto.measure.metrics import SLO
from duetto.planner.buckets import Buckets, from_cumulative
from duetto.planner.observed import MetricsError, Snapshot, read_snapshot, window_between
from duetto.server.observe.metrics import Metrics
from duetto.server.settings import ServerSettings

RUNNING = "vllm:num_requests_running 0"


def test_differences_of_histograms() -> None:
    before = from_cumulative([(1.0, 2), (2.0, 3), (inf, 3)], 3.5)
    after = from_cumulative([(inf, 9), (1.0, 4), (2.0, 8)], 20.5)
    added = after.since(before)
    assert (added.counts, added.total, added.count) == ((2.0, 3.0, 1.0), 17.0, 6.0)
    assert before.since(after) == before  # it began again: all of it is new
    assert added.mean == pytest.approx(17 / 6)


def test_quantiles_and_shares() -> None:
    values = from_cumulative([(1.0, 4), (3.0, 8), (inf, 10)], 30.0)
    assert values.quantile(0.4) == 1.0 and values.quantile(0.6) == 2.0
    assert values.quantile(0.95) == 3.0  # nothing more is known
    assert values.share_within(2.0) == 0.6 and values.share_within(100.0) == 0.8
    assert Buckets().quantile(0.5) is None and Buckets().share_within(1.0) is None


def test_samples_have_the_mean_that_was_measured() -> None:
    values = from_cumulative([(100.0, 5), (1000.0, 10), (inf, 10)], 2_000.0)
    drawn = values.spread(50)
    assert sum(drawn) / 50 == pytest.approx(200.0) and drawn == sorted(drawn)


def test_servers_with_other_buckets_together() -> None:
    one = from_cumulative([(1.0, 1), (2.0, 2), (4.0, 4), (inf, 4)], 8.0)
    other = from_cumulative([(2.0, 3), (4.0, 5), (inf, 6)], 20.0)
    both = one.plus(other)
    assert (both.bounds, both.counts) == ((2.0, 4.0, inf), (5.0, 4.0, 1.0))
    assert both.count == 10 and both.total == 28.0
    assert Buckets().plus(one) == one == one.plus(Buckets())


@pytest.mark.parametrize(
    "pairs", [[], [(1.0, 3.0)], [(1.0, 3.0), (inf, 2.0)], [(inf, 1.0), (inf, 1.0)]], ids=str
)
def test_what_is_no_histogram(pairs: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=r"must not fall|needs bounds"):
        from_cumulative(pairs, 0.0)


def snapshot(
    finished: float, running: float = 0.0, waiting: float = 0.0, role: str = "both"
) -> Snapshot:
    values = from_cumulative([(0.5, finished), (1.0, finished), (inf, finished)], 0.4 * finished)
    return Snapshot(
        dict.fromkeys(("ttft", "tpot", "prompts", "answers"), values),
        {
            "finished": finished,
            "queried": 100 * finished,
            "hit": 25 * finished,
            "running": running,
            "waiting": waiting,
            "kv_usage": 0.5,
        },
        role,
    )


def test_a_window_of_two_servers() -> None:
    window = window_between(
        [snapshot(10, running=4), snapshot(5, role="prefill")],
        [snapshot(30, running=2, waiting=6), snapshot(15, role="prefill")],
        end_s=100.0,
        duration_s=10.0,
    )
    assert window.num_finished == 30 and window.rate == pytest.approx(3.4)  # 4 more are under way
    assert window.hit_rate == 0.25 and window.num_waiting == 6
    assert window.utilisation == {"both": 0.5, "prefill": 0.5}
    assert window.ttft.count == 30 and window.within(SLO(ttft=0.5, tpot=0.5)) == 1.0
    assert window.within(SLO(ttft=0.25)) == 0.5


def test_servers_that_come_go_and_begin_again() -> None:
    window = window_between(
        [snapshot(50), None, snapshot(7)],
        [snapshot(3), snapshot(9, running=2), None],
        end_s=10.0,
        duration_s=10.0,
    )
    assert window.num_finished == 12
    assert window.rate == 1.2  # what ran when it was first seen did not arrive just now
    with pytest.raises(MetricsError, match="no server answered"):
        window_between([snapshot(1)], [None], end_s=1.0, duration_s=1.0)


def test_a_request_under_way_lost_in_a_restart_is_no_negative_rate() -> None:
    window = window_between([snapshot(50, running=40)], [snapshot(3)], end_s=10.0, duration_s=10.0)
    assert window.rate == 0.0


def test_what_our_server_exports() -> None:
    metrics = Metrics(ServerSettings(served_model_name=MODEL), CONFIG)
    read = read_snapshot(metrics.exposition().decode(), "decode")
    assert read.role == "decode" and read.numbers["running"] == 0
    assert read.histograms["ttft"].count == 0 and read.histograms["prompts"].bounds[-1] == inf


def test_engines_of_one_server_are_summed() -> None:
    text = "\n".join(
        f'vllm:num_requests_running{{engine="{i}"}} {i + 1}\n'
        f'vllm:kv_cache_usage_perc{{engine="{i}"}} {0.2 * (i + 1)}\n'
        f'vllm:time_to_first_token_seconds_bucket{{engine="{i}",le="0.5"}} 2\n'
        f'vllm:time_to_first_token_seconds_bucket{{engine="{i}",le="+Inf"}} 3 1700000000000'
        for i in range(2)
    )
    read = read_snapshot(text)
    assert read.numbers["running"] == 3 and read.numbers["kv_usage"] == pytest.approx(0.3)
    assert read.histograms["ttft"].counts == (4.0, 2.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "num_requests_running is missing"),
        ("<html>", "no line of the text format"),
        ("vllm:num_requests_running many", "'many' is no number"),
        (f'{RUNNING}\nvllm:request_prompt_tokens_bucket{{x="1"}} 3', "without le"),
        (f'{RUNNING}\nvllm:request_prompt_tokens_bucket{{le="1"}} 3', "last of them"),
        (f'{RUNNING}\nvllm:request_prompt_tokens_bucket{{le="x"}} 3', "no number"),
        (f'{RUNNING}\nvllm:request_prompt_tokens_bucket{{le="+Inf"}} NaN', "without a number"),
        (RUNNING + "\n" * 2**23, "more than"),
    ],
)
def test_text_that_is_wrong(text: str, why: str) -> None:
    with pytest.raises(MetricsError, match=why):
        read_snapshot(text)
