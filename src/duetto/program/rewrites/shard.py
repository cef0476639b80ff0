"""A program cut for tensor parallelism: what one rank computes, and what ranks exchange.

Megatron's way (Shoeybi et al., 2019), as the operations themselves say (`Op.pieces`, `Op.share`): a
projection of a buffer that every rank has is cut by rows of its weight, a projection of a buffer
that is cut by columns, with an all-reduce behind it; heads are shared out, norms are computed by
all; the vocabulary is cut for the embedding and for the logits. Knows no hardware and no time.
"""

from collections.abc import Sequence
from dataclasses import replace

from duetto.core.errors import ConfigError
from duetto.program.cut import WHOLE, Cut, Piece, by_buffer
from duetto.program.op import Op
from duetto.program.program import KVSpec, Program

_MAX_DEGREE = 64


def possible_degrees(program: Program) -> tuple[int, ...]:
    """The tensor-parallel degrees up to 64 that cut this program's heads evenly."""
    return _degrees(_pieces(program))


def shard(program: Program, ranks: int, rank: int = 0) -> Program:
    """The program of one rank; its `parts` say what it has of each weight.

    All ranks' programs have the same kinds of operations, place by place; the first one costs the
    most. Raises ConfigError if the ranks do not divide the heads, naming the nearest numbers that
    do, and for an operation that cannot be cut.
    """
    pieces = _pieces(program)
    possible = _degrees(pieces)
    if ranks not in possible:
        nearest = sorted(sorted(possible, key=lambda degree: abs(degree - ranks))[:2])
        raise ConfigError(
            f"--tp: {ranks} does not divide the model's heads; "
            f"the nearest that do: {', '.join(map(str, nearest))}"
        )
    if ranks == 1:
        return program
    cut = Cut(rank, ranks, program.logits, by_buffer(pieces))
    ops: list[Op] = []
    for op in program.ops:
        ops += op.share(cut)
    return replace(
        program,
        ops=tuple(ops),
        weights={name: spec for name, spec in program.weights.items() if name in cut.parts},
        buffers={name: cut.width(name, width) for name, width in program.buffers.items()},
        kv=tuple(
            KVSpec(max(1, layer.num_kv_heads // ranks), layer.head_dim) for layer in program.kv
        ),
        parts={name: part for name, part in cut.parts.items() if part != WHOLE},
    )


def _pieces(program: Program) -> tuple[Piece, ...]:
    """All that operations may share out, each once: layers are alike."""
    return tuple(dict.fromkeys(piece for op in program.ops for piece in op.pieces(program)))


def _degrees(pieces: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(
        degree
        for degree in range(1, _MAX_DEGREE + 1)
        if all(piece.fits(degree) for piece in pieces)
    )
