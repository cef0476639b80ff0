"""Each step from logits to a token, by hand or against a plain loop."""

import math

import numpy as np
import pytest

from duetto.core.batch import SamplingInput
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner.sampler import _changes, sample_token, token_logprob

INF = float("inf")


def row(*logits):
    return np.array(logits, dtype=np.float32)


def sampling(*, forbidden=(), prompt=(), output=(), seed=0, num_output_tokens=None, **params):
    params.setdefault("temperature", 0.0)
    return SamplingInput(
        params=SamplingParams(**params),
        seed=seed,
        num_output_tokens=len(output) if num_output_tokens is None else num_output_tokens,
        forbidden_token_ids=tuple(forbidden),
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(output),
    )


def chosen(logits, **arguments):
    return sample_token(logits, sampling(**arguments)).token_id


def can_be_drawn(logits, draws=400, **arguments):
    """The set of tokens that come up over many places of one random stream."""
    arguments.setdefault("temperature", 1.0)
    return {chosen(logits, num_output_tokens=i, **arguments) for i in range(draws)}


class TestGreedy:
    def test_takes_the_largest_logit(self):
        assert chosen(row(0.0, 3.0, -1.0)) == 1

    def test_takes_the_lowest_id_among_equals(self):
        assert chosen(row(1.0, 7.0, 7.0, 7.0)) == 1

    def test_ignores_temperature_dependent_fields_and_the_seed(self):
        logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
        for seed in range(5):
            assert chosen(logits, top_k=3, top_p=0.1, min_p=0.5, seed=seed) == logits.argmax()

    def test_leaves_the_row_as_it_was(self):
        logits = row(1.0, 2.0, 3.0)
        before = logits.copy()
        chosen(logits, forbidden=[2], logit_bias={0: 5.0}, output=[1], presence_penalty=1.0)
        assert (logits == before).all()


class TestMasksAndBias:
    def test_only_allowed_tokens_are_chosen(self):
        assert chosen(row(5.0, 4.0, 3.0, 2.0), allowed_token_ids=(3, 2)) == 2
        assert can_be_drawn(row(5.0, 4.0, 3.0, 2.0), allowed_token_ids=(3, 2)) == {2, 3}

    def test_forbidden_tokens_are_never_chosen_whatever_their_bias(self):
        assert chosen(row(5.0, 4.0, 3.0), forbidden=[0], logit_bias={0: 100.0}) == 1
        assert can_be_drawn(row(5.0, 4.0, 3.0), forbidden=[0], temperature=50.0) == {1, 2}

    def test_bias_is_added(self):
        assert chosen(row(5.0, 4.0, 3.0), logit_bias={2: 2.5}) == 2
        assert chosen(row(5.0, 4.0, 3.0), logit_bias={2: 1.5}) == 0
        assert chosen(row(5.0, 4.0, 3.0), logit_bias={0: -100.0, 1: -100.0}) == 2

    def test_bias_comes_before_the_penalties(self):
        # 1 + 3 = 4, then 4 / 2 = 2 < 2.5. The other way round: 1 / 2 + 3 = 3.5 > 2.5.
        logits = row(1.0, 2.5)
        assert chosen(logits, logit_bias={0: 3.0}, repetition_penalty=2.0, output=[0]) == 1

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_request_that_forbids_every_token_fails_and_says_why(self, temperature):
        with pytest.raises(EngineError, match="allowed_token_ids"):
            chosen(
                row(1.0, 2.0, 3.0), temperature=temperature, allowed_token_ids=(1,), forbidden=[1]
            )

    @pytest.mark.parametrize("bad_id", [-1, 3])
    def test_an_id_outside_the_vocabulary_is_not_wrapped_around(self, bad_id):
        with pytest.raises(AssertionError):
            chosen(row(1.0, 2.0, 3.0), forbidden=[bad_id])


