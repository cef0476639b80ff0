"""What one call of an operation costs, as numbers to multiply the sums of a batch with.

Taken from the operations' own prices (`Op.cost`), which are affine in the batch's tokens, logit
rows, attended pairs and KV tokens read; so there is no second copy of any formula here. Knows no
hardware and no time.
"""

from dataclasses import dataclass, replace

from duetto.pricing.hardware import Kind
from duetto.pricing.parallel import Collective, RankOp
from duetto.program.ops import (
    Add,
    Attention,
    Embed,
    GatedAct,
    Linear,
    Op,
    RmsNorm,
    Rope,
    SelectRows,
    SoftCap,
    WriteKV,
)
from duetto.program.program import Program
from duetto.program.shape import BatchShape, Cost, Precision, RequestShape

_FINE = 2.0**20  # operations count whole bytes; at this many per number nothing is rounded away


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs and bytes of a call: so many fixed, and for each row, attended pair and token read."""

    of_logit_rows: bool  # its rows are the logit rows, not the tokens
    flops_row: float
    flops_pair: float
    bytes_fixed: float
    bytes_row: float
    bytes_read: float

    def flops(self, rows: float, pairs: float) -> float:
        return self.flops_row * rows + self.flops_pair * pairs

    def bytes_moved(self, rows: float, read: float) -> float:
        return self.bytes_fixed + self.bytes_row * rows + self.bytes_read * read


def work_of(op: RankOp, precision: Precision) -> Work:
    """Of a collective the bytes are those that each rank sends, over the link."""
    if isinstance(op, Collective):
        sent = op.numbers_sent * precision.activation_bytes
        return Work(op.after_select, 0.0, 0.0, 0.0, sent, 0.0)
    if isinstance(op, Attention):
        whole = replace(op, window=None)
        one, after_one = _cost(whole, precision, 1, 0), _cost(whole, precision, 1, 1)
        read = _bytes(after_one) - _bytes(one)
        return Work(False, 0.0, after_one.flops - one.flops, 0.0, _bytes(one) - read, read)
    one, two = _cost(op, precision, 1, 0), _cost(op, precision, 2, 0)
    bytes_row = _bytes(two) - _bytes(one)
    return Work(
        isinstance(op, SelectRows | SoftCap) or getattr(op, "after_select", False),
        two.flops - one.flops,
        0.0,
        _bytes(one) - bytes_row,
        bytes_row,
        0.0,
    )


def _cost(op: Op, precision: Precision, num_new: int, num_past: int) -> Cost:
    fine = Precision(
        precision.weight_bytes * _FINE,
        precision.activation_bytes * _FINE,
        precision.kv_bytes * _FINE,
    )
    return op.cost(BatchShape((RequestShape(num_new, num_past, num_new),)), fine)


def _bytes(cost: Cost) -> float:
    return cost.bytes_moved / _FINE


def kind_of(op: RankOp) -> Kind:
    return _KINDS[type(op)]


def name_of(op: RankOp, program: Program) -> str:
    """What a reader calls the operation, the same in each layer: q+k+v_proj, down_proj, rope."""
    match op:
        case Linear() if op.out.buffer == program.logits.buffer:
            return "lm_head"
        case Linear():
            modules = [source.split(".")[-2] for source in program.weights[op.weight].sources]
            return "+".join([m.removesuffix("_proj") for m in modules[:-1]] + modules[-1:])
        case RmsNorm():
            return op.weight.split(".")[-2]
        case Attention():
            return "attention" if op.window is None else f"attention (window {op.window})"
        case Collective():
            return op.kind
    return _NAMES[type(op)]


_KINDS: dict[type, Kind] = {
    Linear: "linear",
    Attention: "attention",
    RmsNorm: "norm",
    Rope: "rope",
    GatedAct: "activation",
    SoftCap: "activation",
    Add: "add",
    Embed: "embed",
    WriteKV: "copy",
    SelectRows: "copy",
    Collective: "collective",
}
_NAMES: dict[type, str] = {
    Embed: "embed",
    Rope: "rope",
    WriteKV: "write_kv",
    GatedAct: "gated_act",
    Add: "add",
    SelectRows: "select_rows",
    SoftCap: "soft_cap",
}
