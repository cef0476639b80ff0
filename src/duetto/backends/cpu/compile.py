"""A Program becomes calls that build a native plan. Knows no weights' formats and no kernels."""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from duetto.backends.backend import FloatArray
from duetto.core.errors import ConfigError
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.cut import result_parts
from duetto.program.ops import (
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
from duetto.program.program import Program
from duetto.program.rewrites.fuse import Absorbed, FusedLinear, fuse

if TYPE_CHECKING:  # the module may not have been built
    from duetto._native import Plan, Weight

Columns = tuple[int, int, int]  # buffer, start, width


class Compiler:
    """Builds one plan. `matrices` are packed; `vectors` are norm weights and biases, in fp32."""

    def __init__(
        self,
        program: Program,
        plan: "Plan",
        matrices: Mapping[str, "Weight"],
        vectors: Mapping[str, FloatArray],
        *,
        is_stage: bool = False,
        is_rank: bool = False,
    ) -> None:
        self._program = program
        self._plan = plan
        self._matrices = matrices
        self._vectors = vectors
        self._accepts_parts, self._accepts_stages = is_rank, is_stage
        self._layers = {layer: place for place, layer in enumerate(program.kv_layers)}
        self._buffers: dict[str, int] = {}
        self._rope_specs: dict[RopeSpec, int] = {}

    def compile(self) -> tuple[tuple[Op, ...], Columns]:
        """Add every operation to the plan; returns them, and where the logits will be.

        Raises ConfigError for an operation that this backend does not know, and for a program of
        one rank or stage unless it is known to be one.
        """
        program = self._program
        is_stage = bool(program.inputs or program.outputs)
        if (program.parts and not self._accepts_parts) or (is_stage and not self._accepts_stages):
            raise ConfigError("--backend cpu: runs no part of a program (--tp, --pp); accepted: 1")
        steps = fuse(self._program, _ABSORBED).ops
        for step in steps:
            if type(step) not in _EMIT:
                raise ConfigError(
                    f"--backend cpu: knows no operation {type(step).__name__}, which this model "
                    "has; --backend reference may"
                )
            _EMIT[type(step)](self, step)
        return steps, self.columns(self._program.results[0])

    def columns(self, ref: Ref) -> Columns:
        """A buffer is made when it is first used: what fusing leaves unused takes no memory."""
        if ref.buffer not in self._buffers:
            width = self._program.buffers[ref.buffer]
            self._buffers[ref.buffer] = self._plan.buffer(width)
        return self._buffers[ref.buffer], ref.start, ref.width

    def _embed(self, op: Embed) -> None:
        self._plan.embed(self.columns(op.out), self._matrices[op.weight], op.scale)

    def _embed_part(self, op: EmbedPart) -> None:
        """The plan must know which tokens there are: those that others have are no mistake."""
        out, vocabulary = self.columns(op.out), self._program.weights[op.weight].shape[0]
        self._plan.embed(out, self._matrices[op.weight], op.scale, op.first, vocabulary)

    def _all_reduce(self, op: AllReduce) -> None:
        self._plan.all_reduce(self.columns(op.x))

    def _all_gather(self, op: AllGather) -> None:
        spans = result_parts(op.out, op.ranks)
        self._plan.all_gather(self.columns(op.out), [0, *(span.end for span in spans)])

    def _rms_norm(self, op: RmsNorm) -> None:
        self._plan.rms_norm(
            self.columns(op.x),
            self.columns(op.out),
            self._vectors[op.weight],
            op.eps,
            op.group,
            op.offset,
        )

    def _linear(self, op: Linear) -> None:
        self._project(op, op.x, {})

    def _fused_linear(self, step: FusedLinear) -> None:
        (x,) = step.before.reads
        self._project(step.linear, x, _BEFORE[type(step.before)](self, step.before))

    def _norm_before(self, op: RmsNorm) -> dict[str, Any]:
        return {"norm": (self._vectors[op.weight], op.eps, op.offset)}

    def _act_before(self, op: GatedAct) -> dict[str, Any]:
        return {"gated_act": op.act}

    def _project(self, op: Linear, x: Ref, before: dict[str, Any]) -> None:
        """A projection of what the kernel makes of x first."""
        self._plan.linear(
            self.columns(x),
            self.columns(op.out),
            self._matrices[op.weight],
            bias=None if op.bias is None else self._vectors[op.bias],
            accumulate=op.accumulate,
            norm=before.get("norm"),
            gated_act=before.get("gated_act"),
        )

    def _rope(self, op: Rope) -> None:
        if op.spec not in self._rope_specs:
            inv_freq = np.array(op.spec.inv_freq, np.float32)
            self._rope_specs[op.spec] = self._plan.rope_spec(inv_freq, op.spec.scale)
        self._plan.rope(self.columns(op.x), op.head_dim, self._rope_specs[op.spec])

    def _write_kv(self, op: WriteKV) -> None:
        self._plan.write_kv(self.columns(op.k), self.columns(op.v), self._layers[op.layer])

    def _attention(self, op: Attention) -> None:
        self._plan.attention(
            self.columns(op.q),
            self.columns(op.out),
            self._layers[op.layer],
            op.num_heads,
            op.num_kv_heads,
            op.head_dim,
            op.scale,
            op.window or 0,
            op.softcap or 0.0,
        )

    def _gated_act(self, op: GatedAct) -> None:
        self._plan.gated_act(self.columns(op.x), self.columns(op.out), op.act)

    def _add(self, op: Add) -> None:
        self._plan.add(self.columns(op.x), self.columns(op.y), self.columns(op.out))

    def _select_rows(self, op: SelectRows) -> None:
        self._plan.select_rows(self.columns(op.x), self.columns(op.out))

    def _soft_cap(self, op: SoftCap) -> None:
        self._plan.soft_cap(self.columns(op.x), op.cap)


# What the kernel of a projection can make of its input first, and for how many projections.
# An activation costs too much to compute twice; the kernel has no norm of heads.
_ABSORBED: Absorbed = {
    RmsNorm: lambda op: sys.maxsize if op.group == op.x.width else 0,
    GatedAct: lambda _: 1,
}
_BEFORE: dict[type[Op], Callable[[Compiler, Any], dict[str, Any]]] = {
    RmsNorm: Compiler._norm_before,
    GatedAct: Compiler._act_before,
}
_EMIT: dict[type[Op], Callable[[Compiler, Any], None]] = {
    AllGather: Compiler._all_gather,
    AllReduce: Compiler._all_reduce,
    Embed: Compiler._embed,
    EmbedPart: Compiler._embed_part,
    RmsNorm: Compiler._rms_norm,
    Linear: Compiler._linear,
    FusedLinear: Compiler._fused_linear,
    Rope: Compiler._rope,
    WriteKV: Compiler._write_kv,
    Attention: Compiler._attention,
    GatedAct: Compiler._gated_act,
    Add: Compiler._add,
    SelectRows: Compiler._select_rows,
    SoftCap: Compiler._soft_cap,
}
