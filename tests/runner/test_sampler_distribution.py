"""What is drawn, 10000 times, against the distribution that a plain implementation expects.

The seeds are fixed, so these tests are deterministic; the bounds are what a correct sampler would
miss once in about a million choices of seeds.
"""

import math

import numpy as np
import pytest

from duetto.core.batch import SamplingInput
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.sampler import sample_token

DRAWS = 10_000
LOGITS = (np.random.default_rng(2026).normal(size=24) * 1.5).astype(np.float32)


def expected_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The order of vLLM step by step, each step on normalised probabilities. Plain Python."""

    def normalised(weights):
        total = math.fsum(weights)
        return [w / total for w in weights]

    peak = max(float(x) for x in logits)
    probs = normalised([math.exp((float(x) - peak) / temperature) for x in logits])
    likeliest_first = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    probs = normalised([p if p >= min_p * max(probs) else 0.0 for p in probs])
    if top_k > 0:
        kept = likeliest_first[:top_k]
        probs = normalised([p if i in kept else 0.0 for i, p in enumerate(probs)])
    kept, reached = [], 0.0
    for i in likeliest_first:
        if reached < top_p:
            kept.append(i)
            reached += probs[i]
    return normalised([p if i in kept else 0.0 for i, p in enumerate(probs)])


def frequencies(seed_of, **params):
    counts = np.zeros(len(LOGITS))
    sampling = SamplingParams(**params)
    for i in range(DRAWS):
        seed, position = seed_of(i)
        counts[sample_token(LOGITS, SamplingInput(sampling, seed, position)).token_id] += 1
    return counts


def assert_drawn_from(expected, counts):
    expected = np.array(expected) * counts.sum()
    assert (counts[expected == 0] == 0).all(), "a token that should have been filtered out"
    likely = expected >= 5  # the usual condition for the chi-square approximation
    freedom = int(likely.sum()) - 1
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    # Wilson and Hilferty, 1931: the cube root of chi-square / freedom is close to normal.
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4.9
    distance = float(np.abs(counts - expected).sum()) / 2 / counts.sum()
    assert distance < 2 * math.sqrt(len(expected) / counts.sum())  # total variation


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 1.5},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_one_stream_is_drawn_from_the_expected_distribution(params):
    counts = frequencies(lambda i: (12345, i), **params)
    assert_drawn_from(expected_distribution(LOGITS, **params), counts)


def test_first_tokens_over_many_seeds_are_drawn_from_it_too():
    # Seeds that follow each other, as callers choose them, must not give streams that resemble.
    counts = frequencies(lambda i: (i, 0), temperature=1.0)
    assert_drawn_from(expected_distribution(LOGITS), counts)


def test_the_check_can_fail():
    counts = frequencies(lambda i: (1, i), temperature=1.1)
    with pytest.raises(AssertionError):
        assert_drawn_from(expected_distribution(LOGITS, temperature=1.0), counts)
    with pytest.raises(AssertionError):
        assert_drawn_from(expected_distribution(LOGITS, temperature=1.1, top_k=5), counts)


def test_the_kept_set_is_the_expected_one_for_random_rows_and_parameters():
    rng = np.random.default_rng(11)
    for trial in range(300):
        size = int(rng.integers(2, 200))
        logits = rng.normal(size=size).astype(np.float32) * float(rng.uniform(0.1, 6))
        params = {
            "temperature": float(rng.uniform(0.2, 3)),
            "top_k": int(rng.integers(-1, size + 5)),
            "top_p": float(rng.uniform(0.05, 1)),
            "min_p": float(rng.choice([0.0, rng.uniform(0, 0.5)])),
        }
        expected = expected_distribution(logits, **params)
        # The draw is known too: the largest of log p + noise.
        sampling = SamplingInput(SamplingParams(**params), seed=trial, num_output_tokens=0)
        noise = gumbel.noise(gumbel.key_of(trial, 0), np.arange(size))
        with np.errstate(divide="ignore"):
            scores = np.log(expected) + noise
        assert sample_token(logits, sampling).token_id == scores.argmax()


def test_penalties_change_the_distribution_as_they_should():
    params = SamplingParams(temperature=1.0, presence_penalty=1.5, repetition_penalty=1.2)
    adjusted = LOGITS.astype(np.float64)
    seen = [0, 3, 5]
    adjusted[seen] = np.where(LOGITS[seen] > 0, adjusted[seen] / 1.2, adjusted[seen] * 1.2) - 1.5
    counts = np.zeros(len(LOGITS))
    for i in range(DRAWS):
        sampling = SamplingInput(params, 3, i, output_token_ids=tuple(seen))
        counts[sample_token(LOGITS, sampling).token_id] += 1
    assert_drawn_from(expected_distribution(adjusted), counts)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1)], ids=["positions", "seeds", "both"])
def test_neighbours_are_independent(step):
    logits = np.zeros(6, np.float32)
    params = SamplingParams(temperature=1.0)

    def token(seed, position):
        return sample_token(logits, SamplingInput(params, seed, position)).token_id

    pairs = np.zeros(36)
    for i in range(DRAWS):
        seed, position = (i, 7) if step[0] else (7, 2 * i)
        pairs[6 * token(seed, position) + token(seed + step[0], position + step[1])] += 1
    assert_drawn_from(np.full(36, 1 / 36), pairs)


def test_two_close_distributions_draw_the_same_token_nearly_as_often_as_can_be():
    # A draft model's logits are the target's with an error. No coupling agrees more often than
    # `most`; the inverse of the cumulative distribution would agree half as often.
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=1.0)
    agreed, most, draws = 0, [], 150
    for row in range(20):
        target = (rng.standard_normal(4096) * 3).astype(np.float32)
        draft = (target + rng.standard_normal(4096) * 0.3).astype(np.float32)
        p, q = (np.exp(x - x.max(), dtype=np.float64) for x in (target, draft))
        most.append(np.minimum(p / p.sum(), q / q.sum()).sum())
        for i in range(draws):
            inputs = SamplingInput(params, row, i)
            agreed += sample_token(target, inputs) == sample_token(draft, inputs)
    assert 0.94 < agreed / draws / sum(most) <= 1.02
