"""Each operation of a Program, computed plainly in numpy.

What a row becomes depends on that row and its own request only, bit for bit, whatever else is in
the step. Elementwise work has this by nature; a matrix product has it only because every row is
multiplied by itself (BLAS adds up in another order for another number of rows), and attention
because every query works on arrays whose shape its own position decides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, StepArrays
from duetto.backends.reference.kv import KVArena
from duetto.core.batch import ATTENTION_UNIT
from duetto.program.looks import first_attending_layer
from duetto.program.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    EmbedPart,
    GatedAct,
    Linear,
    Op,
    Ref,
    RmsNorm,
    Rope,
    RopeSpec,
    SelectRows,
    SoftCap,
    WriteKV,
)
from duetto.program.rewrites.fuse import FusedLinear
from duetto.program.rewrites.runs import AddNorm, FusedRun, GatedLinear, RopeWrite


@dataclass(slots=True)
class Given:
    """What attention the tokens of runs first ... last give to positions 0 ... end, as it is summed
    up through a step."""

    first: int
    last: int
    end: int
    units: NDArray[np.int64] = field(init=False)  # [end]
    num_lost: int = 0  # (token, head) pairs whose weights are no numbers

    def __post_init__(self) -> None:
        self.units = np.zeros(self.end, np.int64)

    def add(self, start: int, weights: FloatArray) -> None:
        """One token's weights, [heads, seen], of positions from `start` on."""
        is_lost = ~np.isfinite(weights).all(axis=-1)
        self.num_lost += int(is_lost.sum())
        units = np.rint(weights[~is_lost] / ATTENTION_UNIT).astype(np.int64).sum(axis=0)
        places = self.units[start : start + len(units)]
        places += units[: len(places)]


@dataclass(frozen=True, slots=True)
class Run:
    """All that the operations of one step read and write."""

    step: StepArrays
    kv: KVArena
    weights: Mapping[str, FloatArray]
    widths: Mapping[str, int]  # of the buffers
    buffers: dict[str, FloatArray] = field(default_factory=dict)
    given: Sequence[Given] = ()

    def read(self, ref: Ref) -> FloatArray:
        """A contiguous copy: numpy's vector loops round differently over strided memory."""
        columns = self.buffers[ref.buffer][:, ref.start : ref.start + ref.width]
        return np.array(columns, order="C")

    def write(self, ref: Ref, values: FloatArray) -> None:
        if ref.buffer not in self.buffers:
            shape = (len(values), self.widths[ref.buffer])
            self.buffers[ref.buffer] = np.empty(shape, np.float32)
        self.buffers[ref.buffer][:, ref.start : ref.start + ref.width] = values


def embed(op: Embed, run: Run) -> None:
    rows = run.weights[op.weight][run.step.token_ids]
    run.write(op.out, rows * op.scale)


def embed_part(op: EmbedPart, run: Run) -> None:
    table = run.weights[op.weight]
    places = run.step.token_ids - op.first
    is_here = (places >= 0) & (places < len(table))
    rows = np.zeros((len(places), op.out.width), np.float32)
    rows[is_here] = table[places[is_here]]
    run.write(op.out, rows * op.scale)


