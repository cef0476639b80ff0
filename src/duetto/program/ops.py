"""The operations that models are written in: operands, meaning and price of each.

A buffer is a matrix whose rows are the step's tokens (after SelectRows: the rows whose logits are
wanted); a Ref names some of its columns. T is the number of rows. An operation says what is
computed, never how: backends/reference computes it plainly, other backends may fuse neighbours.

Prices follow the standard counts: 2 FLOPs per multiply-add, causal pairs counted exactly, KV
heads (not query heads) for KV bytes, `head_dim` as configured. What an operation keeps in
registers when fused is priced all the same: prices are for unfused operations.

To add an operation: a class here, and a line in the table of each backend that has kernels for it
(backends/reference/ops.py, backends/cpu/compile.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from duetto.core.errors import ConfigError
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.cut import Cut, Piece
from duetto.program.op import Kind, KVAccess
from duetto.program.op import Op as Op
from duetto.program.op import Ref as Ref
from duetto.program.shape import ALL, SELECTED, BatchShape, Cost, Precision, Rows, num_rows

if TYPE_CHECKING:
    from duetto.program.program import Program

Activation = Literal["silu", "gelu_tanh"]


def _elementwise(rows: int, read: int, written: int, flops: int, precision: Precision) -> Cost:
    size = precision.activation_bytes
    return Cost(rows * flops, int(rows * read * size), int(rows * written * size))


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """out[t] = weight[token_ids[t]] * scale.  weight: [vocabulary, hidden]."""

    out: Ref
    weight: str
    scale: float = 1.0

    kind: ClassVar[Kind] = "embed"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return ()

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        numbers = shape.num_tokens * self.out.width
        return Cost(
            numbers if self.scale != 1.0 else 0,
            int(numbers * precision.weight_bytes),  # only the rows that are looked up
            int(numbers * precision.activation_bytes),
        )

    def share(self, cut: Cut) -> tuple[Op, ...]:
        """Each rank looks up the tokens that it has, as many as of the logits."""
        first = cut.take_result_rows(self.weight).start
        part = EmbedPart(self.out, self.weight, self.scale, first)
        return part, AllReduce(self.out, cut.ranks)


@dataclass(frozen=True, slots=True)
class EmbedPart(Embed):
    """As Embed, of a table that begins with token `first`; 0 for tokens that it does not have."""

    first: int = 0

    def label(self, program: "Program") -> str:
        return Embed(self.out, self.weight).label(program)


@dataclass(frozen=True, slots=True)
class RmsNorm(Op):
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
    rows: Rows = ALL

    kind: ClassVar[Kind] = "norm"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)

    @property
    def initial(self) -> Mapping[str, float]:
        return {self.weight: 1.0 - self.offset}

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        rows = num_rows(shape, self.rows)
        cost = _elementwise(rows, self.x.width, self.x.width, 4 * self.x.width, precision)
        return cost + Cost(0, int(self.group * precision.weight_bytes), 0)

    def label(self, program: "Program") -> str:
        del program
        return self.weight.split(".")[-2]

    def share(self, cut: Cut) -> tuple[Op, ...]:
        """Every rank computes it, of the groups that it has."""
        cut.keep(self.weight)
        if cut.has(self.x) != cut.has(self.out):
            raise ConfigError(f"--tp: {self.weight} reads and writes columns that are cut unlike")
        if not cut.has(self.x):
            return (self,)
        x, out = cut.own(self.x), cut.own(self.out)
        if x.width % self.group:
            raise ConfigError(f"--tp: {self.weight} needs whole rows; accepted: --tp 1")
        return (replace(self, x=x, out=out),)


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """out = x · weightᵀ (+ bias), or out += ... if `accumulate`.  weight: [out.width, x.width]."""

    x: Ref
    out: Ref
    weight: str
    bias: str | None = None
    accumulate: bool = False
    rows: Rows = ALL

    kind: ClassVar[Kind] = "linear"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x, self.out) if self.accumulate else (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        rows = num_rows(shape, self.rows)
        read = self.x.width + (self.out.width if self.accumulate else 0)
        weight = self.x.width * self.out.width + (self.out.width if self.bias else 0)
        cost = _elementwise(
            rows, read, self.out.width, 2 * self.x.width * self.out.width, precision
        )
        return cost + Cost(0, int(weight * precision.weight_bytes) if rows else 0, 0)

    def label(self, program: "Program") -> str:
        """The modules of the checkpoint that it is made of, such as q+k+v_proj."""
        if self.out.buffer == program.logits.buffer:
            return "lm_head"
        modules = [source.split(".")[-2] for source in program.weights[self.weight].sources]
        return "+".join([m.removesuffix("_proj") for m in modules[:-1]] + modules[-1:])

    def share(self, cut: Cut) -> tuple[Op, ...]:
        """By rows of the weight where its result is cut, and the result is gathered if it is the
        program's; by columns where its input is cut, with the sum over ranks behind it."""
        if cut.has(self.x):
            return self._share_of_sum(cut)
        if self.out == cut.result and not self.accumulate:
            part = cut.own_result()
            for weight in self.weights:
                cut.take_result_rows(weight)
            return replace(self, out=part), AllGather(part, self.out, cut.ranks, self.rows)
        if not cut.has(self.out):
            for weight in self.weights:
                cut.keep(weight)
            return (self,)
        for weight in self.weights:
            cut.take_rows(weight, self.out)
        return (replace(self, out=cut.own(self.out)),)

    def _share_of_sum(self, cut: Cut) -> tuple[Op, ...]:
        """The first rank alone adds the bias and what was there."""
        if cut.has(self.out):
            raise ConfigError(f"--tp: {self.weight} reads and writes columns that are cut")
        is_first = cut.rank == 0
        own = replace(
            self,
            x=cut.own(self.x),
            bias=self.bias if is_first else None,
            accumulate=self.accumulate and is_first,
        )
        cut.take_columns(self.weight, self.x)
        if own.bias is not None:
            cut.keep(own.bias)
        return own, AllReduce(self.out, cut.ranks, self.rows)


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
class Rope(Op):
    """Rotate each head of x in place by its token's position."""

    x: Ref  # [T, heads * head_dim]
    head_dim: int
    spec: RopeSpec

    kind: ClassVar[Kind] = "rope"
    by_columns: ClassVar[bool] = True  # of whole heads, as queries and keys are cut

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.x,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.x.width // self.head_dim * self.spec.rotary_dim
        return _elementwise(shape.num_tokens, width, width, 3 * width, precision)


