"""What every backend is: something that runs a Program over one step's arrays.

A backend knows tokens, positions, slots and blocks. It knows no request, no schedule and no
sampling. It is constructed with a Program and its weights.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from duetto.program.dtype import KVDtype

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class StepArrays(NamedTuple):
    """One step as arrays. T tokens of R requests, concatenated in the batch's order.

    Request r's tokens are rows query_starts[r] ... query_starts[r + 1]; after the step it has
    context_lens[r] tokens with KV, the last of which are these. Token at position p of request r
    has its KV in slot block_tables[r, p // block_size] * block_size + p % block_size.
    """

    token_ids: IntArray  # [T]
    positions: IntArray  # [T]
    slots: IntArray  # [T]: where this step writes each token's KV
    query_starts: IntArray  # [R + 1]
    context_lens: IntArray  # [R]
    block_tables: IntArray  # [R, most blocks of any], padded with 0
    logit_rows: IntArray  # rows of T whose logits are wanted, ascending


class Backend(Protocol):
    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> Any:
        """A KV arena in this backend's own layout. Only this backend looks inside."""
        ...

    def run(self, step: StepArrays, kv: Any) -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary], in fp32."""
        ...