def rms_norm(op: RmsNorm, run: Run) -> None:
    x = run.read(op.x)
    groups = x.reshape(len(x), op.x.width // op.group, op.group).astype(np.float64)
    mean_square = np.mean(groups * groups, axis=-1, keepdims=True)
    weight = run.weights[op.weight].astype(np.float64) + op.offset
    normed = groups / np.sqrt(mean_square + op.eps) * weight
    run.write(op.out, normed.reshape(x.shape).astype(np.float32))


def linear(op: Linear, run: Run) -> None:
    result = multiply_rows(run.read(op.x), run.weights[op.weight])
    if op.bias is not None:
        result += run.weights[op.bias]
    if op.accumulate:
        result += run.read(op.out)
    run.write(op.out, result)


def multiply_rows(x: FloatArray, weight: FloatArray) -> FloatArray:
    """x · weightᵀ as one product of a vector and a matrix per row of x."""
    product: FloatArray = np.matmul(x[:, None, :], weight.T)
    return product[:, 0, :]


def rope(op: Rope, run: Run) -> None:
    x = run.read(op.x)
    heads = x.reshape(len(x), op.x.width // op.head_dim, op.head_dim)
    cos, sin = _cos_sin(op.spec, run.step)
    half = len(op.spec.inv_freq)
    first, second = heads[..., :half].copy(), heads[..., half : 2 * half].copy()
    heads[..., :half] = first * cos - second * sin
    heads[..., half : 2 * half] = second * cos + first * sin
    run.write(op.x, x)


def _cos_sin(spec: RopeSpec, step: StepArrays) -> tuple[FloatArray, FloatArray]:
    """[T, 1, rotary_dim / 2] each.

    Frequencies and angles are rounded to fp32, as transformers has it: true angles would differ
    from those that checkpoints were validated with by 0.004 at position 100 000.
    """
    inv_freq = np.array(spec.inv_freq, np.float32)
    angles = (step.positions.astype(np.float32)[:, None, None] * inv_freq).astype(np.float64)
    cos, sin = np.cos(angles) * spec.scale, np.sin(angles) * spec.scale
    return cos.astype(np.float32), sin.astype(np.float32)


def write_kv(op: WriteKV, run: Run) -> None:
    run.kv.write(op.layer, run.step.slots, run.read(op.k), run.read(op.v))


def attention(op: Attention, run: Run) -> None:
    step, q = run.step, run.read(op.q)
    heads = q.reshape(len(q), op.num_kv_heads, op.num_heads // op.num_kv_heads, op.head_dim)
    out = np.empty_like(heads)
    given_here = run.given if op.layer >= first_attending_layer(len(run.kv.keys)) else ()
    for request, blocks in enumerate(step.block_tables):
        keys, values = run.kv.read(op.layer, blocks, int(step.context_lens[request]))
        looks = [given for given in given_here if given.first <= request < given.last]
        for row in range(step.query_starts[request], step.query_starts[request + 1]):
            end = int(step.positions[row]) + 1
            start = 0 if op.window is None else max(0, end - op.window)
            weights = _weights(op, heads[row], keys[start:end])
            out[row] = np.matmul(weights, values[start:end].transpose(1, 0, 2))
            for given in looks:
                given.add(start, weights.reshape(op.num_heads, -1))
    run.write(op.out, out.reshape(q.shape))


def _weights(op: Attention, q: FloatArray, keys: FloatArray) -> FloatArray:
    """One query's of every head, [kv_heads, group, seen]. q: [kv_heads, group, head_dim]; keys:
    [seen, kv_heads, head_dim]."""
    scores = np.matmul(q, keys.transpose(1, 2, 0)) * op.scale
    if op.softcap is not None:
        scores = np.tanh(scores / op.softcap) * op.softcap
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights, np.float32)


def gated_act(op: GatedAct, run: Run) -> None:
    gate = run.read(op.x.columns(0, op.out.width))
    up = run.read(op.x.columns(op.out.width, op.out.width))
    run.write(op.out, ACTIVATIONS[op.act](gate) * up)


def silu(x: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # exp(100) is inf, and x / inf the right 0
        return np.asarray(x / (1 + np.exp(-x)), np.float32)


def gelu_tanh(x: FloatArray) -> FloatArray:
    """The tanh approximation of GELU (Hendrycks and Gimpel, 2016)."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), np.float32)


ACTIVATIONS: dict[Activation, Callable[[FloatArray], FloatArray]] = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
}


def add(op: Add, run: Run) -> None:
    run.write(op.out, run.read(op.x) + run.read(op.y))


def select_rows(op: SelectRows, run: Run) -> None:
    run.write(op.out, run.read(op.x)[run.step.logit_rows])


def soft_cap(op: SoftCap, run: Run) -> None:
    run.write(op.x, np.tanh(run.read(op.x) / op.cap) * op.cap)


def fused_linear(op: FusedLinear, run: Run) -> None:
    """The slow twin of a fused operation is its parts."""
    compute(op.before, run)
    compute(op.linear, run)


def fused_run(op: FusedRun, run: Run) -> None:
    """Its parts; what it drops holds no number then."""
    for part in op.parts:
        compute(part, run)
    for ref in op.dropped:
        run.buffers[ref.buffer][:, ref.start : ref.start + ref.width] = np.nan


def compute(op: Op, run: Run) -> None:
    OPS[type(op)](op, run)


# The meaning of each operation. Those in which ranks exchange numbers are in ranks.py.
OPS: dict[type[Op], Callable[[Any, Run], None]] = {
    Embed: embed,
    EmbedPart: embed_part,
    RmsNorm: rms_norm,
    Linear: linear,
    Rope: rope,
    WriteKV: write_kv,
    Attention: attention,
    GatedAct: gated_act,
    Add: add,
    SelectRows: select_rows,
    SoftCap: soft_cap,
    FusedLinear: fused_linear,
    AddNorm: fused_run,
    RopeWrite: fused_run,
    GatedLinear: fused_run,
}
