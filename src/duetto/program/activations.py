"""What the buffers of one step weigh. Knows no backend: one that fuses operations needs less."""

from dataclasses import dataclass

from duetto.program.op import Op
from duetto.program.program import Program
from duetto.program.shape import SELECTED, of_rows


@dataclass(frozen=True, slots=True)
class LargestStep:
    """The most that one step may have to do: so many tokens and rows of logits, over contexts up
    to max_model_len that together have num_kv_tokens."""

    num_tokens: int
    num_logit_rows: int
    max_model_len: int
    num_kv_tokens: int

    def rows(self, op: Op) -> int:
        return of_rows(op.rows, self.num_tokens, self.num_logit_rows)


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