@dataclass(frozen=True, slots=True)
class WriteKV(Op):
    """Store each token's key and value into its slot of `layer`'s cache."""

    k: Ref  # [T, kv_heads * head_dim]
    v: Ref
    layer: int

    kind: ClassVar[Kind] = "copy"
    by_columns: ClassVar[bool] = True  # of whole heads

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.k, self.v)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return ()

    @property
    def kv(self) -> KVAccess:
        return KVAccess(self.layer, writes=True)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        numbers = shape.num_tokens * (self.k.width + self.v.width)
        return Cost(0, int(numbers * precision.activation_bytes), int(numbers * precision.kv_bytes))

    def pieces(self, program: "Program") -> tuple[Piece, ...]:
        """KV heads; those that are fewer than the ranks are kept by several of them."""
        heads = program.kv[self.layer].num_kv_heads
        return Piece(self.k, heads, "copy"), Piece(self.v, heads, "copy")


@dataclass(frozen=True, slots=True)
class Attention(Op):
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

    kind: ClassVar[Kind] = "attention"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.q,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def kv(self) -> KVAccess:
        return KVAccess(self.layer, writes=False, window=self.window)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        pairs = sum(r.attended_pairs(self.window) for r in shape.requests)
        read = sum(r.read_tokens(self.window) for r in shape.requests)
        kv_numbers = 2 * read * self.num_kv_heads * self.head_dim
        q_bytes = int(shape.num_tokens * self.q.width * precision.activation_bytes)
        flops_per_pair = self.num_heads * (4 * self.head_dim + 5)  # 5: scale, max, exp, sum, divide
        return Cost(pairs * flops_per_pair, int(kv_numbers * precision.kv_bytes) + q_bytes, q_bytes)

    def label(self, program: "Program") -> str:
        del program
        return "attention" if self.window is None else f"attention (window {self.window})"

    def pieces(self, program: "Program") -> tuple[Piece, ...]:
        """Whole heads, with the KV heads that they read."""
        del program
        return Piece(self.q, self.num_heads), Piece(self.out, self.num_heads)

    def share(self, cut: Cut) -> tuple[Op, ...]:
        own = replace(
            self,
            q=cut.own(self.q),
            out=cut.own(self.out),
            num_heads=self.num_heads // cut.ranks,
            num_kv_heads=max(1, self.num_kv_heads // cut.ranks),
        )
        return (own,)


@dataclass(frozen=True, slots=True)
class GatedAct(Op):
    """out = act(x[:, :width]) * x[:, width:], with width = out.width (SwiGLU, GeGLU)."""

    x: Ref  # [T, 2 * width]: gate, then up
    out: Ref
    act: Activation

    kind: ClassVar[Kind] = "activation"
    by_columns: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _elementwise(
            shape.num_tokens, self.x.width, self.out.width, 6 * self.out.width, precision
        )

    def pieces(self, program: "Program") -> tuple[Piece, ...]:
        """Any columns, the same of the gate and of what it opens."""
        del program
        width = self.out.width
        gate, up = self.x.columns(0, width), self.x.columns(width, width)
        return tuple(Piece(columns, width, "ragged") for columns in (gate, up, self.out))


@dataclass(frozen=True, slots=True)
class Add(Op):
    """out = x + y."""

    x: Ref
    y: Ref
    out: Ref

    kind: ClassVar[Kind] = "add"
    by_columns: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x, self.y)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.out.width
        return _elementwise(shape.num_tokens, 2 * width, width, width, precision)


@dataclass(frozen=True, slots=True)
class SelectRows(Op):
    """out = the rows of x whose logits are wanted, in the batch's order."""

    x: Ref
    out: Ref

    kind: ClassVar[Kind] = "copy"
    by_columns: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def rows(self) -> Rows:
        return SELECTED

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _elementwise(shape.num_logit_rows, self.x.width, self.x.width, 0, precision)


@dataclass(frozen=True, slots=True)
class SoftCap(Op):
    """x = cap * tanh(x / cap), in place, on selected rows (Gemma 2's final logits)."""

    x: Ref
    cap: float

    kind: ClassVar[Kind] = "activation"
    by_columns: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def rows(self) -> Rows:
        return SELECTED

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        width = self.x.width
        return _elementwise(shape.num_logit_rows, width, width, 4 * width, precision)
