"""What the buffers of one step weigh. Knows no backend: one that fuses operations needs less."""

from duetto.program.program import Program
from duetto.program.shape import SELECTED


def activation_bytes(
    program: Program, num_tokens: int, num_logit_rows: int, number_bytes: float = 4.0
) -> int:
    """Every buffer of the program once, for the largest step that there may be."""
    selected = {program.logits.buffer}
    for op in program.ops:
        if op.rows == SELECTED:
            selected |= {ref.buffer for ref in op.writes}
    numbers = sum(
        width * (num_logit_rows if name in selected else num_tokens)
        for name, width in program.buffers.items()
    )
    return int(numbers * number_bytes)
