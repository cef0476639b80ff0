"""config.json and generation_config.json, read into one normal form or refused by name.

Two dialects are read: `rope_theta` with `rope_scaling` and `torch_dtype`, as most published
checkpoints have it, and `rope_parameters` with `dtype`, as transformers 5 writes it. What a key
that is absent means is what it means to transformers. Knows no weights and no operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, cast

from duetto.checkpoints.checkpoint_file import is_there
from duetto.checkpoints.json_file import MAX_INTEGER, JsonSection, read_json
from duetto.checkpoints.rope import (
    LinearScaling,
    RopeConfig,
    YarnScaling,
    read_rope,
    read_rope_type,
)
from duetto.checkpoints.weight_files import adapter_in
from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.program.dtype import DTYPES, Dtype
from duetto.program.ops import Activation

MAX_LAYERS, MAX_HEAD_DIM = 4096, 4096  # a config beyond them is a slip, and would fill the memory
MAX_WIDTH = 2**24  # of a vector or a vocabulary; the largest published ones are below 2**19

FULL, SLIDING = "full_attention", "sliding_attention"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# What transformers takes for a key that a config of this type leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
MODEL_TYPES = tuple(_DEFAULTS)

# Keys that change the model in a way that is not computed here, for all types and for one type:
# absent, null, false or empty is accepted, anything else is refused.
_REFUSED_KEYS = ("quantization_config", "use_bidirectional_attention")
_REFUSED_KEYS_OF: dict[str, tuple[str, ...]] = {
    "llama": ("sliding_window",),
    "mistral": ("attention_bias", "mlp_bias", "layer_types"),
    "phi3": ("attention_bias", "mlp_bias"),
    "gemma3_text": ("attn_logit_softcapping",),
}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    window: int | None  # a token sees this many, itself included; None: all before it
    rope: RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape, complete: nothing is left to a default."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    context_length: int  # positions, rope scaling included
    rms_norm_eps: float
    activation: Activation
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    dtype: Dtype | None  # of the weights, where config.json says it
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the checkpoint's authors recommend, as SamplingParams has it; None: they say nothing."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_config(model_dir: Path) -> ModelConfig:
    """Raises CheckpointError if config.json is missing, malformed or not supported."""
    file = model_dir / "config.json"
    if not is_there(file) and (adapter := adapter_in(model_dir)) is not None:
        raise adapter
    return parse_config(read_json(file))


def read_generation_config(model_dir: Path) -> GenerationDefaults:
    """generation_config.json, or nothing but Nones if the checkpoint has none.

    Raises CheckpointError, naming the key, for a value that no request could have.
    """
    file = model_dir / "generation_config.json"
    if not is_there(file):
        return GenerationDefaults()
    section = read_json(file)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    recommended = {name: section.get(name) for name in names if section.get(name) is not None}
    try:
        SamplingParams(**recommended)
    except InvalidRequest as error:
        section.refuse(error.field, error.message)
    if not section.flag("do_sample", True):
        recommended["temperature"] = 0.0
    return GenerationDefaults(eos_token_ids=section.token_ids("eos_token_id"), **recommended)


def parse_config(section: JsonSection) -> ModelConfig:
    """The normal form of one config.json. Raises CheckpointError, naming the key."""
    model_type = section.choice("model_type", MODEL_TYPES)
    config = _with_defaults(section, model_type)
    _refuse_what_is_not_computed(config, model_type)

    num_heads, num_kv_heads, head_dim = _heads(config)
    _refuse_what_no_memory_holds(config, num_heads * head_dim)
    ropes = _ropes(config, model_type, head_dim)
    layers = tuple(
        LayerConfig(config.integer("sliding_window") if kind == SLIDING else None, ropes[kind])
        for kind in _layer_kinds(config, model_type)
    )
    activation_key = "hidden_activation" if model_type.startswith("gemma") else "hidden_act"
    bos_token_ids = config.token_ids("bos_token_id")
    return ModelConfig(
        model_type=model_type,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=layers,
        context_length=_context_length(config, model_type, ropes[FULL]),
        rms_norm_eps=config.positive("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[config.choice(activation_key, tuple(_ACTIVATIONS), "silu")],
        attention_scale=config.positive("query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=config.optional_positive("attn_logit_softcapping"),
        final_softcap=config.optional_positive("final_logit_softcapping"),
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        dtype=_dtype(config),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )


def _with_defaults(section: JsonSection, model_type: str) -> JsonSection:
    # A key written as null means none (no window, no cap): it must not turn into the default.
    # head_dim is the exception, whose null means hidden_size / num_attention_heads.
    values: Mapping[str, Any] = _DEFAULTS[model_type] | dict(section.values)
    return JsonSection(section.file, values)


def _refuse_what_is_not_computed(config: JsonSection, model_type: str) -> None:
    for key in (*_REFUSED_KEYS, *_REFUSED_KEYS_OF.get(model_type, ())):
        if config.get(key):
            config.refuse(
                key, f"is not supported for model_type {model_type}; accepted: null, or left out"
            )


def _heads(config: JsonSection) -> tuple[int, int, int]:
    """Query heads, key and value heads, columns of each."""
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse(
            "num_attention_heads",
            f"{num_heads} is not a multiple of num_key_value_heads, {num_kv_heads}",
        )
    if config.get("head_dim") is None and hidden_size % num_heads:
        config.refuse(
            "hidden_size", f"{hidden_size} is not a multiple of num_attention_heads, {num_heads}"
        )
    head_dim = config.integer("head_dim", hidden_size // num_heads, maximum=MAX_HEAD_DIM)
    return num_heads, num_kv_heads, head_dim


def _refuse_what_no_memory_holds(config: JsonSection, head_columns: int) -> None:
    """Sizes that only a slip can have, before anything is laid out for them."""
    sizes = {key: config.integer(key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    for key, size in (sizes | {"num_attention_heads": head_columns}).items():
        if size > MAX_WIDTH:
            of_heads = "" if key in sizes else " columns, with head_dim"
            config.refuse(
                key, f"{size}{of_heads} is more than any model has; accepted: up to {MAX_WIDTH}"
            )


def _layer_kinds(config: JsonSection, model_type: str) -> list[str]:
    """For each layer, whether it sees all tokens before its own or a window of them."""
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if model_type == "llama":
        return [FULL] * num_layers
    if model_type in ("mistral", "phi3"):
        return [FULL if config.get("sliding_window") is None else SLIDING] * num_layers
    kinds = config.get("layer_types")
    if kinds is not None:
        return _checked_layer_types(config, kinds, num_layers)
    if model_type in ("qwen2", "qwen3"):
        if not config.flag("use_sliding_window", False) or config.get("sliding_window") is None:
            return [FULL] * num_layers
        first = config.integer("max_window_layers", minimum=0)
        return [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    # Gemma: every pattern-th layer is full.
    key = "_sliding_window_pattern"
    pattern = 2
    if model_type == "gemma3_text":
        key = key if config.get(key) is not None else "sliding_window_pattern"
        pattern = config.integer(key, 6)
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers)]


def _checked_layer_types(config: JsonSection, kinds: object, num_layers: int) -> list[str]:
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        config.refuse("layer_types", f"must be a list of num_hidden_layers, {num_layers}, entries")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            accepted = f"{FULL}, {SLIDING}"
            config.refuse("layer_types", f"{shown(kind)} is not supported; accepted: {accepted}")
    # Qwen's switch turns windows off wherever else they are named.
    if SLIDING in kinds and config.get("use_sliding_window") is False:
        config.refuse("layer_types", f"has {SLIDING}, but use_sliding_window is false")
    return kinds


def _ropes(config: JsonSection, model_type: str, head_dim: int) -> dict[str, RopeConfig]:
    """One rope for each kind of layer; they differ in Gemma 3 only."""
    max_position_embeddings = config.integer("max_position_embeddings")
    parameters = config.section("rope_parameters") or config.section("rope_scaling")
    parameters = parameters or JsonSection(config.file, {})
    theta = config.positive("rope_theta", 10_000.0)

    def read(section: JsonSection, theta: float) -> RopeConfig:
        return read_rope(
            _as_longrope(section) if model_type == "phi3" else section,
            theta=theta,
            rotary_dim=_rotary_dim(config, section, model_type, head_dim),
            original_length=None
            if config.get("original_max_position_embeddings") is None
            else config.integer("original_max_position_embeddings", minimum=2),
            max_position_embeddings=max_position_embeddings,
        )

    if model_type != "gemma3_text":
        rope = read(_flat(parameters), theta)
        return {FULL: rope, SLIDING: rope}
    local_theta = config.positive("rope_local_base_freq")
    if parameters.section(FULL) is None and parameters.section(SLIDING) is None:
        # The older dialect: what is scaled are the full layers only.
        return {FULL: read(parameters, theta), SLIDING: RopeConfig(local_theta, head_dim)}
    empty = JsonSection(config.file, {})
    return {
        FULL: read(parameters.section(FULL) or empty, theta),
        SLIDING: read(parameters.section(SLIDING) or empty, local_theta),
    }


def _flat(parameters: JsonSection) -> JsonSection:
    for kind in (FULL, SLIDING):
        if parameters.get(kind) is not None:
            parameters.refuse(kind, "one rope per kind of layer is supported for gemma3_text only")
    return parameters


def _as_longrope(section: JsonSection) -> JsonSection:
    """Phi-3's first configs call LongRoPE "su" or "yarn"."""
    values = dict(section.values)
    if read_rope_type(section, ("default", "longrope", "su", "yarn")) in ("su", "yarn"):
        values["rope_type"] = "longrope"
    return JsonSection(section.file, values, section.prefix)


