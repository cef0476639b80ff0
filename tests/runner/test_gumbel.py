"""The noise, and that the pruned draws, in numpy and native, are the largest of all scores."""

import math

import numpy as np
import pytest

from duetto.backends.cpu.native import native
from duetto.core.batch import SamplingInput
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.sampler import sample_token

needs_native = pytest.mark.skipif(not gumbel.HAS_NATIVE, reason="no native module")
SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4099]


def plain_draw(scaled, ids, key):
    """Every score, then the largest, the first of equals."""
    return int(ids[(scaled + gumbel.noise(key, ids)).argmax()])


def rows(rng, size):
    """Rows of logits: flat, peaked, equal, masked, far apart."""
    normal = rng.standard_normal(size)
    yield (normal * rng.choice([0.01, 1, 5, 60, 1e30])).astype(np.float32)
    yield np.round(normal).astype(np.float32)
    yield np.full(size, rng.choice([0.0, -3e38, 7.5, 3e38]), np.float32)
    masked = (normal * 3).astype(np.float32)
    masked[rng.random(size) < 0.7] = -np.inf
    masked[rng.integers(size)] = 1.0
    yield masked
    peaked = normal.astype(np.float32)
    peaked[rng.integers(size)] += rng.choice([5.0, 20.0, 26.0, 50.0])
    yield peaked


def cases(seed, sizes, repeats):
    """(row, scaled, temperature, key)"""
    rng = np.random.default_rng(seed)
    for size in sizes:
        for repeat in range(repeats):
            for row in rows(rng, size):
                temperature = float(rng.choice([5e-324, 1e-40, 1e-5, 0.3, 0.8, 1.0, 1.7, 100.0]))
                with np.errstate(over="ignore", under="ignore"):
                    scaled = (row.astype(np.float64) - float(row.max())) / temperature
                yield row, scaled, temperature, gumbel.key_of(int(rng.integers(2**62)), repeat)


class TestNoise:
    @pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -1, -(2**63)])
    @pytest.mark.parametrize("position", [0, 1, 4095, 2**31])
    def test_the_key_is_philox_of_the_paper(self, seed, position):
        # numpy counts up before it draws, so that position 0 is block 1 of the paper's cipher.
        expected = philox4x64(position + 1, seed % 2**128)
        assert gumbel.key_of(seed, position) == gumbel.key_in_numpy(seed, position) == expected

    @needs_native
    def test_the_native_key_is_numpys(self):
        rng = np.random.default_rng(7)
        for seed, position in rng.integers(-(2**62), 2**62, size=(300, 2)).tolist():
            key = gumbel.key_in_numpy(4 * seed, position % 2**40)
            assert gumbel.key_of(4 * seed, position % 2**40) == key

    def test_differs_for_every_accepted_seed_and_position(self):
        seeds = [-(2**63), -1, 0, 1, 2**64 - 1]
        assert len({gumbel.key_of(s, i) for s in seeds for i in range(200)}) == 1000

    def test_the_hash_is_two_rounds_under_two_keys(self):
        def lowbias32(x):
            x = (x ^ x >> 16) * 0x7FEB352D % 2**32
            x = (x ^ x >> 15) * 0x846CA68B % 2**32
            return x ^ x >> 16

        key = 0x0123456789ABCDEF
        ids = np.array([0, 1, 77, 128_255, 2**31 - 1])
        expected = [lowbias32(lowbias32(i ^ 0x89ABCDEF) ^ 0x01234567) for i in ids.tolist()]
        assert gumbel.hashes(key, ids).tolist() == expected
        assert len(set(gumbel.hashes(key, np.arange(100_000)).tolist())) == 100_000

    def test_the_logarithm_is_right_to_a_few_units(self):
        rng = np.random.default_rng(0)
        x = np.concatenate(
            [rng.random(2000), 1 - 2.0**-33 * np.arange(1, 99), 2.0 ** -np.arange(34)]
        )
        expected = np.array([math.log(v) for v in x])
        assert np.abs(gumbel._ln(x) - expected).max() < 1e-14
        away = np.abs(expected) > 0
        assert (np.abs(gumbel._ln(x) / np.where(away, expected, 1) - 1)[away] < 1e-14).all()

    def test_is_gumbel_distributed(self):
        # Kolmogorov and Smirnov: above 2.4 / sqrt(n) once in a hundred thousand keys.
        for key in (1, 2**63 + 12345, gumbel.key_of(0, 0)):
            noise = np.sort(gumbel.noise(key, np.arange(100_000)))
            cumulative = np.exp(-np.exp(-noise))
            distance = np.abs(cumulative - (np.arange(100_000) + 0.5) / 100_000).max()
            assert distance < 2.4 / math.sqrt(100_000)

    def test_of_neighbouring_positions_is_uncorrelated(self):
        ids = np.arange(50_000)
        here = gumbel.noise(gumbel.key_of(5, 10), ids)
        for key in (gumbel.key_of(5, 11), gumbel.key_of(6, 10)):
            assert abs(np.corrcoef(here, gumbel.noise(key, ids))[0, 1]) < 5 / math.sqrt(50_000)

    def test_has_the_bounds_that_pruning_relies_on(self):
        ends = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
        noise = gumbel._noise_of(ends)
        assert noise[0] > -3.14 and noise[-1] < 22.88
        assert (noise <= -np.log((~ends).astype(float) * 2.0**-32 + 2.0**-33)).all()