class TestPenalties:
    def test_repetition_divides_positive_and_multiplies_negative_logits(self):
        # Prompt token 0: 4 -> 2. Output token 1: -1 -> -2. Token 2 was never seen.
        seen = {"prompt": [0], "output": [1], "repetition_penalty": 2.0}
        assert chosen(row(4.0, -1.0, 1.9), **seen) == 0
        assert chosen(row(4.0, -1.0, 2.1), **seen) == 2
        assert chosen(row(-9.0, -1.0, -1.9), **seen) == 2
        assert chosen(row(-9.0, -1.0, -2.1), **seen) == 1

    def test_repetition_counts_a_token_once(self):
        arguments = {"prompt": [0, 0, 0], "output": [0, 0], "repetition_penalty": 2.0}
        assert chosen(row(4.0, 1.9), **arguments) == 0

    def test_frequency_grows_with_each_occurrence_in_the_output(self):
        # Three times 0.5 off token 0.
        arguments = {"prompt": [1, 1, 1, 1], "output": [0, 0, 0], "frequency_penalty": 0.5}
        assert chosen(row(3.0, 1.4), **arguments) == 0
        assert chosen(row(3.0, 1.6), **arguments) == 1

    def test_presence_is_once_and_over_the_output_only(self):
        arguments = {"prompt": [1, 1], "output": [0, 0, 0], "presence_penalty": 1.5}
        assert chosen(row(3.0, 1.4), **arguments) == 0
        assert chosen(row(3.0, 1.6), **arguments) == 1

    def test_negative_penalties_favour_what_was_said(self):
        assert chosen(row(3.0, 2.0), output=[1, 1], frequency_penalty=-0.6) == 1
        assert chosen(row(3.0, 2.0), output=[1], presence_penalty=-1.1) == 1

    def test_all_three_together_match_a_plain_loop(self):
        rng = np.random.default_rng(3)
        for _ in range(50):
            logits = rng.normal(size=12).astype(np.float32) * 3
            prompt, output = rng.integers(12, size=6).tolist(), rng.integers(12, size=9).tolist()
            expected = [float(x) for x in logits]
            for i in range(12):
                if i in prompt or i in output:
                    expected[i] = expected[i] / 1.3 if expected[i] > 0 else expected[i] * 1.3
                expected[i] -= 0.4 * output.count(i)
                expected[i] -= 0.7 * (i in output)
            token_id = chosen(
                logits,
                prompt=prompt,
                output=output,
                repetition_penalty=1.3,
                frequency_penalty=0.4,
                presence_penalty=0.7,
            )
            assert token_id == expected.index(max(expected))

    def test_masked_tokens_stay_masked(self):
        arguments = {"forbidden": [0], "output": [0], "presence_penalty": -2.0}
        assert chosen(row(9.0, 1.0), repetition_penalty=0.01, **arguments) == 1


class TestFilters:
    def test_top_k_keeps_exactly_k_and_lower_ids_among_equals(self):
        assert can_be_drawn(row(1.0, 2.0, 1.0, 1.0), top_k=2) == {0, 1}
        assert can_be_drawn(np.zeros(100, dtype=np.float32), top_k=3) == {0, 1, 2}

    @pytest.mark.parametrize("top_k", [0, -1, 4, 5, 2**31])
    def test_top_k_off_or_beyond_the_vocabulary_keeps_all(self, top_k):
        assert can_be_drawn(np.zeros(4, dtype=np.float32), top_k=top_k) == {0, 1, 2, 3}

    def test_top_k_of_one_is_greedy(self):
        assert can_be_drawn(row(2.0, 5.0, 5.0), top_k=1, temperature=100.0) == {1}

    def test_top_p_keeps_the_fewest_that_reach_it(self):
        equal = np.zeros(4, dtype=np.float32)  # a quarter each, exactly
        assert can_be_drawn(equal, top_p=0.5) == {0, 1}
        assert can_be_drawn(equal, top_p=0.51) == {0, 1, 2}
        assert can_be_drawn(equal, top_p=1.0) == {0, 1, 2, 3}

    def test_top_p_keeps_at_least_one(self):
        assert can_be_drawn(row(0.0, 0.0, 1.0), top_p=1e-9) == {2}

    def test_top_p_beyond_the_first_look_keeps_the_right_number(self):
        # 0.9 of 1000 equal tokens are 900: three looks, at 64, 512 and all.
        drawn = can_be_drawn(np.zeros(1000, dtype=np.float32), draws=3000, top_p=0.9)
        assert 890 < max(drawn) <= 899

    def test_top_p_is_taken_of_what_top_k_leaves(self):
        # Two of four equal tokens remain, half each: the first alone reaches 0.5.
        assert can_be_drawn(np.zeros(4, dtype=np.float32), top_k=2, top_p=0.5) == {0}

    def test_top_p_is_taken_of_what_min_p_leaves(self):
        logits = row(*np.log([0.4, 0.3, 0.1, 0.1, 0.1]))
        assert can_be_drawn(logits, top_p=0.75) == {0, 1, 2}
        assert can_be_drawn(logits, top_p=0.75, min_p=0.5) == {0, 1}
        assert can_be_drawn(logits, top_p=0.55, min_p=0.5) == {0}

    def test_min_p_is_relative_to_the_likeliest_after_temperature(self):
        logits = row(*np.log([0.5, 0.25, 0.125, 0.125]))
        assert can_be_drawn(logits, min_p=0.3) == {0, 1}
        assert can_be_drawn(logits, min_p=0.3, temperature=2.0) == {0, 1, 2, 3}
        assert can_be_drawn(logits, min_p=1.0) == {0}

    def test_a_masked_token_is_not_drawn_even_where_the_filters_would_keep_it(self):
        masked = {"forbidden": [1, 3], "temperature": 100.0}
        assert can_be_drawn(row(0.0, 9.0, 0.0, 9.0), top_k=3, **masked) == {0, 2}
        assert can_be_drawn(row(0.0, 9.0, 0.0, 9.0), top_p=0.999999, **masked) == {0, 2}


