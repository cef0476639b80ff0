"""Who is sent where."""

from collections.abc import Sequence

import pytest

from duetto.core.errors import ConfigError
from duetto.simulation.router import LeastLoaded, PrefixAffinity, RoundRobin, Router, make_router


def sent(router: Router, prompts: Sequence[Sequence[int]], loads: Sequence[int]) -> list[int]:
    return [router.choose(prompt, lambda: loads) for prompt in prompts]


def test_round_robin_goes_in_turn_and_asks_for_no_load() -> None:
    router = RoundRobin(3)
    never = lambda: pytest.fail("asked for loads")  # noqa: E731
    assert [router.choose((1,), never) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_is_where_least_is_under_way() -> None:
    assert sent(LeastLoaded(3), [(1,)] * 2, [500, 20, 100]) == [1, 1]


def test_idle_replicas_share() -> None:
    assert sent(LeastLoaded(3), [(1,)] * 4, [0, 0, 0]) == [0, 1, 2, 0]


def prompt(first: int, size: int = 300) -> tuple[int, ...]:
    return (first, *[0] * (size - 1))


def test_affinity_sends_alike_to_where_the_longest_beginning_went() -> None:
    router = PrefixAffinity(4)
    first = sent(router, [prompt(1), prompt(2), prompt(3)], [0] * 4)
    assert len(set(first)) == 3
    assert sent(router, [prompt(2), prompt(1), prompt(3)], [0] * 4) == [
        first[1],
        first[0],
        first[2],
    ]
    longer = (*prompt(1)[:256], *[9] * 256)
    other = (first[0] + 1) % 4
    loads = [1000] * 4
    loads[other] = 0
    assert sent(router, [longer], loads) == [first[0]]  # its first 256 tokens went there


def test_affinity_gives_way_to_overload() -> None:
    router = PrefixAffinity(2)
    (home,) = sent(router, [prompt(1)], [0, 0])
    loads = [10_000, 10_000]
    assert sent(router, [prompt(1)], loads) == [home]
    loads[home] = 30_000
    assert sent(router, [prompt(1)], loads) == [1 - home]
    loads[:] = [1000, 1000]
    assert sent(router, [prompt(1)], loads) == [1 - home]  # it is known there now


def test_short_prompts_have_no_affinity() -> None:
    assert sent(PrefixAffinity(2), [(1, 2)] * 4, [0, 0]) == [0, 1, 0, 1]


def test_an_unknown_router() -> None:
    with pytest.raises(ConfigError, match="round-robin, least-loaded, prefix-affinity"):
        make_router("random", 2)  # type: ignore[arg-type]
