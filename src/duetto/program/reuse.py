"""What reuse of KV cannot do on a model, as its program says. Knows no backend and no numbers."""

from duetto.core.reuse_choice import ReuseLimits
from duetto.program.looks import why_no_deviation
from duetto.program.ops import Attention
from duetto.program.program import Program
from duetto.program.rotation import key_rotations


def reuse_limits(program: Program) -> ReuseLimits:
    """What of the program's KV cannot be brought to other positions, or looked at there."""
    is_turned = None not in key_rotations(program)
    windows = [op.window for op in program.ops if isinstance(op, Attention)]
    return ReuseLimits(
        None if is_turned else "not all keys of this model are rotated by their positions",
        min((window for window in windows if window is not None), default=None),
        why_no_deviation(program),
    )
