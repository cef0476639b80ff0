"""How each layer's keys are turned by their position: what must be known to bring them elsewhere.

A rotation by one position and then by the difference to another is the rotation by the other (Su et
al., RoFormer, 2021). So a key that was computed at one place is the key for another place once it
is turned by the difference. Knows no backend and no numbers.
"""

from duetto.program.op import Ref
from duetto.program.ops import Rope, RopeSpec, WriteKV
from duetto.program.program import Program


def key_rotations(program: Program) -> tuple[RopeSpec | None, ...]:
    """By layer. None: the layer's keys do not depend on the position, or what they depend on was
    added to them otherwise; `program` then has no rotation at all. Or it is another stage's."""
    found: dict[int, RopeSpec | None] = {}
    turned: dict[Ref, RopeSpec] = {}
    for op in program.ops:
        if isinstance(op, Rope):
            turned[op.x] = op.spec
        elif isinstance(op, WriteKV):
            found[op.layer] = next((s for x, s in turned.items() if x.covers(op.k)), None)
            turned.clear()  # buffers are used again by the next layer
    return tuple([found.get(layer) for layer in range(len(program.kv))])
