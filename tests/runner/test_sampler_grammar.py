"""A grammar's mask in the sampler, beside all else that a request asks for, native and slow."""

import numpy as np
import pytest

from duetto.core.batch import SamplingInput
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner.sampler import RowConstraint, sample_token

SIZE = 60
KINDS = (
    {"temperature": 0},
    {"temperature": 1.5},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.01},
    {"temperature": 0.7, "logit_bias": {3: 9.0, 7: -5.0}},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(0, SIZE, 2))},
    {"temperature": 1.0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
)


def constraint(allowed, steer=lambda token_id: token_id) -> RowConstraint:
    ceiling = np.full(SIZE, -np.inf, np.float32)
    ceiling[list(allowed)] = np.inf
    return RowConstraint(ceiling, steer)


def given(place: int = 0, **more) -> SamplingInput:
    asked = {name: more.pop(name) for name in list(more) if name in SamplingInput._fields}
    return SamplingInput(SamplingParams(**more), 5, place, **asked)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_native_and_slow_take_the_same_token(kind):
    """The slow twin: what is forbidden is written into the row, and is sampled in float64."""
    rng = np.random.default_rng(2)
    for place in range(40):
        row = rng.standard_normal(SIZE).astype(np.float32)
        allowed = rng.choice(SIZE, rng.integers(1, SIZE), replace=False).tolist()
        history = {"prompt_token_ids": (1, 2), "output_token_ids": (3, 4, 4)}
        sampling = given(place, forbidden_token_ids=(6, 9), **history, **kind)
        slow = np.array([x if i in allowed else -np.inf for i, x in enumerate(row)], np.float64)
        try:
            expected = sample_token(slow, sampling).token_id
        except EngineError:
            with pytest.raises(EngineError):
                sample_token(row, sampling, constraint(allowed))
            continue
        assert expected in allowed
        before = row.copy()
        assert sample_token(row, sampling, constraint(allowed)).token_id == expected
        assert (row == before).all()


def test_all_allowed_is_as_without():
    row = np.random.default_rng(3).standard_normal(SIZE).astype(np.float32)
    for place in range(30):
        free = sample_token(row, given(place, logprobs=2))
        assert sample_token(row, given(place, logprobs=2), constraint(range(SIZE))) == free


def test_logprobs_are_of_the_row_before_the_mask():
    row = np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)
    found = sample_token(row, given(temperature=0, logprobs=3), constraint([8]))
    assert found.token_id == found.logprob.token_id == 8
    assert found.logprob.top[0][0] == int(row.argmax())


def test_ends_before_min_tokens_yield_to_the_grammar():
    """Token 1 ends an answer, and is held back; so is 2, which is a bad word too."""
    row = np.zeros(SIZE, np.float32)
    held = {"forbidden_token_ids": (1, 2), "held_back_token_ids": (1,), "temperature": 0}
    assert sample_token(row, given(**held), constraint([1, 5])).token_id == 5
    assert sample_token(row, given(**held), constraint([1, 2])).token_id == 1
    asked = given(**held, allowed_token_ids=(1, 2))
    assert sample_token(row, asked, constraint([1, 5])).token_id == 1, "5 is not asked for"
    with pytest.raises(EngineError, match="min_tokens and the grammar"):
        sample_token(row, given(**held), constraint([2]))


def test_a_row_that_is_not_finite_is_the_models_failure():
    row = np.zeros(SIZE, np.float32)
    row[7] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        sample_token(row, given(), constraint([5]))


def test_steering_keeps_to_what_the_request_allows():
    row = np.zeros(SIZE, np.float32)
    steered = constraint(range(SIZE), lambda token_id: 9)
    assert sample_token(row, given(temperature=0), steered).token_id == 9
    assert sample_token(row, given(temperature=0, forbidden_token_ids=(9,)), steered).token_id == 0
    asked = given(temperature=0, allowed_token_ids=(0, 4))
    assert sample_token(row, asked, steered).token_id == 0
    found = sample_token(row, given(temperature=0, logprobs=0), steered)
    assert found.logprob.token_id == 9
