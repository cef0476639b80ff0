"""What MODEL may be where no weights are needed: a checkpoint directory, a config.json, a name.

Reads nothing but the config. The named shapes are those of checkpoints/shapes.py, and here
those that are too large to make up; values are those of the published config.json files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duetto.checkpoints.config import ModelConfig, parse_config, read_config
from duetto.checkpoints.json_file import JsonSection, read_json
from duetto.checkpoints.other_formats import directory_of_others, other_format
from duetto.checkpoints.shapes import SHAPES
from duetto.core.errors import ConfigError
from duetto.core.near import near_misses
from duetto.core.speculation import FLAG, DraftModelOptions
from duetto.demo import DEMO_MODELS, demo_model_dir
from duetto.models.programs import build_program
from duetto.program.program import Program

PADDING = 1024  # rows by which models with one tokenizer may differ


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "float16"}
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA_31 = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_8B, _70B = _llama(4096, 14336, 32, 32, 8), _llama(8192, 28672, 80, 64, 8)

LARGE_SHAPES: Mapping[str, Mapping[str, Any]] = {
    # huggingface.co/meta-llama
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32) | _LLAMA_2,
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40) | _LLAMA_2,
    "llama-2-70b": _70B | _LLAMA_2,
    "llama-3-8b": _8B | _LLAMA_3,
    "llama-3-70b": _70B | _LLAMA_3,
    "llama-3.1-8b": _8B | _LLAMA_31,
    "llama-3.1-70b": _70B | _LLAMA_31,
    # huggingface.co/Qwen
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4) | _QWEN_25,
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8) | _QWEN_25,
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8) | _QWEN_25,
    # huggingface.co/bigscience/bloom, for prices only: its MLP is two matrices of 4 · 14336
    # columns, and three of this width hold and cost the same; where ALiBi is, RoPE is priced.
    "bloom-176b": _llama(14336, 38232, 70, 112, 112)
    | {
        "vocab_size": 250880,
        "max_position_embeddings": 2048,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}


def known_models() -> tuple[str, ...]:
    """Every name that needs no file."""
    return (*SHAPES, *LARGE_SHAPES, *DEMO_MODELS)


def find_config(model: str) -> ModelConfig:
    """Raises ConfigError for what is neither a directory with a config.json, nor such a file, nor
    a named shape; CheckpointError for a config that is not supported."""
    path = Path(model)
    if model and path.is_dir():
        if (why := directory_of_others(path)) is not None:
            raise ConfigError(f"{model}: {why}")
        return read_config(path)
    if path.is_file():
        if (why := other_format(model)) is not None:
            raise ConfigError(f"{model}: {why}")
        return parse_config(read_json(path))
    if model in DEMO_MODELS:
        return parse_config(read_json(demo_model_dir(model) / "config.json"))
    shapes = {**SHAPES, **LARGE_SHAPES}
    if model.lower() not in shapes:
        if (why := other_format(model)) is not None:
            raise ConfigError(f"{model}: {why}")
        known = known_models()
        raise ConfigError(
            f"{model or 'an empty name'}: is no checkpoint directory, no config.json and no named "
            f"shape{near_misses(model, known)}; the named shapes are {', '.join(known)}"
        )
    # All were published in 16 bits; where a shape names no dtype, make-model's flag decides.
    shape = {"torch_dtype": "bfloat16", **shapes[model.lower()]}
    return parse_config(JsonSection(path, shape))


def find_program(model: str, max_model_len: int | None = None) -> Program:
    """The program that `find_config` describes; raises as it does, and as build_program."""
    return build_program(find_config(model), max_model_len)


def find_draft_program(options: DraftModelOptions, target: Program) -> Program:
    """The program of a draft model for `target`. Raises ConfigError, naming the flag, for what no
    engine would take."""
    if options.revision is not None:
        raise ConfigError(f"{FLAG}: revision: is for models on the hub, and here only shapes count")
    try:
        draft = find_program(options.model, options.max_model_len)
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: the draft model: {error}") from None
    if abs(draft.vocab_size - target.vocab_size) > PADDING:
        raise ConfigError(
            f"{FLAG}: the draft model {options.model} has {draft.vocab_size} tokens and the model "
            f"{target.vocab_size}; a draft must have the tokenizer of its model"
        )
    return draft
