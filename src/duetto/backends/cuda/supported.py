"""Which programs the GPU's kernels take: said before a weight is read. No torch."""

from duetto.core.errors import ConfigError
from duetto.program.ops import Attention
from duetto.program.program import Program

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # those that kernels are compiled and tested for


def check_program(program: Program) -> None:
    """Raise ConfigError, with what would be taken, for a program that has no kernel."""
    for op in program.ops:
        if isinstance(op, Attention) and op.head_dim not in HEAD_DIMS:
            raise ConfigError(
                f"--backend cuda: heads of {op.head_dim} numbers have no kernel; accepted: "
                f"{', '.join(map(str, HEAD_DIMS))}; --backend cpu takes others"
            )
