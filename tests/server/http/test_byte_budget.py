"""Bytes that are held for all, and given back."""

import pytest

from duetto.server.http.byte_budget import ByteBudget
from duetto.server.http.errors import ApiError


def test_large_holdings_are_bounded_and_small_ones_have_twice_the_room():
    budget = ByteBudget(limit=1000, little=100, what="things are held")
    first = budget.hold(900)
    small = budget.hold(100)
    small.add(0)
    growing = budget.hold(50)
    with pytest.raises(ApiError) as refused:
        growing.add(51)
    assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) >= 1
    assert "1050 bytes of things are held" in str(refused.value)
    with pytest.raises(ApiError):
        budget.hold(101)
    assert (budget.num_bytes, growing.num_bytes) == (1050, 50)
    first.release()
    first.release()
    assert budget.num_bytes == 150
    budget.hold(800)
    little = [budget.hold(100) for _ in range(10)]
    with pytest.raises(ApiError):
        budget.hold(100)
    little[0].release()
    budget.hold(100)
