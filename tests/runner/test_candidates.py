"""What top_k, min_p and top_p leave: numpy is a plain sort, native draws from the same tokens."""

import math

import numpy as np
import pytest

from duetto.backends.cpu.native import native
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.candidates import candidates, largest, lowest, nucleus, set_of_largest, weights

needs_native = pytest.mark.skipif(not gumbel.HAS_NATIVE, reason="no native module")


def rows(rng, size):
    """Logits as of models, flat, hot, of few values, equal, masked, far apart."""
    normal = rng.standard_normal(size)
    yield (normal * rng.choice([1e-3, 0.1, 1, 3, 10, 1e30])).astype(np.float32)
    yield np.round(normal * rng.choice([1, 4])).astype(np.float32)
    yield np.full(size, rng.choice([-3e38, 0, 3e38]), np.float32)
    masked = (normal * 3).astype(np.float32)
    masked[rng.random(size) < rng.choice([0.1, 0.9])] = -np.inf
    masked[rng.integers(size)] = 1.0
    yield masked


def plain_nucleus(logits, temperature, top_p):
    """Sums of Python's whole numbers, which have no largest."""
    order = np.argsort(-logits, kind="stable")
    inverse = min(1 / temperature, 1.7976931348623157e308)
    with np.errstate(over="ignore"):
        each = [int(w) for w in weights((logits - logits.max()) * inverse)]
    kept, ahead, wanted = [], 0, top_p * float(sum(each))
    for i in order.tolist():
        if ahead >= wanted:
            break
        kept.append(i)
        ahead += each[i]
    return sorted(kept)


class TestWeights:
    def test_are_the_exponential_to_half_of_a_2_40th(self):
        gaps = np.concatenate([-np.random.default_rng(0).random(3000) * 40, [-0.0, -1e-300, -28.0]])
        for gap, weight in zip(gaps.tolist(), weights(gaps).tolist(), strict=True):
            exact = math.exp(gap) * 2**40
            assert abs(weight - exact) <= 0.5 + exact * 2**-42

    def test_the_largest_weighs_2_40_and_what_is_far_from_it_nothing(self):
        assert weights(np.array([0.0, -28.5, -64.0, -1e300, -np.inf])).tolist() == [
            2**40,
            0,
            0,
            0,
            0,
        ]

    def test_never_grow_with_the_gap(self):
        each = weights(-np.linspace(0, 30, 100_001)).astype(np.int64)
        assert (np.diff(each) <= 0).all()


class TestTheLargest:
    @pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 5000, 20_000])
    @pytest.mark.parametrize("decimals", [1, 8])
    def test_are_those_of_a_stable_sort(self, size, decimals):
        draw = np.random.default_rng(size)
        values = np.round(draw.standard_normal(size), decimals).astype(np.float32)
        values[draw.random(size) < 0.2] = -np.inf
        order = np.argsort(-values, kind="stable")
        for count in sorted({1, 2, 20, size // 2, size - 1, size} & set(range(1, size + 1))):
            assert list(largest(values, count)) == list(order[:count])
            assert list(set_of_largest(values, count)) == sorted(order[:count])


class TestNucleus:
    @pytest.mark.parametrize("top_p", [5e-324, 0.01, 0.5, 0.9, 0.999, 1 - 1e-12, 1 - 2.0**-53])
    @pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 3000])
    def test_is_the_fewest_of_the_likeliest(self, size, top_p):
        rng = np.random.default_rng(size)
        for row in rows(rng, size):
            logits = row.astype(np.float64)
            for temperature in (5e-324, 0.3, 1.0, 100.0):
                expected = plain_nucleus(logits, temperature, top_p)
                with np.errstate(over="ignore"):
                    assert nucleus(logits, temperature, top_p).tolist() == expected

    def test_holds_what_is_wanted_and_without_its_last_less(self):
        rng = np.random.default_rng(1)
        for top_p in (0.1, 0.5, 0.95, 0.999):
            logits = rng.standard_normal(2000) * 3
            shares = np.exp(logits) / np.exp(logits).sum()
            kept = nucleus(logits, 1.0, top_p)
            assert shares[kept].sum() > top_p - 1e-9
            assert shares[kept].sum() - shares[kept].min() < top_p + 1e-9


