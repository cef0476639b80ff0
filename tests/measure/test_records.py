"""The metrics of one request against instants worked out by hand."""

import pytest

from duetto.core.timings import RequestTimings
from duetto.measure.records import Chunk, RequestRecord, record_from_timings


def record(times: list[tuple[float, int]], **fields: object) -> RequestRecord:
    chunks = tuple(Chunk(time_s, num_tokens) for time_s, num_tokens in times)
    return RequestRecord(
        **{  # type: ignore[arg-type]
            "scheduled_s": 10.0,
            "sent_s": 11.0,
            "end_s": times[-1][0] if times else 12.0,
            "chunks": chunks,
            "num_output_tokens": sum(c.num_tokens for c in chunks),
            **fields,
        }
    )


def test_one_token_per_chunk() -> None:
    made = record([(13.0, 1), (13.5, 1), (15.0, 1)])
    assert made.ttft_s == 2.0
    assert made.itl_s == [0.5, 1.5]
    assert made.tpot_s == 1.0
    assert made.e2e_s == 4.0
    assert made.held_s == 1.0


def test_tokens_of_one_chunk_are_no_time_apart() -> None:
    made = record([(13.0, 2), (16.0, 3)])
    assert made.itl_s == [0.0, 3.0, 0.0, 0.0]
    assert made.tpot_s == 0.75
    assert sum(made.itl_s) / len(made.itl_s) == made.tpot_s


def test_gaps_and_tpot_tell_one_story_for_one_request() -> None:
    made = record([(11.25, 1), (11.5, 4), (12.0, 1), (14.0, 2)])
    assert len(made.itl_s) == made.num_output_tokens - 1
    assert sum(made.itl_s) == made.e2e_s - (made.ttft_s or 0)
    assert made.tpot_s == sum(made.itl_s) / len(made.itl_s)


def test_one_token_has_no_rate_and_none_has_no_first() -> None:
    one = record([(13.0, 1)])
    assert (one.ttft_s, one.tpot_s, one.itl_s, one.e2e_s) == (2.0, None, [], 2.0)
    none = record([])
    assert (none.ttft_s, none.tpot_s, none.itl_s, none.e2e_s) == (None, None, [], 1.0)


def test_tokens_that_no_chunk_showed_count_in_tpot() -> None:
    made = record([(12.0, 1), (14.0, 1)], num_output_tokens=5)
    assert made.tpot_s == 0.5
    assert made.itl_s == [2.0]


def test_engine_timings_give_the_same_numbers_as_the_record() -> None:
    timings = RequestTimings(arrival_time=1.0)
    timings.token_times = [2.0, 2.25, 4.0]
    timings.finish_time = 4.0
    made = record_from_timings(
        timings, num_prompt_tokens=7, num_cached_tokens=3, finish_reason="length"
    )
    assert made.ttft_s == timings.ttft_s
    assert made.itl_s == timings.itl_s
    assert made.tpot_s == timings.tpot_s
    assert made.e2e_s == timings.e2e_s
    assert (made.num_prompt_tokens, made.num_cached_tokens, made.outcome) == (7, 3, "ok")


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [("stop", "ok"), ("length", "ok"), ("error", "failed"), ("abort", "aborted")],
)
def test_the_finish_reason_decides_the_outcome(reason: str, outcome: str) -> None:
    timings = RequestTimings(arrival_time=1.0, finish_time=2.0)
    made = record_from_timings(
        timings, num_prompt_tokens=1, num_cached_tokens=0, finish_reason=reason
    )
    assert made.outcome == outcome


def test_an_unfinished_request_has_no_record() -> None:
    with pytest.raises(ValueError, match="not ended"):
        record_from_timings(
            RequestTimings(1.0), num_prompt_tokens=1, num_cached_tokens=0, finish_reason=None
        )
