"""Chrome's trace events, as their format says."""

from itertools import pairwise

from duetto.core.trace_events import counter, process_name, span, track_name


def test_a_span_ends_where_the_next_begins() -> None:
    times = [0.1, 0.1234567891, 1 / 3, 12345.678901234]
    spans = [span(1, 2, "it", a, b, tokens=3) for a, b in pairwise(times)]
    for before, after in pairwise(spans):
        assert round(before["ts"] + before["dur"], 3) == after["ts"]
    assert spans[0] == {
        "name": "it",
        "ph": "X",
        "pid": 1,
        "tid": 2,
        "ts": 100000.0,
        "dur": 23456.789,
        "args": {"tokens": 3},
    }


def test_names_and_counters() -> None:
    assert counter(2, "KV", 0.5, {"used": 3})["ph"] == "C"
    assert counter(2, "KV", 0.5, {"used": 3})["ts"] == 500000.0
    assert process_name(2, "engine")["name"] == "process_name"
    assert track_name(2, 3, "steps") == {
        "name": "thread_name",
        "ph": "M",
        "pid": 2,
        "tid": 3,
        "args": {"name": "steps"},
    }
