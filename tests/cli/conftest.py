"""What all tests of the command line share."""

import pytest

from duetto.planner import rate


@pytest.fixture(autouse=True)
def short_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/planner looks at rates, with loads as long as they are shipped: a few seconds each."""
    monkeypatch.setattr(rate, "LEAST_REQUESTS", 100)
    monkeypatch.setattr(rate, "MOST_REQUESTS", 400)