@needs_native
class TestNative:
    def drawn(self, row, params, changed, key, isa):
        """From the row, with some of its logits in a list, in any order."""
        left = row.copy()
        left[changed] = -np.inf
        first = int(row.argmax())
        return native.draw_filtered(
            left,
            (float(row[first]), first),
            changed,
            row[changed].astype(np.float64),
            params.temperature,
            params.top_k,
            lowest(float(row[first]), params),
            params.top_p,
            key,
            isa,
        )

    @pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100, 1023, 1025, 5000, 40_001])
    def test_draws_the_token_that_numpy_draws_on_every_instruction_set(self, size):
        rng = np.random.default_rng(size)
        others = 0
        for trial in range(60 if size < 9000 else 4):
            for row in rows(rng, size):
                params = SamplingParams(
                    temperature=float(rng.choice([5e-324, 1e-5, 0.3, 1.0, 1.7, 100.0])),
                    top_k=int(rng.choice([-1, 0, 1, 2, 50, size // 2, max(size - 1, 1), size])),
                    top_p=float(rng.choice([5e-324, 1e-3, 0.3, 0.8, 0.95, 1 - 1e-9, 1.0])),
                    min_p=float(rng.choice([0.0, 0.0, 1e-300, 1e-4, 0.05, 0.9, 1.0])),
                )
                changed = np.flatnonzero(rng.random(size) < rng.choice([0.0, 0.02, 1.0]))
                rng.shuffle(changed)
                key = gumbel.key_of(trial, size)
                token = gumbel.draw_in_numpy(*candidates(row, params), key)
                others += token != row.argmax()
                for isa in native.isas():
                    assert self.drawn(row, params, changed, key, isa) == token
        assert others or size < 10

    def test_keeps_doubles_that_no_float_is(self):
        # Two changed logits between two floats, above all others: the larger one is always drawn.
        row = np.full(64, -np.inf, np.float32)
        ids, logits = np.array([9, 5]), np.array([1.0 + 2e-15, 1.0 + 1e-15])
        for top_k, top_p, least in ((1, 1.0, -math.inf), (0, 1e-9, -math.inf), (0, 1.0, logits[0])):
            for key in range(50):
                args = (row, (logits[0], 9), ids, logits, 1.0, top_k, least, top_p, key)
                assert native.draw_filtered(*args) == 9

    def test_logits_beyond_fp32_are_ranked(self):
        row = np.full(20, -np.inf, np.float32)
        ids = np.arange(3)
        for logits in ([-2e300, -1e300, -3e300], [1e300, 2e300, -1e300]):
            logits = np.array(logits)
            first = (float(logits.max()), int(logits.argmax()))
            for top_k in (0, 1, 2, 3):
                args = (row, first, ids, logits, 1.0, top_k, -math.inf, 0.9, 7)
                assert native.draw_filtered(*args) == first[1]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"first": (1.0, 4)},
            {"first": (1.0, -1)},
            {"first": (math.inf, 0)},
            {"first": (math.nan, 0)},
            {"changed_ids": None},
            {"changed_ids": np.array([0, 1])},
            {"changed_ids": np.array([4])},
            {"changed_ids": np.array([-1])},
            {"temperature": 0.0},
            {"temperature": math.nan},
            {"top_p": 0.0},
            {"lowest": 1.5},
            {"lowest": math.nan},
        ],
        ids=str,
    )
    def test_refuses_what_cannot_be(self, wrong):
        right = {
            "row": np.ones(4, np.float32),
            "first": (1.0, 0),
            "changed_ids": np.array([2]),
            "changed": np.array([0.5]),
            "temperature": 1.0,
            "top_k": 0,
            "lowest": -math.inf,
            "top_p": 1.0,
            "key": 1,
        }
        assert native.draw_filtered(**right) in range(4)
        with pytest.raises(ValueError, match="draw_filtered"):
            native.draw_filtered(**right | wrong)
