"""A machine that did other work while it was measured is told from a quiet one."""

from pathlib import Path
from typing import Any

import pytest

from duetto.pricing.busy import busy_notes, cpu_times

QUIET: dict[str, Any] = {
    "repeats": {"float32 peak": [100.0, 97.0, 99.0], "read bandwidth": [20.0, 19.0]},
    "num_cpus": 4,
    "load": 0.4,
    "before": (10.0, 1000.0),
    "after": (10.5, 2000.0),
}


def notes(**changes: Any) -> tuple[str, ...]:
    values = QUIET | changes
    return busy_notes(values.pop("repeats"), **values)


def test_a_quiet_machine_has_nothing_to_say() -> None:
    assert notes() == ()
    assert notes(load=None, before=None, after=None) == ()  # a system that does not tell
    assert notes(after=QUIET["before"]) == ()  # no time passed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": 3.0}, "3.0 processes ran on 4 CPUs"),
        ({"repeats": {"int8 peak": [80.0, 100.0]}}, "int8 peak was 20% lower at one time"),
        ({"after": (110.0, 2000.0)}, "other virtual machines took 10% of the CPUs' time"),
    ],
)
def test_each_sign_of_other_work_is_told(changes: dict[str, Any], words: str) -> None:
    (note,) = notes(**changes)
    assert words in note


def test_counters_of_the_system_are_read_where_there_are_any(tmp_path: Path) -> None:
    file = tmp_path / "stat"
    assert cpu_times(file) is None
    file.write_text("cpu  10 0 5 80 1 0 0 4 0 0\ncpu0 1 2\n")
    assert cpu_times(file) == (4.0, 100.0)
    file.write_text("cpu 1 2\n")
    assert cpu_times(file) is None