class TestExtremes:
    def test_a_tiny_temperature_is_greedy_without_overflow(self):
        logits = row(-3e38, 1.0, 2.0, 3e38)
        for temperature in (1e-5, 1e-300, 5e-324):
            assert can_be_drawn(logits, draws=20, temperature=temperature) == {3}

    def test_a_huge_temperature_is_close_to_uniform(self):
        assert can_be_drawn(row(-50.0, 0.0, 50.0), temperature=100.0) == {0, 1, 2}

    def test_the_largest_logits_survive_penalties_and_bias(self):
        top = float(np.finfo(np.float32).max)
        assert chosen(row(top, 0.0), repetition_penalty=1e-30, output=[0]) == 0
        assert chosen(row(top, 0.0), repetition_penalty=100.0, output=[0], logit_bias={0: 100}) == 0

    @pytest.mark.parametrize("penalty", [1e-30, 1e-308, 5e-324])
    def test_a_tiny_repetition_penalty_is_a_certainty_and_not_a_nan(self, penalty):
        history = {"repetition_penalty": penalty, "output": [0, 2], "frequency_penalty": 0.1}
        for logits in (row(5.0, 90.0, -3.0), row(5.0, -INF, -3e38)):
            assert can_be_drawn(logits, draws=20, **history) == {0}
            assert chosen(logits, **history) == 0

    def test_a_single_token_is_always_chosen(self):
        assert can_be_drawn(row(-7.0), draws=5, top_k=1, top_p=0.1, min_p=1.0) == {0}

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize(
        "logits", [(1.0, math.nan, 2.0), (1.0, INF), (-INF, -INF), (math.nan, INF)]
    )
    def test_logits_that_are_not_finite_fail_the_request(self, logits, temperature):
        with pytest.raises(EngineError, match="not finite"):
            chosen(row(*logits), temperature=temperature)
        with pytest.raises(EngineError, match="not finite"):
            token_logprob(row(*logits), 0, 0)

    def test_a_token_that_the_model_rules_out_is_never_drawn(self):
        assert can_be_drawn(row(0.0, -INF, 0.0, -INF), temperature=100.0) == {0, 2}


class TestRandomStream:
    def test_a_token_depends_on_seed_and_position_only(self):
        logits = np.random.default_rng(5).normal(size=300).astype(np.float32)
        alone = [chosen(logits, temperature=1.0, seed=9, num_output_tokens=i) for i in range(20)]
        backwards = [
            chosen(logits, temperature=1.0, seed=9, num_output_tokens=i) for i in range(19, -1, -1)
        ]
        assert alone == backwards[::-1]
        assert len(set(alone)) > 5

    def test_a_row_gives_the_same_bits_wherever_it_lies_in_memory(self):
        rows = np.random.default_rng(6).normal(size=(7, 1001)).astype(np.float32)
        for i, inner in enumerate(rows):
            arguments = {"temperature": 0.9, "top_p": 0.99, "seed": i, "logprobs": 5}
            here = sample_token(inner, sampling(**arguments))
            assert here == sample_token(inner.copy(), sampling(**arguments))


