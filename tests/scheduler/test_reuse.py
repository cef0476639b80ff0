"""Texts' KV brought to their places: what is computed, what is refused, and the same answers."""

import pytest
from fakes import generate_alone, make_request, shadow_kvs, shadow_prompt_kvs
from scheduler.reuse_world import TEXTS, World, config, reusing, swarm

from duetto.core.errors import InvalidRequest
from duetto.core.reuse import Reuse, TokenRange


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
        (Reuse((), "query"), "'query' is not one of none, first"),  # type: ignore[arg-type]
        (Reuse((), "none", 3), "0 or more, with method first"),
        (Reuse((), "first", -1), "0 or more, with method first"),
    ],
)
def test_what_no_prompt_can_mean_is_refused(reuse: Reuse, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        reuse.check(8)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_same_answers_whatever_goes_on(seed: int, depth: int) -> None:
    swarm(seed, depth)


def test_the_swarms_preempt_and_move() -> None:
    """Or they would show nothing."""
    worlds = [swarm(seed, 0) for seed in range(12)]
    assert sum(world.scheduler.counts.num_preemptions for world in worlds) > 5
    assert sum(world.num_moves for world in worlds) > 100


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
