"""Limits as they are typed, and what they are limits on."""

import pytest

from duetto.bench.metrics import SLO
from duetto.core.errors import ConfigError
from duetto.planner.objective import Objective, read_slo


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["ttft=1,itl=0.05"], SLO(ttft=1, itl=0.05)),
        (["ttft=200ms", "itl=0.05s"], SLO(ttft=0.2, itl=0.05)),
        (["e2el:20"], SLO(e2e=20)),
        (["ttft=200s, itl=6s"], SLO(ttft=200, itl=6)),
        (["itl=4.9"], SLO(itl=4.9)),
    ],
)
def test_seconds_unless_a_unit_is_named(texts: list[str], expected: SLO) -> None:
    assert read_slo(texts) == expected


@pytest.mark.parametrize("text", ["itl=50", "ttft=200", "tpot:5", "e2el=2000", "ttft=1, itl = 50"])
def test_plain_milliseconds_are_refused_with_both_readings(text: str) -> None:
    with pytest.raises(ConfigError, match=r"seconds here; write .*=\d+ms .*=\d+s if seconds"):
        read_slo([text])


def test_limits_are_told_with_their_unit() -> None:
    assert Objective(SLO(ttft=1.5, itl=0.05)).describe() == "p99 of ttft 1500 ms, itl 50 ms"
