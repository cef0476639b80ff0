"""A program that ends with the final norm: hidden states of the selected rows, not their logits.

For embeddings. No operation changes, so KV is that of the whole program, bit for bit; and no head
is held in memory, multiplied or priced.
"""

from dataclasses import replace

from duetto.program.ops import Linear
from duetto.program.program import Program


def headless(program: Program) -> Program:
    """The operations before the projection to the vocabulary, which gives `logits`."""
    assert program.is_whole and not program.is_headless
    (place,) = [
        i
        for i, op in enumerate(program.ops)
        if program.logits in op.writes and isinstance(op, Linear)
    ]
    head, ops = program.ops[place], program.ops[:place]
    (hidden,) = head.reads
    used = {name for op in ops for name in op.weights}
    buffers = {ref.buffer for op in ops for ref in (*op.reads, *op.writes)}
    return replace(
        program,
        ops=ops,
        weights={name: spec for name, spec in program.weights.items() if name in used},
        buffers={name: width for name, width in program.buffers.items() if name in buffers},
        logits=hidden,
        is_headless=True,
    )