class TestLogprobs:
    def test_match_a_log_softmax_in_high_precision(self):
        logits = np.random.default_rng(7).normal(size=64).astype(np.float32) * 8
        total = math.log(math.fsum(math.exp(float(x)) for x in logits))
        for token_id in range(64):
            got = token_logprob(logits, token_id, 0)
            assert got.logprob == pytest.approx(float(logits[token_id]) - total, abs=1e-12)
            assert got.rank == sorted(logits, reverse=True).index(logits[token_id]) + 1
            assert got.top == ()

    def test_top_is_by_likelihood_then_by_id_and_rank_counts_only_the_likelier(self):
        logits = row(1.0, 3.0, 2.0, 3.0, 2.0)
        got = token_logprob(logits, 4, 4)
        assert got.rank == 3
        assert [token_id for token_id, _ in got.top] == [1, 3, 2, 4]
        assert got.top[3] == (4, got.logprob)

    def test_many_equals_stand_by_id(self):
        logits = np.random.default_rng(9).integers(0, 3, size=500).astype(np.float32)
        expected = sorted(range(500), key=lambda i: (-logits[i], i))[:300]
        assert [i for i, _ in token_logprob(logits, 0, 300).top] == expected

    def test_more_than_the_vocabulary_is_the_vocabulary(self):
        assert [i for i, _ in token_logprob(row(1.0, 2.0), 0, 20).top] == [1, 0]

    def test_are_finite_for_logits_far_apart(self):
        got = token_logprob(row(1e30, -1e30), 1, 2)
        assert got.logprob == pytest.approx(-2e30)
        assert got.top[0] == (0, 0.0)

    def test_are_of_the_raw_logits_whatever_is_done_to_sample(self):
        logits = row(5.0, 1.0, 0.0)
        got = sample_token(
            logits,
            sampling(
                logprobs=3,
                temperature=0.5,
                top_k=1,
                forbidden=[0],
                output=[2],
                presence_penalty=2.0,
                logit_bias={2: -50.0},
            ),
        )
        assert got.token_id == 1
        assert got.logprob == token_logprob(logits, 1, 3)
        assert got.logprob.rank == 2 and len(got.logprob.top) == 3

    def test_are_absent_unless_asked_for(self):
        assert sample_token(row(1.0, 2.0), sampling()).logprob is None
        assert sample_token(row(1.0, 2.0), sampling(logprobs=0)).logprob.top == ()

    def test_are_plain_python_numbers(self):
        got = sample_token(row(1.0, 2.0), sampling(logprobs=1))
        kinds = {type(got.token_id), type(got.logprob.rank), type(got.logprob.top[0][0])}
        assert kinds == {int}
        assert {type(got.logprob.logprob), type(got.logprob.top[0][1])} == {float}


def dense(logits, inputs):
    """Steps 2 to 5 on every token of the vocabulary, whether it is named or not."""
    params, size = inputs.params, len(logits)
    changed = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        changed[np.setdiff1d(np.arange(size), params.allowed_token_ids)] = -INF
    changed[list(inputs.forbidden_token_ids)] = -INF
    for token_id, bias in params.logit_bias.items():
        changed[token_id] += bias
    output = np.bincount(np.array(inputs.output_token_ids, int), minlength=size)
    prompt = np.bincount(np.array(inputs.prompt_token_ids, int), minlength=size)
    repetition = params.repetition_penalty
    repeated = np.where(changed > 0, changed / repetition, changed * repetition)
    changed = np.where(output + prompt > 0, repeated, changed)
    return changed - (params.frequency_penalty * output + params.presence_penalty * (output > 0))


def test_only_named_tokens_are_looked_at_and_the_bits_are_those_of_looking_at_all():
    rng = np.random.default_rng(3)
    for trial in range(300):
        size = int(rng.integers(2, 60))
        logits = (rng.standard_normal(size) * 5).astype(np.float32)
        logits[rng.random(size) < 0.2] = -INF

        def ids(at_most, size=size):
            return tuple(rng.integers(size, size=int(rng.integers(at_most))).tolist())

        inputs = sampling(
            forbidden=ids(4),
            prompt=ids(9),
            output=ids(30),
            repetition_penalty=float(rng.choice([1.0, 0.7, 1.3])),
            presence_penalty=float(rng.choice([0.0, 1.1, -0.4])),
            frequency_penalty=float(rng.choice([0.0, 0.3])),
            logit_bias={i: float(rng.normal()) for i in ids(5)},
            allowed_token_ids=(*ids(20), 0) if trial % 2 else None,
        )
        changes = _changes(logits, inputs)
        got = logits.astype(np.float64)
        if changes is not None:
            if not changes.others_allowed:
                got[:] = -INF
            got[changes.ids] = changes.logits
            assert (np.diff(changes.ids) > 0).all()
        assert got.tolist() == dense(logits, inputs).tolist()
