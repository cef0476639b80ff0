"""A model as a flat list of operations over named weights and buffers.

Knows neither how a checkpoint stores its tensors (checkpoints/checkpoint.py does) nor how an
operation is computed (backends/ do). The same Program is run, priced, and rewritten (rewrites/).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from duetto.program.cut import WeightPart
from duetto.program.op import Op, Ref
from duetto.program.shape import ZERO_COST, BatchShape, Cost, Precision


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight of the program: the checkpoint's tensors named in `sources`, stacked by rows.

    Stacking lets a checkpoint with separate query, key and value projections and one with a fused
    projection give the same program.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_rows: tuple[int, ...]  # of each source; they add up to shape[0]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """One layer's KV: per token, a key and a value of num_kv_heads * head_dim numbers each."""

    num_kv_heads: int
    head_dim: int

    @property
    def numbers_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Program:
    ops: tuple[Op, ...]
    weights: Mapping[str, WeightSpec]
    buffers: Mapping[str, int]  # name -> columns
    kv: tuple[KVSpec, ...]  # one per layer
    logits: Ref  # [logit rows, vocabulary]; without its head (rewrites/headless.py): hidden states
    max_model_len: int  # of any request; frequencies were chosen for this length or a longer one
    is_headless: bool = False  # `logits` are the selected rows' hidden states
    # Of a part of a program (rewrites/):
    parts: Mapping[str, WeightPart] = field(default_factory=dict)  # a rank's; others are whole
    inputs: tuple[Ref, ...] = ()  # what a stage has from the stage before
    outputs: tuple[Ref, ...] = ()  # what it gives to the stage behind

    @property
    def is_whole(self) -> bool:
        """Whether it is not one rank's, nor one stage of several."""
        return not (self.parts or self.inputs or self.outputs)

    @property
    def results(self) -> tuple[Ref, ...]:
        """What is wanted of it: the logits, but of a stage that has others behind it."""
        return self.outputs or (self.logits,)

    @property
    def vocab_size(self) -> int:
        assert not self.is_headless, "it has no logits"
        return self.logits.width

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint: a tensor that two weights share counts once."""
        sizes: dict[tuple[str, ...], int] = {}
        for spec in self.weights.values():
            size = 1
            for extent in spec.shape:
                size *= extent
            sizes[spec.sources] = size
        return sum(sizes.values())

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers whose KV it has: of a stage, its own."""
        return tuple(layer for layer, spec in enumerate(self.kv) if spec.num_kv_heads)

    def kv_bytes_per_token(self, kv_bytes: float) -> int:
        return int(sum(spec.numbers_per_token for spec in self.kv) * kv_bytes)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        """The whole step. For times, price operation by operation: a sum of maxima, not this."""
        return sum((op.cost(shape, precision) for op in self.ops), ZERO_COST)
