"""A rank of the reference backend in a process of its own: what it exchanges with the others.

The twin of all ranks in one process is ranks.py. Ranks meet in shared memory (csrc/group.h), which
adds up as the twin does: in the order of ranks, in fp32.
"""

from typing import TYPE_CHECKING

import numpy as np

from duetto.backends.reference.ops import Run, compute
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.cut import result_parts
from duetto.program.op import Op

if TYPE_CHECKING:  # the module may not have been built
    from duetto._native import Member


def compute_with_others(op: Op, run: Run, member: "Member | None") -> None:
    """Compute an operation, with other ranks if it is a collective."""
    match op:
        case AllReduce() if member is not None:
            numbers = run.read(op.x)
            member.sum(numbers)
            run.write(op.x, numbers)
        case AllGather() if member is not None:
            _gather(op, run, member)
        case _:
            compute(op, run)


def _gather(op: AllGather, run: Run, member: "Member") -> None:
    """The last ranks may have fewer columns: all bring as many as the first."""
    own, spans = run.read(op.x), result_parts(op.out, op.ranks)
    num_rows, widest = len(own), max(span.width for span in spans)
    brought = np.zeros((num_rows, widest), np.float32)
    brought[:, : own.shape[1]] = own
    for span, numbers in zip(spans, member.gather(brought.reshape(-1)), strict=True):
        columns = numbers.reshape(num_rows, widest)[:, : span.width]
        run.write(op.out.columns(span.start, span.width), columns)
