"""A Llama in torch, for training: tensors are named as in a Hugging Face checkpoint.

Knows no tokenizer and no data. A position may attend to those that `mask` says, so one sequence can
hold one set of documents and many questions that do not see each other.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.shapes import HEAD_SIZE, NORM_EPS, ROPE_THETA, Shape

HEAD_SCALE = 0.05  # of the embeddings, in the head at the start
COPY_SCALE = 0.5  # of what a head attends to


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.model.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.model.norm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self._initialize()

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Logits [wanted, vocabulary] of the places in the flattened batch that `wanted` lists.

        ids, positions: [batch, length]. mask: [batch, 1, length, length], True where a row may see
        a column.
        """
        hidden = self.model.embed_tokens(ids)
        rotation = _rotation(positions)
        *first, last = self.model.layers
        for layer in first:
            hidden = layer(hidden, rotation, mask)
        chosen = last(hidden, rotation, mask, wanted)
        logits: Tensor = self.lm_head(self.model.norm(chosen))
        return logits

    @torch.no_grad()
    def _initialize(self) -> None:
        """Copying from the start: what a head attends to it adds to the stream as it is (values and
        outputs are transposes), and the last layer reads tokens off the stream by the embeddings
        themselves. Trials learned recall in half the tokens of random matrices so.

        Embeddings have standard deviation 1: with 0.02, recall stayed at chance.
        """
        for weight in self.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
        embedding = self.model.embed_tokens.weight.normal_(0.0, 1.0)
        self.lm_head.weight.copy_(HEAD_SCALE * (embedding - embedding.mean(0)))
        for layer in self.model.layers:
            values = nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(COPY_SCALE * values.T)
            layer.mlp.down_proj.weight.mul_((2 * self.shape.num_layers) ** -0.5)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=NORM_EPS)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """`wanted`: only these places of the flattened batch go on, as nobody reads the others."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, mask)
        if wanted is not None:
            hidden = hidden.flatten(0, 1)[wanted]
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.width, bias=False))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, width] to [batch, heads, length, head size]."""
        return x.unflatten(2, (self.num_heads, HEAD_SIZE)).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def _rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch, 1, length, head size] of RoPE, in halves as in Hugging Face."""
    exponents = torch.arange(0, HEAD_SIZE, 2, device=positions.device) / HEAD_SIZE
    angles = positions[:, None, :, None].float() * ROPE_THETA**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
