"""Synthetic workloads: lengths, shared prefixes, and what a seed fixes."""

import statistics

import pytest
from numpy.random import default_rng

from duetto.core.errors import ConfigError
from duetto.measure.workload import (
    Lengths,
    SharedPrefixes,
    Workload,
    WorkloadRequest,
    random_workload,
)


def make(num_requests: int = 50, **changes: object) -> Workload:
    options = {
        "input_lengths": Lengths(20, "uniform", 0.5),
        "output_lengths": Lengths(8),
        "vocab_size": 100,
        "seed": 1,
    } | changes
    return random_workload(num_requests, **options)  # type: ignore[arg-type]


def prompts(workload: Workload) -> list[tuple[int, ...]]:
    return [request.prompt_token_ids or () for request in workload.requests]


def test_fixed_lengths() -> None:
    assert Lengths(7).draw(default_rng(0), 3) == [7, 7, 7]


def test_uniform_lengths_reach_both_ends_and_keep_the_mean() -> None:
    drawn = Lengths(10, "uniform", 0.25).draw(default_rng(0), 4000)
    assert set(drawn) == set(range(7, 14))  # floor(7.5) to ceil(12.5)
    assert statistics.mean(drawn) == pytest.approx(10, abs=0.1)


def test_lognormal_lengths_have_the_mean_and_the_spread() -> None:
    drawn = Lengths(200, "lognormal", 0.6).draw(default_rng(0), 20_000)
    assert statistics.mean(drawn) == pytest.approx(200, rel=0.02)
    # The median of a lognormal is exp(mu) = mean / exp(sigma² / 2).
    assert statistics.median(drawn) == pytest.approx(200 / 2.718281828**0.18, rel=0.02)


def test_lengths_are_at_least_one_and_at_most_the_maximum() -> None:
    drawn = Lengths(2, "lognormal", 2.0, maximum=5).draw(default_rng(0), 1000)
    assert (min(drawn), max(drawn)) == (1, 5)


def test_a_seed_fixes_everything_and_another_changes_it() -> None:
    assert make() == make()
    assert prompts(make()) != prompts(make(seed=2))


def test_token_ids_are_inside_the_vocabulary() -> None:
    seen = {token for prompt in prompts(make(vocab_size=5)) for token in prompt}
    assert seen == set(range(5))


def test_prefixes_are_shared_and_come_on_top_of_the_length() -> None:
    plain = make()
    shared = make(prefixes=SharedPrefixes(length=6, count=3))
    heads = {prompt[:6] for prompt in prompts(shared)}
    assert len(heads) == 3
    # The rest of each prompt is what it is without a prefix.
    assert [prompt[6:] for prompt in prompts(shared)] == prompts(plain)


def test_changing_outputs_changes_no_prompt() -> None:
    assert prompts(make()) == prompts(make(output_lengths=Lengths(80, "lognormal", 1.0)))


def test_arrivals_replace_only_the_times() -> None:
    timed = make(3).with_arrivals([3.0, 1.0, 2.0])
    assert [r.arrival_s for r in timed.requests] == [3.0, 1.0, 2.0]
    assert prompts(timed) == prompts(make(3))


def test_a_prompt_is_ids_or_text() -> None:
    with pytest.raises(ValueError, match="either"):
        WorkloadRequest(num_output_tokens=1)
    with pytest.raises(ValueError, match="either"):
        WorkloadRequest(num_output_tokens=1, prompt_token_ids=(1,), prompt_text="a")


@pytest.mark.parametrize(
    ("build", "flag"),
    [
        (lambda: make(0), "--num-prompts 0"),
        (lambda: make(10**9), "--num-prompts 1,000,000,000: must be at most 10,000,000"),
        (lambda: make(10**30), "--num-prompts 1,000,000"),
        (lambda: make(10**6, input_lengths=Lengths(10**5)), "ask for fewer or shorter ones"),
        (lambda: make(prefixes=SharedPrefixes(10**6, 10**6)), "ask for fewer or shorter ones"),
        (lambda: Lengths(10**9), "length of 1,000,000,000 tokens: lengths must be at most"),
        (lambda: Lengths(10**30), "lengths must be at most"),
        (lambda: SharedPrefixes(10**9), "--random-prefix-len 1000000000 .* at most"),
        (lambda: SharedPrefixes(1, 10**9), "--random-num-prefixes 1000000000: .* at most"),
        (lambda: make(vocab_size=0), "--random-vocab-size 0"),
        (lambda: Lengths(0), "length of 0 tokens"),
        (lambda: Lengths(5, "uniform", 1.0), "--random-range-ratio 1.0"),
        (lambda: Lengths(5, "lognormal", float("nan")), "--random-range-ratio nan"),
        (lambda: SharedPrefixes(-1), "--random-prefix-len -1"),
        (lambda: SharedPrefixes(1, 0), "--random-num-prefixes 0"),
    ],
)
def test_bad_options_are_named(build: object, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        build()  # type: ignore[operator]
