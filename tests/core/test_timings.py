from duetto.core.timings import Part, RequestTimings


def test_parts_tile_the_time_from_arrival() -> None:
    timings = RequestTimings(arrival_time=10.0)
    timings.account(Part.WAITING, 12.0)
    timings.account(Part.PROMPT, 15.0)
    timings.account(Part.DECODE, 15.0)
    timings.account(Part.WAITING, 16.0)
    timings.finish_time = 16.0
    parts = {part: seconds for part, seconds in timings.parts.items() if seconds}
    assert parts == {Part.WAITING: 3.0, Part.PROMPT: 3.0}
    assert sum(timings.parts.values()) == timings.e2e_s == 6.0


def test_two_requests_share_no_parts() -> None:
    first, second = RequestTimings(0.0), RequestTimings(0.0)
    first.account(Part.WAITING, 1.0)
    assert second.parts[Part.WAITING] == 0.0


def test_metrics_follow_from_the_instants() -> None:
    timings = RequestTimings(arrival_time=1.0, token_times=[3.0, 4.0, 7.0], finish_time=8.0)
    assert timings.ttft_s == 2.0
    assert timings.itl_s == [1.0, 3.0]
    assert timings.tpot_s == 2.0
    assert timings.e2e_s == 7.0


def test_what_is_not_known_is_none() -> None:
    none_yet = RequestTimings(arrival_time=1.0)
    assert (none_yet.ttft_s, none_yet.tpot_s, none_yet.e2e_s) == (None, None, None)
    assert none_yet.itl_s == []
    one = RequestTimings(arrival_time=1.0, token_times=[2.0])
    assert (one.ttft_s, one.tpot_s, one.itl_s) == (1.0, None, [])