class TestDraw:
    def test_numpy_is_the_largest_of_all_scores(self):
        for _, scaled, _, key in cases(1, SIZES, 20):
            ids = np.arange(len(scaled))
            assert gumbel.draw_in_numpy(scaled, None, key) == plain_draw(scaled, ids, key)

    def test_does_not_depend_on_other_candidates(self):
        rng = np.random.default_rng(2)
        for _, scaled, _, key in cases(2, [64, 1000], 20):
            token = gumbel.draw(scaled, None, key)
            kept = np.flatnonzero((rng.random(len(scaled)) < 0.3) | (scaled == 0))
            kept = np.union1d(kept, [token])
            assert gumbel.draw(scaled[kept], kept, key) == token

    def test_the_lower_id_wins_among_equal_scores(self, monkeypatch):
        monkeypatch.setattr(gumbel, "hashes", lambda key, ids: np.full(len(ids), 9, np.uint32))
        assert gumbel.draw_in_numpy(np.zeros(5), np.arange(3, 8), 0) == 3

    @needs_native
    def test_native_is_numpy_for_a_whole_row_on_every_instruction_set(self):
        for row, scaled, temperature, key in cases(3, [*SIZES, 32_000], 6):
            token = gumbel.draw_in_numpy(scaled, None, key)
            best = int(row.argmax())
            for isa in native.isas():
                assert native.draw_row(row, best, temperature, key, isa) == token

    @needs_native
    def test_native_is_numpy_at_a_large_vocabulary(self):
        for row, scaled, temperature, key in cases(4, [128_256], 1):
            token = gumbel.draw_in_numpy(scaled, None, key)
            assert native.draw_row(row, int(row.argmax()), temperature, key) == token
            assert native.draw_scaled(scaled, None, key) == token

    @needs_native
    def test_native_is_numpy_for_candidates(self):
        rng = np.random.default_rng(5)
        for _, scaled, _, key in cases(5, SIZES, 20):
            ids = np.flatnonzero((rng.random(len(scaled)) < 0.5) | (scaled == 0))
            expected = gumbel.draw_in_numpy(scaled[ids], ids, key)
            assert native.draw_scaled(scaled[ids], ids, key) == expected

    @needs_native
    def test_native_noise_is_the_same_bits(self):
        ids = np.random.default_rng(6).integers(2**31, size=2000)
        for key in (0, 2**64 - 1, gumbel.key_of(8, 8)):
            expected = gumbel.noise(key, ids).tolist()
            assert [native.gumbel_noise(key, i) for i in ids.tolist()] == expected

    @needs_native
    @pytest.mark.parametrize(
        "call",
        [
            lambda row: native.draw_row(row, 4, 1.0, 0),
            lambda row: native.draw_row(row, -1, 1.0, 0),
            lambda row: native.draw_row(row, 0, 0.0, 0),
            lambda row: native.draw_row(row, 0, math.nan, 0),
            lambda row: native.draw_scaled(np.zeros(0), None, 0),
            lambda row: native.draw_scaled(np.zeros(2), np.arange(3), 0),
        ],
    )
    def test_native_refuses_what_cannot_be(self, call):
        with pytest.raises(ValueError, match="draw_"):
            call(np.zeros(4, np.float32))


