"""What one device computes of a program that is cut for tensor and pipeline parallelism.

For prices and memory only: operations are narrowed and collectives inserted, weights stay whole.
Tensor parallelism is Megatron's (Shoeybi et al., 2019): a projection of a replicated buffer is
split by columns, a projection of a split buffer by rows with an all-reduce behind it, heads are
split, norms are computed by all; the vocabulary is split for the embedding and for the logits.
Knows no hardware and no time.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from duetto.core.errors import ConfigError
from duetto.program.ops import (
    Attention,
    Embed,
    GatedAct,
    Linear,
    Op,
    Ref,
    RmsNorm,
    Rope,
    WriteKV,
)
from duetto.program.program import Program

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Collective:
    """Numbers that ranks exchange: `width` of them for each row, counted over all the ranks.

    all_reduce: a ring, so each rank sends 2 (n-1)/n of the numbers in 2 (n-1) hops.
    all_gather: each rank sends (n-1)/n of them in n-1 hops.
    send: all of them, once, to the next stage of a pipeline.
    """

    kind: Literal["all_reduce", "all_gather", "send"]
    width: int
    ranks: int
    after_select: bool = False

    @property
    def hops(self) -> int:
        match self.kind:
            case "all_reduce":
                return 2 * (self.ranks - 1)
            case "all_gather":
                return self.ranks - 1
            case "send":
                return 1

    @property
    def numbers_sent(self) -> float:
        """By each rank, for each row."""
        return self.width if self.kind == "send" else self.width * self.hops / self.ranks


RankOp = Op | Collective


def possible_degrees(program: Program) -> tuple[int, ...]:
    """The tensor-parallel degrees up to 64 that cut this program's heads evenly."""
    attentions = [op for op in program.ops if isinstance(op, Attention)]
    return tuple(
        degree
        for degree in range(1, 65)
        if all(
            op.num_heads % degree == 0
            and (op.num_kv_heads % degree == 0 or degree % op.num_kv_heads == 0)
            for op in attentions
        )
    )


def shard(program: Program, ranks: int) -> tuple[RankOp, ...]:
    """One rank's share of a program's operations, with the collectives between them.

    KV heads that are fewer than the ranks are kept by several of them. Raises ConfigError if the
    ranks do not divide the heads, naming the nearest numbers that do.
    """
    possible = possible_degrees(program)
    if ranks not in possible:
        nearest = sorted(sorted(possible, key=lambda degree: abs(degree - ranks))[:2])
        raise ConfigError(
            f"--tp: {ranks} does not divide the model's heads; "
            f"the nearest that do: {', '.join(map(str, nearest))}"
        )
    return program.ops if ranks == 1 else tuple(_Cut(program, ranks).ops())


class _Cut:
    """Walks a program once, remembering which buffers hold only a rank's own columns."""

    def __init__(self, program: Program, ranks: int) -> None:
        self._program = program
        self._ranks = ranks
        self._split: set[str] = set()
        attention = next(op for op in program.ops if isinstance(op, Attention))
        self._kv_width = attention.num_kv_heads * attention.head_dim
        self._own_kv_width = max(1, attention.num_kv_heads // ranks) * attention.head_dim
        self._qkv = attention.q.buffer

    def ops(self) -> list[RankOp]:
        found: list[RankOp] = []
        for op in self._program.ops:
            found += self._own(op)
        return found

    def _own(self, op: Op) -> list[RankOp]:
        match op:
            case Linear() if op.x.buffer in self._split:
                self._split.discard(op.out.buffer)
                own: Op = replace(op, x=self._narrow(op.x))
                return [own, Collective("all_reduce", op.out.width, self._ranks)]
            case Linear() if op.out.buffer == self._program.logits.buffer:
                gather = Collective("all_gather", op.out.width, self._ranks, op.after_select)
                return [replace(op, out=self._narrow(op.out)), gather]
            case Linear():
                self._split.add(op.out.buffer)
                return [replace(op, out=self._narrow(op.out))]
            case Embed():  # each rank looks up the rows that it has
                return [op, Collective("all_reduce", op.out.width, self._ranks)]
            case RmsNorm() | Rope() if op.x.buffer in self._split:
                x = self._narrow(op.x)
                return [replace(op, x=x, out=x) if isinstance(op, RmsNorm) else replace(op, x=x)]
            case WriteKV():
                return [replace(op, k=self._narrow(op.k), v=self._narrow(op.v))]
            case Attention():
                self._split.add(op.out.buffer)
                return [self._own_heads(op)]
            case GatedAct():
                self._split.add(op.out.buffer)
                return [replace(op, x=self._narrow(op.x), out=self._narrow(op.out))]
        return [op]

    def _own_heads(self, op: Attention) -> Attention:
        return replace(
            op,
            q=self._narrow(op.q),
            out=self._narrow(op.out),
            num_heads=op.num_heads // self._ranks,
            num_kv_heads=max(1, op.num_kv_heads // self._ranks),
        )

    def _narrow(self, ref: Ref) -> Ref:
        width = -(-ref.width // self._ranks)
        if ref.buffer == self._qkv:
            if ref.width == self._kv_width:
                width = self._own_kv_width
            elif ref.width == self._program.buffers[ref.buffer]:  # query, key and value
                heads_width = ref.width - 2 * self._kv_width
                width = heads_width // self._ranks + 2 * self._own_kv_width
        return Ref(ref.buffer, 0, width)


def stages(program: Program, ops: tuple[RankOp, ...], degree: int) -> list[list[RankOp]]:
    """The operations cut into pipeline stages of whole layers, as even as can be.

    What stands before the first layer belongs to the first stage, what follows the last one to
    the last. Raises ConfigError if there are fewer layers than stages.
    """
    num_layers = len(program.kv)
    if not 1 <= degree <= num_layers:
        raise ConfigError(
            f"--pp: {degree} stages cannot be made of {num_layers} layers; "
            f"accepted: 1 to {num_layers}"
        )
    found: list[list[RankOp]] = [[] for _ in range(degree)]
    layer = 0
    for op in ops:
        layer = _layer_of(op, layer)
        found[layer * degree // num_layers].append(op)
    return found


def _layer_of(op: RankOp, current: int) -> int:
    """An operation that names no layer belongs to the one before it."""
    if isinstance(op, WriteKV | Attention):
        return op.layer
    match = _LAYER.search(op.weight) if isinstance(op, Linear | RmsNorm) else None
    return int(match[1]) if match else current
