"""Limits as they are typed, and what they are limits on."""

from duetto.measure.metrics import SLO
from duetto.planner.objective import Objective


def test_limits_are_told_with_their_unit() -> None:
    assert Objective(SLO(ttft=1.5, itl=0.05)).describe() == "p99 of ttft 1500 ms, itl 50 ms"