@needs_native
class TestFiniteArgmax:
    def test_is_numpys(self):
        for row, _, _, _ in cases(7, SIZES, 10):
            for isa in native.isas():
                assert native.finite_argmax(row, isa) == row.argmax()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
    def test_tells_what_is_not_finite_wherever_it_is(self, bad):
        for size in SIZES:
            for at in {0, size // 2, size - 1}:
                row = np.linspace(-5, 5, size, dtype=np.float32)
                row[at] = bad
                for isa in native.isas():
                    assert native.finite_argmax(row, isa) == -1
        for isa in native.isas():
            assert native.finite_argmax(np.full(70, -np.inf, np.float32), isa) == -1


@needs_native
def test_a_sampled_token_is_the_same_with_and_without_the_native_module(monkeypatch):
    def outcome(row, sampling):
        try:
            return sample_token(row, sampling)
        except EngineError as error:
            return str(error)

    rng = np.random.default_rng(9)
    pairs = []
    for row, _, temperature, _ in cases(9, [1, 2, 40, 300, 3001], 25):
        size = len(row)

        def ids(at_most, size=size):
            return tuple(rng.integers(size, size=int(rng.integers(at_most))).tolist())

        def maybe(value, default):
            return value if rng.random() < 0.3 else default

        params = SamplingParams(
            temperature=float(rng.choice([0.0, min(temperature, 100.0)])),
            top_k=int(rng.choice([0, 0, 1, size // 2, size, size + 1])),
            top_p=float(rng.choice([1e-9, 0.5, 0.95, 0.999, 1.0, 1.0])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
            presence_penalty=maybe(1.0, 0.0),
            frequency_penalty=maybe(-0.2, 0.0),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.3, 1e-308])),
            logit_bias=maybe({i: float(rng.uniform(-90, 90)) for i in ids(5)}, {}),
            allowed_token_ids=maybe((*ids(50), size - 1), None),
        )
        if rng.random() < 0.1:
            row[rng.integers(size)] = rng.choice([np.nan, np.inf])
        history = maybe(ids(9), ()), ids(9), ids(30)
        pairs.append((row, SamplingInput(params, int(rng.integers(99)), 3, *history)))
    fast = [outcome(*pair) for pair in pairs]
    monkeypatch.setattr(gumbel, "HAS_NATIVE", False)
    assert fast == [outcome(*pair) for pair in pairs]
    assert len({str(each) for each in fast}) > 80


def philox4x64(counter, key, rounds=10):
    """First word of Philox4x64-10 of (counter, 0, 0, 0), from figure 4 and table 2 of the paper."""
    mask = 2**64 - 1
    words = [counter & mask, counter >> 64, 0, 0]
    key_words = [key & mask, key >> 64]
    for _ in range(rounds):
        product_0 = 0xD2E7470EE14C6C93 * words[0]
        product_1 = 0xCA5A826395121157 * words[2]
        words = [
            (product_1 >> 64) ^ words[1] ^ key_words[0],
            product_1 & mask,
            (product_0 >> 64) ^ words[3] ^ key_words[1],
            product_0 & mask,
        ]
        key_words[0] = (key_words[0] + 0x9E3779B97F4A7C15) & mask
        key_words[1] = (key_words[1] + 0xBB67AE8584CAA73B) & mask
    return words[0]