def _rotary_dim(config: JsonSection, section: JsonSection, model_type: str, head_dim: int) -> int:
    holder = section if section.get("partial_rotary_factor") is not None else config
    factor = holder.positive("partial_rotary_factor", 1.0)
    if factor > 1 or (factor != 1 and model_type != "phi3"):
        holder.refuse("partial_rotary_factor", f"{factor} is not supported; accepted: 1")
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or rotary_dim < 2:
        config.refuse(
            "head_dim", f"{rotary_dim} columns are to be rotated; they must come in pairs"
        )
    return rotary_dim


def _context_length(config: JsonSection, model_type: str, rope: RopeConfig) -> int:
    """Linear and YaRN scaling multiply what max_position_embeddings says; the others include it."""
    length = config.integer("max_position_embeddings")
    if model_type == "gemma3_text":  # whose linear scaling is included
        return length
    match rope.scaling:
        case LinearScaling(factor):
            scaled = int(length * factor)
        case YarnScaling() as yarn:
            scaled = max(length, int(yarn.original_length * yarn.factor))
        case _:
            return length
    if scaled > MAX_INTEGER:
        what = f"rope scaling makes {length} to {scaled:g}; accepted: up to {MAX_INTEGER}"
        config.refuse("max_position_embeddings", what)
    return scaled


def _dtype(config: JsonSection) -> Dtype | None:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    if config.get(key) is None:
        return None
    return cast(Dtype, config.choice(key, DTYPES))
