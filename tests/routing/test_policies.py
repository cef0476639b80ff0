"""Who is sent where."""

import random
from collections.abc import Sequence

import pytest

from duetto.core.config import SchedulerConfig
from duetto.core.errors import ConfigError
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape
from duetto.routing.policies import (
    LeastLoaded,
    Predicted,
    PrefixAffinity,
    RoundRobin,
    RouterName,
    RoutingPolicy,
    WorkerView,
    make_policy,
)
from duetto.routing.predicted_wait import WaitPrices

CONFIG = SchedulerConfig(
    num_blocks=100, max_model_len=1600, max_num_seqs=8, max_num_batched_tokens=256
)


def step_time(shape: BatchShape) -> float:
    return (
        0.001 + 1e-4 * shape.num_tokens + 1e-7 * sum(r.attended_pairs(None) for r in shape.requests)
    )


def prices() -> WaitPrices:
    return WaitPrices(step_time, CONFIG)


def request(*prompt: int, salt: bytes = b"") -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        max_tokens=1,
        seed=0,
        cache_salt=salt,
    )


def sent(
    policy: RoutingPolicy, prompts: Sequence[Sequence[int]], loads: Sequence[int]
) -> list[int]:
    names = [str(i) for i in range(len(loads))]
    views = [WorkerView(name, load) for name, load in zip(names, loads, strict=True)]
    return [policy.choose(request(*prompt), names, lambda: views) for prompt in prompts]


