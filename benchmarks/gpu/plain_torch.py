"""What a competent user of plain torch gets: library products and attention, contiguous KV, and a
decode step as one CUDA graph. No paging, no sampler, no promise about bits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from duetto.checkpoints.config import ModelConfig


@dataclass
class _Layer:
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class PlainLlama:
    """Random weights of a llama's shape."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        hidden, inner = config.hidden_size, config.intermediate_size
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim
        width = config.num_heads * config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._layers = [
            _Layer(
                self._matrix(rows, hidden),
                self._matrix(hidden, width),
                self._matrix(2 * inner, hidden),
                self._matrix(hidden, inner),
            )
            for _ in config.layers
        ]
        self._embedding = self._matrix(config.vocab_size, hidden)
        self._head = self._matrix(config.vocab_size, hidden)
        self._ones = torch.ones(hidden, device=device, dtype=dtype)

    def _matrix(self, rows: int, columns: int) -> Tensor:
        found = torch.empty(rows, columns, device=self._device, dtype=self._dtype)
        return found.normal_(0.0, columns**-0.5)

    def decoding(self, batch: int, context: int) -> "PlainDecode":
        return PlainDecode(self, batch, context)

    def normed(self, x: Tensor) -> Tensor:
        return rms_norm(x, (self._config.hidden_size,), self._ones, self._config.rms_norm_eps)


class PlainDecode:
    """A step of `batch` requests, each with its next token at position context - 1."""

    def __init__(self, model: PlainLlama, batch: int, context: int) -> None:
        self._model, self._batch = model, batch
        shape = batch, model._kv_heads, context, model._head_dim
        options = {"device": model._device, "dtype": model._dtype}
        self._keys = [torch.randn(shape, **options) for _ in model._layers]  # type: ignore[call-overload]
        self._values = [torch.randn(shape, **options) for _ in model._layers]  # type: ignore[call-overload]
        self._ids = torch.randint(model._config.vocab_size, (batch,), device=model._device)
        pairs = model._head_dim // 2
        angles = (context - 1) * 5e5 ** (-torch.arange(pairs, device=model._device) / pairs)
        self._cos, self._sin = angles.cos().to(model._dtype), angles.sin().to(model._dtype)

    def __call__(self) -> Tensor:
        """Logits."""
        model = self._model
        x = model._embedding[self._ids]
        heads = [model._heads, model._kv_heads, model._kv_heads]
        for i, layer in enumerate(model._layers):
            rows = (model.normed(x) @ layer.qkv.t()).view(self._batch, -1, 1, model._head_dim)
            q, k, v = rows.split(heads, 1)
            self._keys[i][:, :, -1:], self._values[i][:, :, -1:] = self._turned(k), v
            attended = scaled_dot_product_attention(
                self._turned(q), self._keys[i], self._values[i], enable_gqa=True
            )
            x = x + attended.reshape(self._batch, -1) @ layer.o.t()
            gate, up = (model.normed(x) @ layer.gate_up.t()).chunk(2, -1)
            x = x + (silu(gate) * up) @ layer.down.t()
        return model.normed(x) @ model._head.t()

    def _turned(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        turned = left * self._cos - right * self._sin, left * self._sin + right * self._cos
        return torch.cat(turned, -1)
