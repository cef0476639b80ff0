"""Rotary position embedding: from a config's parameters to the frequencies a program holds.

Formulas are those of transformers' `modeling_rope_utils`, which the published checkpoints were
validated with; they are computed in double precision. Knows no layer and no backend.
"""

import math

from duetto.checkpoints.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from duetto.program.ops import RopeSpec


def rope_spec(rope: RopeConfig, max_model_len: int) -> RopeSpec:
    """The frequencies with which every token of every request is rotated."""
    dim = rope.rotary_dim
    plain = [rope.theta ** (-i / dim) for i in range(0, dim, 2)]
    match rope.scaling:
        case None:
            return RopeSpec(tuple(plain))
        case LinearScaling(factor):
            return RopeSpec(tuple(f / factor for f in plain))
        case Llama3Scaling() as scaling:
            return RopeSpec(tuple(_llama3(f, scaling) for f in plain))
        case YarnScaling() as scaling:
            return RopeSpec(_yarn(plain, rope.theta, scaling), scaling.attention_factor)
        case LongRopeScaling() as scaling:
            # transformers chooses anew for each call, by that call's longest position: a request
            # that grows over the border then mixes keys of both kinds, or is recomputed whole.
            # Chosen once, by the context that is asked for, the same prompt gives the same answer
            # chunked or whole, cached or cold, alone or beside a longer one.
            is_long = max_model_len > scaling.original_length
            factors = scaling.long_factor if is_long else scaling.short_factor
            stretched = tuple(f / factor for f, factor in zip(plain, factors, strict=True))
            return RopeSpec(stretched, scaling.attention_factor)


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_length * frequency / (2 * math.pi)  # over the original context
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _yarn(plain: list[float], theta: float, scaling: YarnScaling) -> tuple[float, ...]:
    dim = 2 * len(plain)

    def dimension_that_turns(times: float) -> float:
        """The (fractional) frequency index that turns so often over the original context."""
        return (
            dim * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = dimension_that_turns(scaling.beta_fast)
    high = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    result = []
    for index, frequency in enumerate(plain):
        interpolated = min(max((index - low) / (high - low), 0.0), 1.0)
        result.append(frequency * (1 - interpolated) + frequency / scaling.factor * interpolated)
    return tuple(result)