def test_round_robin_goes_in_turn_and_asks_for_no_view() -> None:
    policy = RoundRobin()
    never = lambda: pytest.fail("asked for views")  # noqa: E731
    assert [policy.choose(request(1), "abc", never) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [policy.choose(request(1), "ab", never) for _ in range(3)] == [0, 1, 0]  # one has left


def test_least_loaded_is_where_least_is_under_way() -> None:
    assert sent(LeastLoaded(), [(1,)] * 2, [500, 20, 100]) == [1, 1]


def test_idle_workers_share() -> None:
    assert sent(LeastLoaded(), [(1,)] * 4, [0, 0, 0]) == [0, 1, 2, 0]
    assert sent(Predicted(prices()), [(1,)] * 4, [0, 0, 0]) == [0, 1, 2, 0]


def prompt(first: int, size: int = 300) -> tuple[int, ...]:
    return (first, *[0] * (size - 1))


def test_affinity_sends_alike_to_where_the_longest_beginning_went() -> None:
    policy = PrefixAffinity()
    first = sent(policy, [prompt(1), prompt(2), prompt(3)], [0] * 4)
    assert len(set(first)) == 3
    again = sent(policy, [prompt(2), prompt(1), prompt(3)], [0] * 4)
    assert again == [first[1], first[0], first[2]]
    longer = (*prompt(1)[:256], *[9] * 256)
    other = (first[0] + 1) % 4
    loads = [1000] * 4
    loads[other] = 0
    assert sent(policy, [longer], loads) == [first[0]]  # its first 256 tokens went there


def test_affinity_gives_way_to_overload() -> None:
    policy = PrefixAffinity()
    (home,) = sent(policy, [prompt(1)], [0, 0])
    loads = [10_000, 10_000]
    assert sent(policy, [prompt(1)], loads) == [home]
    loads[home] = 30_000
    assert sent(policy, [prompt(1)], loads) == [1 - home]
    loads[:] = [1000, 1000]
    assert sent(policy, [prompt(1)], loads) == [1 - home]  # it is known there now


def test_affinity_goes_elsewhere_once_its_worker_has_left() -> None:
    policy = PrefixAffinity()
    views = [WorkerView("a"), WorkerView("b")]
    home = policy.choose(request(*prompt(1)), "ab", lambda: views)
    assert policy.choose(request(*prompt(1)), "ab", lambda: views) == home
    policy.left("ab"[home])
    left = views[1 - home]
    assert policy.choose(request(*prompt(1)), [left.worker], lambda: [left]) == 0
    assert policy.choose(request(*prompt(1)), "ab", lambda: views) == 1 - home


def test_affinity_forgets_what_was_not_sent_for_longest() -> None:
    policy = PrefixAffinity(max_prefixes=10)
    for first in range(100):
        sent(policy, [prompt(first)], [0, 0])
        assert len(policy) <= 10
    (home,) = sent(policy, [prompt(99)], [0, 0])
    assert sent(policy, [prompt(99)] * 3, [0, 0]) == [home] * 3


def test_short_prompts_have_no_affinity() -> None:
    assert sent(PrefixAffinity(), [(1, 2)] * 4, [0, 0]) == [0, 1, 0, 1]


def test_tenants_have_no_affinity_to_each_other() -> None:
    policy, views = PrefixAffinity(), [WorkerView("a"), WorkerView("b")]
    chosen = [
        policy.choose(request(*prompt(1), salt=salt), "ab", lambda: views)
        for salt in (b"x", b"y", b"x", b"x", b"y")
    ]
    assert chosen == [0, 1, 0, 0, 1]


def test_predicted_weighs_what_waits_what_is_cached_and_who_is_beside() -> None:
    def best(*views: WorkerView) -> int:
        names = [view.worker for view in views]
        return Predicted(prices()).choose(request(*range(512)), names, lambda: views)

    idle = WorkerView("idle")
    assert best(WorkerView("waits", num_waiting=1, waiting_tokens=100), idle) == 1
    assert best(WorkerView("answers", num_answers=4, context_tokens=4000), idle) == 1
    assert best(WorkerView("has it", cached_tokens=496), idle) == 0
    # 300 tokens that wait cost less than the 400 that need not be computed there.
    has_some = WorkerView("has some", num_waiting=1, waiting_tokens=300, cached_tokens=400)
    assert best(idle, has_some) == 1
    assert best(idle, has_some._replace(waiting_tokens=500)) == 0
    # Whoever has no place left comes last, whatever it has cached.
    assert best(WorkerView("full", num_answers=8, context_tokens=8, cached_tokens=511), idle) == 1


def test_predicted_is_the_sum_of_the_prices_of_its_steps() -> None:
    """512 tokens after 128 cached ones, beside two answers, in steps of at most 254 tokens."""
    view = WorkerView("a", num_answers=2, context_tokens=64, cached_tokens=128)
    is_full, seconds = Predicted(prices()).predicted(request(*range(640)), view)
    beside = 2 * 1e-4 + 2 * 33e-7
    exact = 3 * (0.001 + beside) + 512e-4 + 1e-7 * (512 * 128 + 512 * 513 / 2)
    assert not is_full
    assert seconds == pytest.approx(exact, rel=0.05)


def test_more_work_never_comes_sooner() -> None:
    known, source = prices(), random.Random(1)
    for _ in range(2000):
        sizes = [source.randrange(3000), source.randrange(900), source.randrange(8), 0]
        sizes[3] = sizes[2] * source.randrange(500)
        before = known.seconds(*sizes)
        more = list(sizes)
        more[source.choice((0, 1))] += source.randrange(1, 2000)
        # Sizes are rounded down by at most a thirty-second.
        assert known.seconds(*more) >= before * 31 / 32
        assert len(known) <= 8192


def test_prices_that_changed_are_asked_for_again() -> None:
    factor = 1.0
    known = WaitPrices(lambda shape: factor * step_time(shape), CONFIG)
    before = known.seconds(500, 0, 1, 10)
    factor = 2.0
    assert known.seconds(500, 0, 1, 10) == before
    known.forget()
    assert known.seconds(500, 0, 1, 10) == 2 * before


@pytest.mark.parametrize("name", ["round-robin", "least-loaded", "prefix-affinity", "predicted"])
def test_any_policy_gives_a_worker_that_is_there(name: RouterName) -> None:
    policy, source = make_policy(name, prices()), random.Random(name)
    for _ in range(500):
        names = source.sample("abcdefgh", source.randrange(1, 8))
        views = [
            WorkerView(each, *(source.randrange(2000) for _ in range(6))) for each in sorted(names)
        ]
        chosen = policy.choose(
            request(*prompt(source.randrange(5), source.randrange(1, 600))),
            sorted(names),
            lambda views=views: views,  # type: ignore[misc]
        )
        assert 0 <= chosen < len(names)
        policy.left(source.choice("abcdefgh"))


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="round-robin, least-loaded, prefix-affinity, predicted"):
        make_policy("random", prices())  # type: ignore[arg-type]
