"""The operations that models are written in: operands, meaning and price of each.

A buffer is a matrix whose rows are the step's tokens (after SelectRows: the rows whose logits are
wanted); a Ref names some of its columns. T is the number of rows. An operation says what is
computed, never how: backends/reference computes it plainly, other backends may fuse neighbours.

Prices follow the standard counts: 2 FLOPs per multiply-add, causal pairs counted exactly, KV
heads (not query heads) for KV bytes, `head_dim` as configured. What an operation keeps in
registers when fused is priced all the same: prices are for unfused operations.
"""

from dataclasses import dataclass
from typing import Literal

from duetto.program.shape import BatchShape, Cost, Precision

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Ref:
    """Columns [start, start + width) of a buffer."""

    buffer: str
    start: int
    width: int

    def columns(self, start: int, width: int) -> "Ref":
        """Some of these columns."""
        return Ref(self.buffer, self.start + start, width)


def _elementwise(rows: int, read: int, written: int, flops: int, precision: Precision) -> Cost:
    size = precision.activation_bytes
    return Cost(rows * flops, int(rows * read * size), int(rows * written * size))


@dataclass(frozen=True, slots=True)
class Embed:
    """out[t] = weight[token_ids[t]] * scale.  weight: [vocabulary, hidden]."""

    out: Ref
    weight: str
    scale: float = 1.0

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        numbers = shape.num_tokens * self.out.width
        return Cost(
            numbers if self.scale != 1.0 else 0,
            int(numbers * precision.weight_bytes),  # only the rows that are looked up
            int(numbers * precision.activation_bytes),
        )


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """out = x / sqrt(mean(x²) + eps) * (weight + offset), over each run of `group` columns.

    `group` is the whole width for a layer's norm and head_dim for a query or key norm, where one
    weight of that size serves every head. `offset` is 1 in Gemma, whose weights are stored less 1.
    """

    x: Ref
    out: Ref
    weight: str  # [group]
    eps: float
    group: int
    offset: float = 0.0
    after_select: bool = False  # rows are the selected ones

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        rows = shape.num_logit_rows if self.after_select else shape.num_tokens
        cost = _elementwise(rows, self.x.width, self.x.width, 4 * self.x.width, precision)
        return cost + Cost(0, int(self.group * precision.weight_bytes), 0)


@dataclass(frozen=True, slots=True)
class Linear:
    """out = x · weightᵀ (+ bias), or out += ... if `accumulate`.  weight: [out.width, x.width]."""

    x: Ref
    out: Ref
    weight: str
    bias: str | None = None
    accumulate: bool = False
    after_select: bool = False

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        rows = shape.num_logit_rows if self.after_select else shape.num_tokens
        read = self.x.width + (self.out.width if self.accumulate else 0)
        weight = self.x.width * self.out.width + (self.out.width if self.bias else 0)
        cost = _elementwise(
            rows, read, self.out.width, 2 * self.x.width * self.out.width, precision
        )
        return cost + Cost(0, int(weight * precision.weight_bytes) if rows else 0, 0)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotation of pairs (i, i + rotary_dim/2) of each head by position * inv_freq[i].

    Rotary position embedding (Su et al., RoFormer, 2021) in the half-split layout of Hugging Face
    checkpoints. Scaled variants differ only in `inv_freq` and in `scale`, which multiplies sine
    and cosine (YaRN's and LongRoPE's attention factor). Frequencies and the angle, their product
    with the position, are rounded to fp32: that is what checkpoints were validated with.
    """

    inv_freq: tuple[float, ...]  # rotary_dim / 2 of them; columns beyond rotary_dim stay
    scale: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotate each head of x in place by its token's position."""

    x: Ref  # [T, heads * head_dim]
    head_dim: int
    spec: RopeSpec

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.x.width // self.head_dim * self.spec.rotary_dim
        return _elementwise(shape.num_tokens, width, width, 3 * width, precision)


@dataclass(frozen=True, slots=True)
class WriteKV:
    """Store each token's key and value into its slot of `layer`'s cache."""

    k: Ref  # [T, kv_heads * head_dim]
    v: Ref
    layer: int

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        numbers = shape.num_tokens * (self.k.width + self.v.width)
        return Cost(0, int(numbers * precision.activation_bytes), int(numbers * precision.kv_bytes))


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of each token over its own request's KV in `layer`, itself included.

    out = softmax(cap(q · kᵀ * scale)) · v, where cap(s) = softcap * tanh(s / softcap) if given.
    A query at position p sees keys p - window + 1 ... p. Query head h reads KV head
    h // (num_heads // num_kv_heads).
    """

    q: Ref  # [T, num_heads * head_dim]
    out: Ref
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        pairs = sum(r.attended_pairs(self.window) for r in shape.requests)
        read = sum(r.read_tokens(self.window) for r in shape.requests)
        kv_numbers = 2 * read * self.num_kv_heads * self.head_dim
        q_bytes = int(shape.num_tokens * self.q.width * precision.activation_bytes)
        flops_per_pair = self.num_heads * (4 * self.head_dim + 5)  # 5: scale, max, exp, sum, divide
        return Cost(pairs * flops_per_pair, int(kv_numbers * precision.kv_bytes) + q_bytes, q_bytes)


@dataclass(frozen=True, slots=True)
class GatedAct:
    """out = act(x[:, :width]) * x[:, width:], with width = out.width (SwiGLU, GeGLU)."""

    x: Ref  # [T, 2 * width]: gate, then up
    out: Ref
    kind: Activation

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _elementwise(
            shape.num_tokens, self.x.width, self.out.width, 6 * self.out.width, precision
        )


@dataclass(frozen=True, slots=True)
class Add:
    """out = x + y."""

    x: Ref
    y: Ref
    out: Ref

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.out.width
        return _elementwise(shape.num_tokens, 2 * width, width, width, precision)


@dataclass(frozen=True, slots=True)
class SelectRows:
    """out = the rows of x whose logits are wanted, in the batch's order."""

    x: Ref
    out: Ref

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _elementwise(shape.num_logit_rows, self.x.width, self.x.width, 0, precision)


@dataclass(frozen=True, slots=True)
class SoftCap:
    """x = cap * tanh(x / cap), in place, on selected rows (Gemma 2's final logits)."""

    x: Ref
    cap: float

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.x.width
        return _elementwise(shape.num_logit_rows, width, width, 4 * width, precision)


Op = Embed | RmsNorm | Linear | Rope | WriteKV | Attention | GatedAct | Add | SelectRows | SoftCap
