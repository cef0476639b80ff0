"""The largest step that a GPU backend may be given: all that it holds is of these sizes.

Nothing is allocated in a step, so what there is must do for every step that the scheduler may plan.
"""

from collections.abc import Sequence
from typing import NamedTuple


class StepLimits(NamedTuple):
    num_tokens: int
    num_runs: int
    # Of logits that are held at a time: those of sampled rows. Rows of prompts that are scored may
    # be more, and are computed in parts.
    num_logit_rows: int
    max_model_len: int
    # Query tokens whose splits programs share out; a step that has more gives the others' runs to
    # programs that walk alone.
    num_few_tokens: int


def graph_sizes(most: int) -> Sequence[int]:
    """Numbers of requests for which a graph is recorded: a step is padded to the next of them."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most + 1, 32)]
    return (*[size for size in sizes if size < most], most)
