"""The shapes of the demo models."""

from dataclasses import dataclass
from typing import Any

HEAD_SIZE = 64  # smaller heads learned to recall far more slowly
ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: multi-head attention, SwiGLU, untied embeddings."""

    width: int
    num_layers: int
    mlp_width: int
    vocab_size: int

    @property
    def num_heads(self) -> int:
        return self.width // HEAD_SIZE

    @property
    def num_parameters(self) -> int:
        layer = 4 * self.width**2 + 3 * self.width * self.mlp_width + 2 * self.width
        return self.num_layers * layer + self.width + 2 * self.vocab_size * self.width

    def config_json(self, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """What config.json says of this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": HEAD_SIZE,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_LENGTH,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": self.vocab_size,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
        }


def named_shape(name: str, vocab_size: int) -> Shape:
    """`reader`, `draft`, or `nano` for tests. Raises KeyError for another name."""
    width, num_layers, mlp_width = {
        "reader": (192, 6, 256),
        "draft": (192, 3, 256),
        "nano": (64, 1, 64),
    }[name]
    return Shape(width, num_layers, mlp_width, vocab_size)
