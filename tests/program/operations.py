"""The operations that models are written in."""

from duetto.program import ops
from duetto.program.op import Op


def every_operation() -> set[type[Op]]:
    """All of program/ops.py, without the parts that rewrites make of them."""
    classes = {one for one in vars(ops).values() if isinstance(one, type) and issubclass(one, Op)}
    return {one for one in classes if one.__module__ == ops.__name__} - {ops.EmbedPart}
