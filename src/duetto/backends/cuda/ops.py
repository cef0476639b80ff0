"""Each operation of a Program as launches of kernels. Knows no graphs and no sampling.

A DeviceRun has all that the operations of one step read and write. Numbers that a launch is given
here by value are the same in every step of the same numbers of tokens, runs and rows: what differs
lies in tensors, so that launches may be recorded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from duetto.backends.cuda.arena import CudaArena
from duetto.backends.cuda.kernels.attention import attend
from duetto.backends.cuda.kernels.embed import launch_embed
from duetto.backends.cuda.kernels.gated_act import launch_gated_act
from duetto.backends.cuda.kernels.merge import Partials
from duetto.backends.cuda.kernels.norm import Norm, launch_add_norm, launch_rms_norm
from duetto.backends.cuda.kernels.rope_write import Heads, Rotation, launch_rope_write
from duetto.backends.cuda.kernels.rows import launch_select_rows, launch_soft_cap
from duetto.backends.cuda.tensors import Matrix, StepTensors
from duetto.backends.cuda.weights import CudaWeights
from duetto.program.ops import (
    Activation,
    Add,
    Attention,
    Embed,
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
from duetto.program.rewrites.runs import AddNorm, GatedLinear, RopeWrite

# What is to be done beside attention: of the operation, its queries and its step.
LookAtQueries = Callable[[Attention, Tensor, "DeviceRun"], None]


class Multiply(Protocol):
    """kernels/linear.launch_linear, or what has its bits."""

    def __call__(
        self,
        x: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        accumulate: bool = False,
        gate: Activation | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class HeldTensors:
    """What lies on the device between steps."""

    weights: CudaWeights
    multiply: Multiply
    buffers: Mapping[str, Tensor]  # [most rows, width]
    selected: frozenset[str]  # buffers whose rows are those that are wanted
    rotations: Mapping[RopeSpec, Rotation]
    partials: Partials
    sampled: Tensor  # [most rows] int32: what the last step sampled


@dataclass(slots=True)
class DeviceRun:
    step: StepTensors
    kv: CudaArena
    held: HeldTensors
    num_tokens: int
    num_rows: int  # of logits, in this part
    look: LookAtQueries | None = None
    _views: dict[Ref, Tensor] = field(default_factory=dict)

    def of(self, ref: Ref) -> Tensor:
        """[rows of this step, columns]."""
        view = self._views.get(ref)
        if view is None:
            rows = self.num_rows if ref.buffer in self.held.selected else self.num_tokens
            buffer = self.held.buffers[ref.buffer]
            view = self._views[ref] = buffer[:rows, ref.start : ref.start + ref.width]
        return view

    def norm(self, op: RmsNorm) -> Norm:
        return Norm(self.held.weights.vectors[op.weight], op.eps, op.group, op.offset)

    def rotation(self, spec: RopeSpec) -> Rotation:
        return self.held.rotations[spec]


def _embed(op: Embed, run: DeviceRun) -> None:
    table, step = run.held.weights.matrices[op.weight], run.step
    launch_embed(step.token_ids, step.feedback, run.held.sampled, table, run.of(op.out), op.scale)


def _rms_norm(op: RmsNorm, run: DeviceRun) -> None:
    launch_rms_norm(run.of(op.x), run.norm(op), run.of(op.out))


def _add(op: Add, run: DeviceRun) -> None:
    torch.add(run.of(op.x), run.of(op.y), out=run.of(op.out))


def _add_norm(op: AddNorm, run: DeviceRun) -> None:
    place = next(i for i, part in enumerate(op.parts) if isinstance(part, Add))
    add = op.parts[place]
    assert isinstance(add, Add)
    before, after = (_norm_of(parts, run) for parts in (op.parts[:place], op.parts[place + 1 :]))
    last = op.parts[-1]
    out = run.of(last.out) if isinstance(last, RmsNorm) else None
    launch_add_norm(run.of(add.x), run.of(add.y), before, after, out)


def _norm_of(parts: tuple[Op, ...], run: DeviceRun) -> Norm | None:
    for part in parts:
        assert isinstance(part, RmsNorm)
        return run.norm(part)
    return None


def _linear(op: Linear, run: DeviceRun) -> None:
    run.held.multiply(
        run.of(op.x),
        run.held.weights.matrices[op.weight],
        run.of(op.out),
        bias=None if op.bias is None else run.held.weights.vectors[op.bias],
        accumulate=op.accumulate,
    )


def _gated_linear(op: GatedLinear, run: DeviceRun) -> None:
    linear, act = op.parts
    assert isinstance(linear, Linear) and isinstance(act, GatedAct)
    matrix = run.held.weights.matrices[linear.weight]
    run.held.multiply(run.of(linear.x), matrix, run.of(act.out), gate=act.act)


def _gated_act(op: GatedAct, run: DeviceRun) -> None:
    launch_gated_act(run.of(op.x), run.of(op.out), op.act)


def _rope(op: Rope, run: DeviceRun) -> None:
    x, heads = run.of(op.x), Heads(op.x.width // op.head_dim, 0, op.head_dim)
    step = run.step
    launch_rope_write(x, x, x, heads, run.rotation(op.spec), None, step.positions, step.slots)


def _write_kv(op: WriteKV, run: DeviceRun) -> None:
    layer, step = run.kv.layers[op.layer], run.step
    _, kv_heads, head_dim = layer.keys.shape
    k, heads = run.of(op.k), Heads(0, kv_heads, head_dim)
    launch_rope_write(k, k, run.of(op.v), heads, None, layer, step.positions, step.slots)


def _rope_write(op: RopeWrite, run: DeviceRun) -> None:
    q_rope, k_rope, write = op.parts[-3:]
    assert isinstance(q_rope, Rope) and isinstance(k_rope, Rope) and isinstance(write, WriteKV)
    norms = [run.norm(part) for part in op.parts[:-3] if isinstance(part, RmsNorm)]
    q_norm, k_norm = norms or (None, None)
    dim = q_rope.head_dim
    num_heads, num_kv_heads = q_rope.x.width // dim, k_rope.x.width // dim
    keep_k = k_rope.x not in op.dropped
    heads = Heads(num_heads, num_kv_heads, dim, q_norm, k_norm, keep_k)
    q, k, v = run.of(q_rope.x), run.of(k_rope.x), run.of(write.v)
    rotation, layer, step = run.rotation(q_rope.spec), run.kv.layers[write.layer], run.step
    launch_rope_write(q, k, v, heads, rotation, layer, step.positions, step.slots)


def _attention(op: Attention, run: DeviceRun) -> None:
    q = run.of(op.q)
    attend(
        q,
        run.of(op.out),
        run.kv.layers[op.layer],
        run.step,
        run.held.partials,
        block_size=run.kv.block_size,
        num_heads=op.num_heads,
        num_kv_heads=op.num_kv_heads,
        head_dim=op.head_dim,
        scale=op.scale,
        window=op.window,
        softcap=op.softcap,
    )
    if run.look is not None:
        run.look(op, q, run)


def _select_rows(op: SelectRows, run: DeviceRun) -> None:
    launch_select_rows(run.of(op.x), run.step.logit_rows, run.of(op.out))


def _soft_cap(op: SoftCap, run: DeviceRun) -> None:
    launch_soft_cap(run.of(op.x), op.cap)


LAUNCHES: Mapping[type[Op], Callable[[Any, DeviceRun], None]] = {
    Embed: _embed,
    RmsNorm: _rms_norm,
    Add: _add,
    AddNorm: _add_norm,
    Linear: _linear,
    GatedLinear: _gated_linear,
    GatedAct: _gated_act,
    Rope: _rope,
    WriteKV: _write_kv,
    RopeWrite: _rope_write,
    Attention: _attention,
    SelectRows: _select_rows,
    SoftCap: _soft_cap,
}
