"""What every backend is: something that runs a Program over one step's arrays.

A backend knows tokens, positions, slots and blocks. It knows no request, no schedule and no
sampling. It is constructed with a Program and its weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from duetto.backends.blocks import Bytes
from duetto.program.dtype import KVDtype

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
ScoreArray = NDArray[np.float64]


class StepArrays(NamedTuple):
    """One step as arrays. T tokens in R runs of positions, concatenated in the batch's order.

    A request is one run, or several over the same blocks where its positions have gaps. Run r's
    tokens are rows query_starts[r] ... query_starts[r + 1]; it attends to context_lens[r] tokens,
    the last of which are these. Token at position p of run r has its KV in slot
    block_tables[r, p // block_size] * block_size + p % block_size.
    """

    token_ids: IntArray  # [T]
    positions: IntArray  # [T]
    slots: IntArray  # [T]: where this step writes each token's KV
    query_starts: IntArray  # [R + 1]
    context_lens: IntArray  # [R]
    block_tables: IntArray  # [R, most blocks of any], padded with 0
    logit_rows: IntArray  # rows of T whose logits are wanted, ascending


class KVMoves(NamedTuple):
    """N tokens whose KV is to lie elsewhere too. No slot is both read and written."""

    from_slots: IntArray  # [N]
    to_slots: IntArray  # [N]
    from_positions: IntArray  # [N]: those that the keys were turned for
    to_positions: IntArray  # [N]


class AttentionLook(NamedTuple):
    """Whose attention is told beside a step: that of all tokens of runs first ... last, which are
    one request's, to some of its positions."""

    first: int
    last: int  # not included
    positions: IntArray  # ascending, at least one


class LayersDone(NamedTuple):
    """How far a step is. Layers count from the first on, and their KV, of all the step's tokens,
    is written and stays as it is in that step."""

    step: int  # how many steps have begun: it is this one that `layers` is of
    layers: int


class Backend(Protocol):
    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> Any:
        """A KV arena in this backend's own layout. Only this backend looks inside."""
        ...

    def run(self, step: StepArrays, kv: Any) -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary], in fp32. Raises
        for a slot or a block outside the arena: it would be another request's, or nobody's."""
        ...

    def move_kv(self, moves: KVMoves, kv: Any) -> None:
        """Bring tokens' KV to other slots: values as they are stored, keys turned in fp32 for
        other positions and stored again. The twin is backends/reference."""
        ...

    def read_kv(self, layer: int, slots: IntArray, kv: Any) -> tuple[FloatArray, FloatArray]:
        """The keys and values in some slots, [N, kv_heads, head_dim] each, in fp32."""
        ...

    def look_attention(
        self, step: StepArrays, kv: Any, looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """As `run`, to the bit; and of each look, for each of its positions, how much attention
        its tokens give to it: the sum over layers, query heads and tokens of weights that are each
        rounded to whole units of core/batch.ATTENTION_UNIT. Sums are whole, so they do not depend
        on how tokens are shared out among steps. NaN, all of a look's, if one of its tokens has
        weights that are no numbers."""
        ...

    def look_deviation(self, step: StepArrays, kv: Any) -> ScoreArray:
        """Compute the step's tokens up to their KV in layer 1, write both layers' KV, and return,
        for each token, how far its key and value in layer 1 are from what lay in its slot: the
        squared differences of all heads' numbers, as they are stored. No logits: the step has no
        logit_rows. Raises EngineError, having done nothing, if the model has one layer only."""
        ...

    def export_blocks(
        self, kv: Any, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """The bytes of whole blocks, all layers, into `out`: [len(blocks), bytes of a block]. What
        they mean is the backend's own; they fit any arena of equal blocks. `num_tokens` of each
        block, unless all are full: zeros for what lies behind them."""
        ...

    def import_blocks(self, kv: Any, blocks: Sequence[int], data: Bytes) -> None:
        """The bytes that `export_blocks` gave, into blocks of the arena."""
        ...

    def block_rows(self, kv: Any) -> Sequence[Sequence[Bytes]]:
        """Of each layer, the arena's own memory as arrays [num_blocks, bytes]: a block's bytes,
        as any arena of equal blocks has them. Raises EngineError where the host does not see an
        arena's memory."""
        ...

    @property
    def layers_done(self) -> LayersDone:
        """Of the step that runs, or ran last. Any thread may ask while it runs. A step that is
        refused does not begin."""
        ...
