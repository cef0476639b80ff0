"""What the decoders of all model types are built from: the builder of a Program, and shared blocks.

A block is here if at least two model types have it identically. Knows no checkpoint format beyond
the tensors' names, and no backend.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from duetto.checkpoints.config import ModelConfig
from duetto.checkpoints.weight_files import EMBEDDING
from duetto.models.rope import rope_spec
from duetto.program.ops import (
    Add,
    Attention,
    Embed,
    GatedAct,
    Linear,
    Op,
    Ref,
    RmsNorm,
    Rope,
    SelectRows,
    SoftCap,
    WriteKV,
)
from duetto.program.program import KVSpec, Program, WeightSpec
from duetto.program.shape import ALL, SELECTED, Rows


@dataclass
class ProgramBuilder:
    """Collects operations in order, with the weights and buffers they name.

    Projections of the same input are one Linear over one weight, stacked by rows from as many
    tensors as the checkpoint has them in. Weights are named after their first tensor.
    """

    config: ModelConfig
    max_model_len: int
    norm_offset: float = 0.0
    ops: list[Op] = field(default_factory=list)
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        heads_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.hidden = self.buffer("hidden", config.hidden_size)  # the residual stream
        self.normed = self.buffer("normed", config.hidden_size)
        self.qkv = self.buffer("qkv", heads_width + 2 * kv_width)
        self.q = self.qkv.columns(0, heads_width)
        self.k = self.qkv.columns(heads_width, kv_width)
        self.v = self.qkv.columns(heads_width + kv_width, kv_width)
        self.attended = self.buffer("attended", heads_width)
        self.gate_up = self.buffer("gate_up", 2 * config.intermediate_size)
        self.activated = self.buffer("activated", config.intermediate_size)
        ropes = {layer.rope for layer in config.layers}
        self.rope_specs = {rope: rope_spec(rope, self.max_model_len) for rope in ropes}

    def buffer(self, name: str, width: int) -> Ref:
        self.buffers[name] = width
        return Ref(name, 0, width)

    def weight(self, shape: tuple[int, ...], source: str) -> str:
        """A weight that is one tensor of the checkpoint."""
        return self.stacked_weight(shape, {source: shape[0]})

    def stacked_weight(self, shape: tuple[int, ...], source_rows: Mapping[str, int]) -> str:
        sources = tuple(source_rows)
        self.weights[sources[0]] = WeightSpec(shape, sources, tuple(source_rows.values()))
        return sources[0]

    def embed(self, scale: float = 1.0) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.ops.append(Embed(self.hidden, self.weight(shape, EMBEDDING), scale))

    def norm(self, name: str, x: Ref, out: Ref, *, rows: Rows = ALL) -> None:
        """Normalise whole rows."""
        weight = self.weight((x.width,), f"{name}.weight")
        eps, offset = self.config.rms_norm_eps, self.norm_offset
        self.ops.append(RmsNorm(x, out, weight, eps, x.width, offset, rows))

    def head_norm(self, name: str, x: Ref) -> None:
        """Normalise each head of x, in place."""
        group = self.config.head_dim
        weight = self.weight((group,), f"{name}.weight")
        self.ops.append(RmsNorm(x, x, weight, self.config.rms_norm_eps, group, self.norm_offset))

    def linear(
        self, x: Ref, out: Ref, name: str, *, bias: bool = False, accumulate: bool = False
    ) -> None:
        """Project x by the module `name`."""
        self.stacked_linear(x, out, {name: out.width}, bias=bias, accumulate=accumulate)

    def stacked_linear(
        self,
        x: Ref,
        out: Ref,
        widths: Mapping[str, int],
        *,
        bias: bool = False,
        accumulate: bool = False,
    ) -> None:
        """Project x by several modules, whose outputs of these widths stand side by side in out."""
        matrices = {f"{name}.weight": width for name, width in widths.items()}
        weight = self.stacked_weight((out.width, x.width), matrices)
        bias_weight = None
        if bias:
            biases = {f"{name}.bias": width for name, width in widths.items()}
            bias_weight = self.stacked_weight((out.width,), biases)
        self.ops.append(Linear(x, out, weight, bias_weight, accumulate))

    def rotate(self, layer: int) -> None:
        spec = self.rope_specs[self.config.layers[layer].rope]
        self.ops.append(Rope(self.q, self.config.head_dim, spec))
        self.ops.append(Rope(self.k, self.config.head_dim, spec))

    def attend(self, layer: int) -> None:
        """Store the layer's keys and values, and read all that a token may see into `attended`."""
        config = self.config
        self.ops.append(WriteKV(self.k, self.v, layer))
        self.ops.append(
            Attention(
                q=self.q,
                out=self.attended,
                layer=layer,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.attention_scale,
                window=config.layers[layer].window,
                softcap=config.attention_softcap,
            )
        )

    def activate(self) -> None:
        self.ops.append(GatedAct(self.gate_up, self.activated, self.config.activation))

    def add(self, x: Ref, y: Ref, out: Ref) -> None:
        self.ops.append(Add(x, y, out))

    def finish(self) -> Program:
        """The final norm and the logits, of the selected rows only."""
        config = self.config
        selected = self.buffer("selected", config.hidden_size)
        normed = self.buffer("selected_normed", config.hidden_size)
        logits = self.buffer("logits", config.vocab_size)
        self.ops.append(SelectRows(self.hidden, selected))
        self.norm("model.norm", selected, normed, rows=SELECTED)
        head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        weight = self.weight((config.vocab_size, config.hidden_size), head)
        self.ops.append(Linear(normed, logits, weight, rows=SELECTED))
        if config.final_softcap is not None:
            self.ops.append(SoftCap(logits, config.final_softcap))
        return Program(
            ops=tuple(self.ops),
            weights=self.weights,
            buffers=self.buffers,
            kv=tuple(KVSpec(config.num_kv_heads, config.head_dim) for _ in config.layers),
            logits=logits,
            max_model_len=self.max_model_len,
        )


def separate_qkv(model: ProgramBuilder, attention: str, *, bias: bool = False) -> None:
    """Query, key and value of the normed stream, from three tensors."""
    widths = {
        f"{attention}.q_proj": model.q.width,
        f"{attention}.k_proj": model.k.width,
        f"{attention}.v_proj": model.v.width,
    }
    model.stacked_linear(model.normed, model.qkv, widths, bias=bias)


def separate_gate_up(model: ProgramBuilder, mlp: str, *, bias: bool = False) -> None:
    """Gate and up projection of the normed stream, from two tensors."""
    width = model.activated.width
    widths = {f"{mlp}.gate_proj": width, f"{mlp}.up_proj": width}
    model.stacked_linear(model.normed, model.gate_up, widths, bias=bias)


def onto_residual(model: ProgramBuilder, x: Ref, name: str, *, bias: bool = False) -> None:
    """The residual stream plus a projection of x."""
    model.linear(x, model.hidden, name, bias=bias, accumulate=True)
