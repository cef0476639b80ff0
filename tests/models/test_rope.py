"""Frequencies at the points where each formula can be worked out by hand.

Whole sets of them are compared with transformers' own in tests/oracle/test_rope_live.py.
"""

import math

import pytest

from duetto.checkpoints.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from duetto.models.rope import rope_spec


def test_default() -> None:
    spec = rope_spec(RopeConfig(10_000.0, 8), 100)
    assert spec.inv_freq == pytest.approx([1, 0.1, 0.01, 0.001])
    assert (spec.scale, spec.rotary_dim) == (1.0, 8)


def test_linear_shrinks_every_position() -> None:
    spec = rope_spec(RopeConfig(10_000.0, 8, LinearScaling(4.0)), 100)
    assert spec.inv_freq == pytest.approx([0.25, 0.025, 0.0025, 0.00025])


def test_llama3_keeps_short_waves_and_shrinks_long_ones() -> None:
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    spec = rope_spec(RopeConfig(500_000.0, 128, scaling), 131_072)
    plain = [500_000.0 ** (-i / 64) for i in range(64)]
    assert spec.inv_freq[0] == 1.0
    assert spec.inv_freq[-1] == pytest.approx(plain[-1] / 8)
    ramp = [a / b for a, b in zip(spec.inv_freq, plain, strict=True)]
    assert ramp == sorted(ramp, reverse=True)
    assert sum(ratio * (1 - 1e-9) > 1 / 8 and ratio < 1 - 1e-9 for ratio in ramp) > 3


def test_llama3_in_the_middle_of_the_ramp() -> None:
    # 2.5 turns over the original context is half way from 1 to 4: half kept, half shrunk.
    original = 100
    theta = (2.5 * 2 * math.pi / original) ** -2  # the frequency of index 1 of 2 is 1 / sqrt(theta)
    spec = rope_spec(RopeConfig(theta, 4, Llama3Scaling(8.0, 1.0, 4.0, original)), 100)
    plain = 2.5 * 2 * math.pi / original
    assert spec.inv_freq[1] == pytest.approx(plain * (0.5 + 0.5 / 8))


def test_yarn_keeps_the_fast_shrinks_the_slow_and_scales_attention() -> None:
    scaling = YarnScaling(4.0, 4096, 0.1 * math.log(4) + 1, 32.0, 1.0, True)
    spec = rope_spec(RopeConfig(10_000.0, 128, scaling), 16_384)
    plain = [10_000.0 ** (-i / 64) for i in range(64)]
    # Indices that turn 32 times and once over 4096 tokens: 20.94 -> 20 and 45.03 -> 46.
    assert spec.inv_freq[:21] == pytest.approx(plain[:21], rel=1e-12)
    assert spec.inv_freq[21] < plain[21] * (1 - 1e-3)
    assert spec.inv_freq[46:] == pytest.approx([f / 4 for f in plain[46:]])
    assert spec.inv_freq[45] > plain[45] / 4 * (1 + 1e-3)
    assert spec.scale == pytest.approx(1.1386294)


@pytest.mark.parametrize(("max_model_len", "factor"), [(64, 2.0), (65, 5.0)])
def test_longrope_is_chosen_once_by_the_longest_request(max_model_len: int, factor: float) -> None:
    scaling = LongRopeScaling((2.0, 2.0), (5.0, 5.0), 64, 1.25)
    spec = rope_spec(RopeConfig(10_000.0, 4, scaling), max_model_len)
    assert spec.inv_freq == pytest.approx([1 / factor, 0.01 / factor])
    assert spec.scale == 1.25
