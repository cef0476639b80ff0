"""Texts' KV brought to their places: what is computed, what is refused, and the same answers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from fakes import generate_alone, make_request
from scheduler.reuse_world import (
    CHOICES,
    TEXTS,
    World,
    chooses_what_stands_before,
    choosing,
    config,
    fail,
    is_passed_over_no_more_than_some_times,
    meddle_at_any_stage,
    preempt,
    reusing,
    swarm,
)
from shadow import shadow_kvs, shadow_prompt_kvs

from duetto.core.batch import (
    Look,
    RequestResult,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.errors import InvalidRequest, RefusedOutput
from duetto.core.request import Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.core.shape import BatchShape, StepTime
from duetto.scheduler.accept import check_whole
from duetto.scheduler.budget import StepBudget
from duetto.scheduler.choice import begin, take_look
from duetto.scheduler.plan import plan, shape_of
from duetto.scheduler.reuse import num_wanted


def test_what_is_reused_is_not_what_a_full_prefill_gives() -> None:
    """Or the tests here would show nothing."""
    request = reusing("a", [TEXTS[1], TEXTS[2]])
    assert shadow_prompt_kvs(request)[-1] != shadow_kvs(request.prompt_token_ids)[-1]


def test_a_text_at_the_beginning_is_a_prefix() -> None:
    world = World(config())
    request = reusing("a", [TEXTS[3]], before=())
    assert not request.reused
    world.seen = [request]
    world.run(request)
    assert world.tokens["a"] == generate_alone(make_request("a", request.prompt_token_ids))


def test_the_first_tokens_of_each_text_are_computed() -> None:
    request = reusing("a", [TEXTS[1], TEXTS[2]], num_first=3)
    assert request.reused == ((5, 10), (13, 21))
    world = World(config())
    world.seen = [request]
    world.run(request)


def test_texts_shorter_than_what_is_computed_of_them_are_computed() -> None:
    request = reusing("a", [TEXTS[4], TEXTS[0]], num_first=4)
    assert request.reused == ((9, 10),)


def test_the_last_token_is_always_computed() -> None:
    request = reusing("a", [TEXTS[1]], after=())
    assert request.reused == ((2, 9),)
    world = World(config())
    world.seen = [request]
    world.run(request)


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (Reuse((TokenRange(2, 2),)), "hold a token each"),
        (Reuse((TokenRange(2, 9),)), "within the prompt's 8 tokens"),
        (Reuse((TokenRange(3, 5), TokenRange(4, 6))), "apart from each other"),
        (Reuse((TokenRange(-1, 5),)), "ascending"),
        (Reuse((), "best"), "'best' is not one of none, first, hkvd, query"),  # type: ignore[arg-type]
        (Reuse((), "none", 3), "0 or more, with method first"),
        (Reuse((), "first", -1), "0 or more, with method first"),
        (Reuse((), "hkvd", 3, 0.5), "0 or more, with method first"),
        (Reuse((), "first", 3, 0.5), "method first takes no ratio; hkvd and query do"),
        (Reuse((), "none", ratio=0.0), "method none takes no ratio"),
        (Reuse((), "hkvd"), "method hkvd needs the ratio of tokens to compute, from 0 to 1"),
        (Reuse((), "query", num_rounds=2), "method query needs the ratio"),
        (Reuse((), "query", ratio=-0.01), "from 0 to 1, not -0.01"),
        (Reuse((), "hkvd", ratio=1.01), "from 0 to 1, not 1.01"),
        (Reuse((), "hkvd", ratio=math.nan), "from 0 to 1, not nan"),
        (Reuse((), "hkvd", ratio=math.inf), "from 0 to 1, not inf"),
        (Reuse((), "hkvd", ratio=0.5, num_rounds=2), "method hkvd takes no rounds; query does"),
        (Reuse((), "query", ratio=0.5, num_rounds=0), "1 to 8 rounds, not 0"),
        (Reuse((), "query", ratio=0.5, num_rounds=9), "1 to 8 rounds, not 9"),
    ],
)
def test_what_no_prompt_can_mean_is_refused(reuse: Reuse, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        reuse.check(8)


@pytest.mark.parametrize(
    ("ratio", "num_rounds", "count", "expected"),
    [
        (0.0, 1, 100, ()),
        (0.07, 1, 100, (7,)),  # not 8, which is what 7.000000000000001 gives
        (0.15, 1, 101, (16,)),
        (0.15, 2, 100, (11, 15)),  # most by the question
        (0.15, 3, 100, (11, 13, 15)),
        (0.01, 4, 100, (1,)),  # in the other rounds nothing would be chosen
        (0.5, 3, 3, (2,)),
        (1e-9, 1, 5, (1,)),
        (0.9, 2, 3, (3,)),
    ],
)
def test_a_share_is_exact_and_rounded_up(
    ratio: float, num_rounds: int, count: int, expected: tuple[int, ...]
) -> None:
    assert Reuse((), "query", ratio=ratio, num_rounds=num_rounds).rounds(count) == expected


@pytest.mark.parametrize("num_rounds", [0, 1, 3])
def test_a_ratio_of_1_is_a_full_prefill_and_one_of_0_is_none(num_rounds: int) -> None:
    world = World(config(), depth=1)
    texts = [TEXTS[1], TEXTS[2]]
    all_of_it = reusing("all", texts, ratio=1.0, num_rounds=num_rounds)
    nothing = reusing("nothing", texts, ratio=0.0, num_rounds=num_rounds)
    world.seen = [all_of_it, nothing]
    world.run(all_of_it)
    assert world.tokens["all"] == generate_alone(make_request("a", all_of_it.prompt_token_ids))
    assert not world.num_moves
    world.run(nothing)
    assert world.tokens["nothing"] == generate_alone(reusing("a", texts))
    assert world.num_moves == 2 and not world.num_looks


def test_a_choice_is_not_what_another_one_is() -> None:
    """Or the tests here would show nothing."""
    kvs = [shadow_prompt_kvs(choosing("a", choice))[-1] for choice in CHOICES]
    kvs += [shadow_prompt_kvs(choosing("a", {}))[-1]]
    assert len({*kvs}) == 5


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("depth", [0, 2])
def test_a_request_is_aborted_at_any_stage(choice: dict[str, Any], depth: int) -> None:
    num_steps = 0
    for number in range(100):
        world = World(config(max_num_batched_tokens=5), depth)
        request, other = choosing("a", choice), choosing("b", choice)
        world.seen = [request, other]
        world.add(request)
        for _ in range(number):
            world.step()
        if not world.scheduler.has_work:
            break
        assert world.engine.abort("a") is not None
        world.scheduler.check()
        assert world.scheduler.pool.num_free == 64
        world.run(other)
        num_steps += 1
    assert num_steps > 6


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("meddle", [preempt, fail])
def test_it_chooses_the_same_whatever_happens_at_any_stage(
    choice: dict[str, Any], depth: int, meddle: Callable[[World, Request], None]
) -> None:
    assert meddle_at_any_stage(choice, depth, meddle) > 10


def test_what_stands_before_a_chosen_token_is_chosen_with_it() -> None:
    chooses_what_stands_before()


def test_nobody_is_passed_over_for_ever() -> None:
    is_passed_over_no_more_than_some_times()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_look_that_fails_ends_the_request(choice: dict[str, Any]) -> None:
    num_failed = 0
    for number in range(100):
        world = World(config(max_num_batched_tokens=7))
        request, other = choosing("a", choice), make_request("b", [5, 6], 60)
        world.seen = [request, other]
        for each in world.seen:
            world.add(each)
        for _ in range(number):
            world.step()
        if world.tokens["a"]:
            break
        world.executor.fail_requests = {"a"}
        num_looks = world.executor.num_looks
        errors = {u.request_id: u.error for u in world.engine.step().updates}
        num_failed += world.executor.num_looks > num_looks
        assert errors["a"] == "planted failure of one request"
        world.scheduler.check()
        while world.engine.has_work:
            world.step()
        assert list(other.output_token_ids) == generate_alone(other)
    assert num_failed > 0


def test_what_deviates_by_no_number_is_computed() -> None:
    request = choosing("a", {"ratio": 0.1})
    begin(request)
    start, end = request.candidates[0].start, request.candidates[-1].end
    looked = [float(p % 7) for p in range(start, end)]
    looked[20] = looked[9] = math.nan
    request.num_written_tokens = end
    token_ids = request.prompt_token_ids[start:end]
    item = ScheduledRequest("a", token_ids, start, (), look=Look("deviation"))
    take_look(request, item, tuple(looked))
    reused = {p for run in request.reused for p in range(*run)}
    assert {*range(start, end)} - reused == {start + 9, start + 20, 18, 6}  # 18 is between texts
    assert request.num_written_tokens == start and request.choosing is None


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_priced_is_what_is_planned(choice: dict[str, Any]) -> None:
    """Of each stage; looks at deviations, and nothing else, go through two layers only."""
    request = choosing("a", choice)
    begin(request)
    found = []
    while count := num_wanted(request, request.num_computed_tokens):
        item = plan(request, count)
        assert shape_of(request, request.num_computed_tokens, count) == item.shape
        assert item.shape.is_short == (item.look == Look("deviation"))
        found.append(item.shape.is_short)
        request.num_computed_tokens = item.end
    assert any(found) == ("num_rounds" not in choice)


def test_a_look_at_deviations_takes_no_more_of_a_step_than_it_needs() -> None:
    def step_time(shape: BatchShape) -> float:
        return sum([(0.0001 if r.is_short else 0.001) * r.num_new for r in shape.requests])

    target = config(target_itl_s=0.01, target_itl_steps=4.0, max_num_batched_tokens=100)
    stream, request = make_request("s", [5, 6], 60), choosing("a", {"ratio": 0.3})
    stream.token_ids.append(1)
    begin(request)

    def most(step_time: StepTime) -> int:
        budget = StepBudget(target, step_time)
        budget.spend(stream, 2, 1)
        return budget.most(request, request.candidates[0].start)

    assert most(step_time) == 16 + 1 + 11  # all of it
    assert most(lambda shape: 0.001 * shape.num_tokens) == 9


@pytest.mark.parametrize(
    ("method", "looked", "is_whole"),
    [
        ("attention", (3.0, 4.0, 0.0), True),
        ("attention", (3.0, 4.0), False),
        ("attention", (3.0, 4.5, 0.0), False),
        ("attention", (3.0, math.nan, 0.0), False),
        ("attention", (3.0, math.inf, 0.0), False),
        ("deviation", (3.5, math.nan), True),
        ("deviation", (3.5,), False),
        (None, (3.0,), False),
        (None, (), True),
    ],
)
def test_a_look_must_be_whole(method: Any, looked: tuple[float, ...], is_whole: bool) -> None:
    ranges = (TokenRange(0, 2), TokenRange(5, 6)) if method == "attention" else ()
    look = None if method is None else Look(method, ranges)
    batch = ScheduledBatch((ScheduledRequest("a", (1, 2), 6, (0, 1), look=look),))
    output = StepOutput((RequestResult(looked=looked),))
    if is_whole:
        check_whole(batch, output)
        return
    with pytest.raises(RefusedOutput, match="not a number for each position"):
        check_whole(batch, output)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_same_answers_whatever_goes_on(seed: int, depth: int) -> None:
    swarm(seed, depth)


def test_the_swarms_preempt_and_move() -> None:
    """Or they would show nothing."""
    worlds = [swarm(seed, 0) for seed in range(12)]
    assert sum(world.scheduler.counts.num_preemptions for world in worlds) > 5
    assert sum(world.num_moves for world in worlds) > 100
    assert sum(world.num_looks for world in worlds) > 80


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"enable_prefix_caching": False}, {}, "needs the prefix cache"),
        ({}, {"prompt_logprobs": 1}, "with prompt_logprobs"),
        ({"num_blocks": 10}, {}, "needs 7 blocks of KV and its segments 5 beside it; there are 10"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, int], change: dict[str, int], message: str
) -> None:
    world = World(config(**options))
    with pytest.raises(InvalidRequest, match=message):
        world.add(reusing("a", [TEXTS[1], TEXTS[2]], **change))
