"""A stand-in for the native plan: what is compiled into it can be read back as a Program."""

from dataclasses import dataclass, field, replace
from typing import Any

from duetto.backends.cpu.compile import Compiler
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
    RopeSpec,
    SelectRows,
    SoftCap,
    WriteKV,
)
from duetto.program.program import Program


@dataclass
class PlanInNumpy:
    """Takes names for weights, and undoes fusing: `ops` computes what the plan would."""

    ops: list[Op] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    num_fused: int = 0
    specs: list[RopeSpec] = field(default_factory=list)

    def buffer(self, width: int) -> int:
        self.widths[f"b{len(self.widths)}"] = width
        return len(self.widths) - 1

    def embed(self, out: Any, weight: Any, scale: float) -> None:
        self.ops.append(Embed(_ref(out), weight, scale))

    def rms_norm(self, x: Any, out: Any, weight: Any, eps: float, group: int, offset: float):
        self.ops.append(RmsNorm(_ref(x), _ref(out), weight, eps, group, offset))

    def linear(self, x: Any, out: Any, weight: Any, bias, accumulate, norm, gated_act) -> None:
        made = _ref(x)
        if norm is not None:
            assert gated_act is None
            made = self._scratch(x[2])
            name, eps, offset = norm
            self.ops.append(RmsNorm(_ref(x), made, name, eps, x[2], offset))
        elif gated_act is not None:
            made = self._scratch(x[2] // 2)
            self.ops.append(GatedAct(_ref(x), made, gated_act))
        self.ops.append(Linear(made, _ref(out), weight, bias, accumulate))

    def _scratch(self, width: int) -> Ref:
        self.num_fused += 1
        return _ref((self.buffer(width), 0, width))

    def rope_spec(self, inv_freq: Any, scale: float) -> int:
        self.specs.append(RopeSpec(tuple(map(float, inv_freq)), scale))
        return len(self.specs) - 1

    def rope(self, x: Any, head_dim: int, spec: int) -> None:
        self.ops.append(Rope(_ref(x), head_dim, self.specs[spec]))

    def write_kv(self, k: Any, v: Any, layer: int) -> None:
        self.ops.append(WriteKV(_ref(k), _ref(v), layer))

    def attention(self, q: Any, out: Any, *rest: Any) -> None:
        *rest, window, softcap = rest
        self.ops.append(Attention(_ref(q), _ref(out), *rest, window or None, softcap or None))

    def gated_act(self, x: Any, out: Any, kind: Any) -> None:
        self.ops.append(GatedAct(_ref(x), _ref(out), kind))

    def add(self, x: Any, y: Any, out: Any) -> None:
        self.ops.append(Add(_ref(x), _ref(y), _ref(out)))

    def select_rows(self, x: Any, out: Any) -> None:
        self.ops.append(SelectRows(_ref(x), _ref(out)))

    def soft_cap(self, x: Any, cap: float) -> None:
        self.ops.append(SoftCap(_ref(x), cap))


def _ref(columns: tuple[int, int, int]) -> Ref:
    return Ref(f"b{columns[0]}", columns[1], columns[2])


def compiled(program: Program) -> tuple[Program, int]:
    """A program of what its plan computes, and how many operations were fused into others."""
    plan = PlanInNumpy()
    names = {name: name for name in program.weights}
    _, logits = Compiler(program, plan, names, names).compile()
    made = replace(program, ops=tuple(plan.ops), buffers=plan.widths, logits=_ref(logits))
    return made, plan.num_fused
