"""Rotary position embedding as a config names it: its kind and its parameters, or a refusal.

What they mean is in models/rope.py. Names and defaults are those of transformers'
`modeling_rope_utils`. Knows no layer and no backend.
"""

import math
from dataclasses import dataclass

from duetto.checkpoints.json_file import JsonSection

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
