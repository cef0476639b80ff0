"""The drafts that are worth their time: as good as the best of all assignments."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetto.scheduler.worth import (
    DraftingPrice,
    best_to_ask,
    best_to_verify,
    counts_of,
    ranked,
)

chances = st.lists(st.floats(0, 1), max_size=3)
lines_of_requests = st.lists(chances, min_size=1, max_size=3).map(
    lambda many: [survivals(each) for each in many]
)
more_times = st.lists(st.floats(0, 2), min_size=9, max_size=9)


def survivals(each: list[float]) -> list[float]:
    product_of, found = 1.0, []
    for chance in each:
        product_of *= chance
        found.append(product_of)
    return found


def rising(steps: list[float]) -> list[float]:
    total, found = 0.0, [0.0]
    for step in steps:
        total += step
        found.append(total)
    return found


def assignments(lines: list[list[float]]) -> list[tuple[int, ...]]:
    return list(product(*[range(len(line) + 1) for line in lines]))


def gain(lines: list[list[float]], counts: tuple[int, ...]) -> float:
    return sum(sum(line[:n]) for line, n in zip(lines, counts, strict=True))


@given(lines_of_requests, more_times, st.floats(0.1, 3), st.floats(0, 1))
def test_no_other_assignment_verifies_better(
    lines: list[list[float]], steps: list[float], plain_s: float, drafting_s: float
) -> None:
    extra_s, num = rising(steps), len(lines)
    slots = ranked(lines)
    choice = best_to_verify(slots.chances, extra_s, num, plain_s, drafting_s)
    counts = tuple(counts_of(slots.owners[: choice.num_slots], num))
    rates = [
        (num + gain(lines, each)) / (plain_s + extra_s[sum(each)] + drafting_s)
        for each in assignments(lines)
        if any(each)
    ]
    assert choice.rate == pytest.approx(max([*rates, num / plain_s]))
    nets = [gain(lines, each) - choice.rate * extra_s[sum(each)] for each in assignments(lines)]
    net = gain(lines, counts) - choice.rate * extra_s[sum(counts)]
    assert net == pytest.approx(max(nets), abs=1e-9)


@given(lines_of_requests, more_times, st.floats(0.1, 3), st.tuples(*[st.floats(0, 0.5)] * 3))
def test_no_other_assignment_is_asked_for_better(
    lines: list[list[float]],
    steps: list[float],
    plain_s: float,
    prices: tuple[float, float, float],
) -> None:
    extra_s, num = rising(steps), len(lines)
    fixed_s, pass_s, draft_s = prices
    # Where a pass is next to nothing it is not looked at.
    pass_s = pass_s if pass_s > 2e-3 * plain_s else 0.0
    price = DraftingPrice(0.0, pass_s, draft_s, 0.0)
    chosen, rate = best_to_ask(ranked(lines), extra_s, num, plain_s, price, fixed_s)

    def rate_of(counts: tuple[int, ...]) -> float:
        made_s = fixed_s + pass_s * max(counts) + draft_s * sum(counts)
        return (num + gain(lines, counts)) / (plain_s + extra_s[sum(counts)] + made_s)

    best = max([rate_of(each) for each in assignments(lines) if any(each)] + [num / plain_s])
    assert rate == pytest.approx(best)
    if chosen:
        assert rate_of(tuple(counts_of(chosen, num))) == pytest.approx(best)


@given(lines_of_requests)
def test_the_first_of_the_ranking_are_first_drafts_of_each_request(
    lines: list[list[float]],
) -> None:
    slots, seen = ranked(lines), [0] * len(lines)
    assert len(slots.chances) == len(slots.owners) == sum(map(len, lines))
    assert list(slots.chances) == sorted(slots.chances, reverse=True)
    for chance, owner in zip(*slots, strict=True):
        assert lines[owner][seen[owner]] == chance
        seen[owner] += 1


@given(lines_of_requests, st.integers(1, 3))
def test_the_first_drafts_of_a_ranking_are_the_ranking_of_the_first_drafts(
    lines: list[list[float]], limit: int
) -> None:
    expected = ranked([line[:limit] for line in lines])
    within = ranked(lines).within(limit)
    assert list(map(list, within)) == list(map(list, expected))


def test_a_cliff_is_crossed_where_what_follows_pays() -> None:
    chances = [0.9, 0.8, 0.7, 0.6]
    extra_s = [0.0, 1.0, 1.0, 1.0, 1.0]  # the second row doubles the step, three more are free
    assert best_to_verify(chances, extra_s, 1, 1.0, 0.0).num_slots == 4
    assert best_to_verify(chances[:1], extra_s, 1, 1.0, 0.0).num_slots == 0
