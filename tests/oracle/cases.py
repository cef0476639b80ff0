"""Every variant of every model type that is compared with transformers: the one list of them.

Tiny, so that the comparison takes no time, but past every border that matters: windows of 48 and
original contexts of 64 or 128 tokens, with prompts of up to 300 and 64 more.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 199
PROMPT_LENGTHS = (1, 2, 31, 32, 33, 300)
NUM_GREEDY = 64

_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_LONG_FACTOR = [1.0, 1.3, 1.9, 2.7, 4.0, 6.1, 8.5, 12.0]
_SHORT_FACTOR = [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.6]


def _longrope(num_frequencies: int = 8) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": _SHORT_FACTOR[:num_frequencies],
        "long_factor": _LONG_FACTOR[:num_frequencies],
    }


@dataclass(frozen=True, eq=False)  # by identity, so that what a case gives can be cached
class Case:
    name: str
    model_type: str
    config: dict[str, Any]  # keyword arguments of transformers' config class, beside _TINY
    dtype: str = "float32"  # of the checkpoint; computation is always in float32
    num_shards: int = 1
    max_model_len: int = 512
    seed: int = 0  # chosen so that greedy tokens are clear: see make_fixtures.py
    # What transformers is told beside: it takes LongRoPE's long factors only for a call that is
    # long itself, so to see them at every length it is given them as the short ones too.
    oracle_rope: dict[str, Any] = field(default_factory=dict)

    @property
    def full_config(self) -> dict[str, Any]:
        return _TINY | self.config

    @property
    def is_tied(self) -> bool:
        return bool(self.full_config["tie_word_embeddings"])


CASES = (
    Case("llama", "llama", {}, seed=1),
    Case(
        "llama-linear",
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "linear", "factor": 8.0},
        },
        seed=5,
    ),
    Case(
        "llama-yarn",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 4.0,
            }
        },
    ),
    Case(
        "llama-llama3",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        seed=1,
    ),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-mqa", "llama", {"num_key_value_heads": 1}),
    Case("llama-mha", "llama", {"num_key_value_heads": 4}),
    Case("llama-head-dim", "llama", {"head_dim": 24}),
    Case("llama-bfloat16", "llama", {}, dtype="bfloat16", seed=2),
    Case("llama-float16-sharded", "llama", {}, dtype="float16", num_shards=3),
    Case("mistral-window", "mistral", {"sliding_window": 48}),
    Case("mistral-full", "mistral", {"sliding_window": None, "head_dim": 24}),
    Case("qwen2", "qwen2", {"tie_word_embeddings": True}, seed=11),
    Case(
        "qwen2-window",
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 48,
            "max_window_layers": 1,
        },
    ),
    Case("qwen3", "qwen3", {"head_dim": 24}),
    Case(
        "qwen3-biases-window",
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 48,
            "max_window_layers": 1,
        },
    ),
    Case("phi3", "phi3", {"sliding_window": 48}, seed=1),
    Case(
        "phi3-longrope-short",
        "phi3",
        {
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "rope_parameters": _longrope(),
        },
        seed=1,
    ),
    Case(
        "phi3-longrope-long",
        "phi3",
        {
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 64,
            "rope_parameters": _longrope(),
        },
        oracle_rope={"short_factor": _LONG_FACTOR},
    ),
    Case(
        "phi3-partial-rotary",
        "phi3",
        {
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "rope_parameters": _longrope(4) | {"partial_rotary_factor": 0.5},
        },
        seed=1,
    ),
    Case(
        "gemma2",
        "gemma2",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 48,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 12.0,
        },
    ),
    Case(
        "gemma3_text",
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        seed=1,
    ),
)
CASES_BY_NAME = {case.name: case for case in CASES}


def prompts() -> list[list[int]]:
    """The prompts that every case is asked, one of each length."""
    random = np.random.RandomState(2024)
    return [random.randint(0, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]


def random_tensor(case: Case, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight that every machine draws alike, so that no weight has to be stored.

    RandomState's stream is frozen, and uniform numbers need no function that libraries round
    differently. Scales are such that every operation shows in the logits, and that the likeliest
    token stands clear of the next.
    """
    seed = zlib.crc32(f"{case.name}/{case.seed}/{name}".encode())
    uniform = np.random.RandomState(seed).random_sample(shape)
    unit = (uniform - 0.5) * np.sqrt(12.0)  # mean 0, variance 1
    return (_mean(case, name) + _deviation(case, name, shape) * unit).astype(np.float32)


def _mean(case: Case, name: str) -> float:
    """Of norm weights, that is: around 1, or around 3 where strength is needed.

    Tied embeddings are drawn small, so that a token's own embedding does not decide which comes
    next; the final norm makes up for it in the logits. Gemma norms its branches, which would drown
    beside its scaled embeddings, and stores its norm weights less one.
    """
    if not name.endswith("norm.weight"):
        return 0.0
    is_gemma = case.model_type.startswith("gemma")
    is_strong = (is_gemma and "post_" in name) or (case.is_tied and name == "model.norm.weight")
    return (3.0 if is_strong else 1.0) - is_gemma


def _deviation(case: Case, name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("norm.weight"):
        return 0.2
    if name.endswith(".bias"):
        return 0.3
    if "embed_tokens" in name or "lm_head" in name:
        return 0.12 if case.is_tied else 0.4
    gain = 2.0 if "down_proj" in name or "o_proj" in name else 1.0
    return gain / float(np.sqrt(shape[-1]))
