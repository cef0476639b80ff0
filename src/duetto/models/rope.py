"""Rotary position embedding: from a config's parameters to the frequencies a program holds.

Formulas are those of transformers' `modeling_rope_utils`, which the published checkpoints were
validated with; they are computed in double precision. Knows no layer and no backend.
"""

import math
from dataclasses import dataclass

from duetto.models.json_file import JsonSection
from duetto.program.ops import RopeSpec

# Not "dynamic": its frequencies change as a request grows, so keys in the cache would be of many
# kinds and an answer would depend on how the prompt was cut into chunks.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): all positions shrink by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths shrink by `factor`, short ones stay, between them a ramp."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023), section 3: a ramp over dimensions, and an attention factor."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024): a searched factor per frequency, one set for long contexts."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeConfig:
    theta: float
    rotary_dim: int  # leading columns of each head that turn; even
    scaling: RopeScaling | None = None


def read_rope(
    section: JsonSection,
    *,
    theta: float,
    rotary_dim: int,
    original_length: int | None,
    max_position_embeddings: int,
) -> RopeConfig:
    """Read one rope object of either dialect.

    `theta` stands outside the object in the older dialect. `original_length`, where a config names
    it outside, wins over the one inside. Raises CheckpointError, naming the key.
    """
    theta = section.positive("rope_theta", theta)
    if theta <= 1:
        section.refuse("rope_theta", f"must be above 1, not {theta}")
    if original_length is None:
        original_length = section.integer(
            "original_max_position_embeddings", max_position_embeddings, minimum=2
        )
    scaling: RopeScaling | None = None
    match read_rope_type(section, ROPE_TYPES):
        case "linear":
            scaling = LinearScaling(section.positive("factor"))
        case "llama3":
            scaling = _read_llama3(section, original_length)
        case "yarn":
            scaling = _read_yarn(section, original_length, max_position_embeddings)
        case "longrope":
            num_frequencies = rotary_dim // 2
            scaling = _read_longrope(
                section, original_length, max_position_embeddings, num_frequencies
            )
    return RopeConfig(theta, rotary_dim, scaling)


def read_rope_type(section: JsonSection, accepted: tuple[str, ...]) -> str:
    """`rope_type`, which older configs call `type`; "default" if there is neither."""
    key = "rope_type" if section.get("rope_type") is not None else "type"
    return section.choice(key, accepted, "default")


def _read_llama3(section: JsonSection, original_length: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=section.positive("factor"),
        low_freq_factor=section.positive("low_freq_factor"),
        high_freq_factor=section.positive("high_freq_factor"),
        original_length=original_length,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        section.refuse("high_freq_factor", "must be more than low_freq_factor")
    return scaling


def _read_yarn(
    section: JsonSection, original_length: int, max_position_embeddings: int
) -> YarnScaling:
    factor = section.positive("factor", max_position_embeddings / original_length)
    mscale = section.optional_positive("mscale")
    mscale_all_dim = section.optional_positive("mscale_all_dim")
    if mscale is not None and mscale_all_dim is not None:
        inferred = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        inferred = _yarn_mscale(factor, 1.0)
    scaling = YarnScaling(
        factor=factor,
        original_length=original_length,
        attention_factor=section.positive("attention_factor", inferred),
        beta_fast=section.positive("beta_fast", 32.0),
        beta_slow=section.positive("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
    )
    if scaling.beta_fast < scaling.beta_slow:
        section.refuse("beta_fast", "must be at least beta_slow")
    return scaling


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_longrope(
    section: JsonSection, original_length: int, max_position_embeddings: int, num_frequencies: int
) -> LongRopeScaling:
    factor = section.positive("factor", max_position_embeddings / original_length)
    inferred = 1.0
    if factor > 1:
        inferred = math.sqrt(1 + math.log(factor) / math.log(original_length))
    return LongRopeScaling(
        short_factor=section.positives("short_factor", num_frequencies),
        long_factor=section.positives("long_factor", num_frequencies),
        original_length=original_length,
        attention_factor=section.positive("attention_factor", inferred),
    )


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
