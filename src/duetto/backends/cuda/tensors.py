"""What kernels take: a step's tensors, a weight, a layer's KV. Knows no kernel and no program."""

from typing import NamedTuple

from torch import Tensor

from duetto.backends.cuda.formats import GpuFormat


class QueryTiles(NamedTuple):
    """Tiles of packed query rows that one launch of attention computes. A run's rows are (token,
    head of the group), token by token, of each KV head; tile t begins at t * rows_per_tile."""

    runs: Tensor  # [n] int32
    tiles: Tensor  # [n] int32
    rows_per_tile: int
    # [n] int32, of `few` only: how many packed rows there are in the tiles before, which is where
    # kernels/merge.Partials has this one's. A tile has rows_per_tile rows, the last of a run fewer.
    first_rows: Tensor | None = None


class StepTensors(NamedTuple):
    """StepArrays on the device, all int32. They may be longer than the step: what is beyond is
    padding, which writes to the scratch block."""

    token_ids: Tensor  # [T]
    feedback: Tensor  # [T]: -1, or the row of `sampled` that is the token
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    query_starts: Tensor  # [R + 1]
    context_lens: Tensor  # [R]
    block_tables: Tensor  # flat: run r's begins at r * table_width[0]
    table_width: Tensor  # [1]
    logit_rows: Tensor  # [L]
    # Tiles of 16 rows, whose splits are shared out among programs, then merged; and longer
    # tiles, each of which one program walks. A run is in one of the two, whole.
    few: QueryTiles | None
    many: QueryTiles | None


class Matrix(NamedTuple):
    """A weight [N, K] on the device, as its format keeps it (backends/cuda/formats.py).

    float32, float16, bfloat16: data [N, K]. int8: data [N, K], scales [N, ceil(K / group)] fp32,
    which lie group by group: a program reads one group's of many outputs.
    int4: data [N, K / 2] uint8, K padded to whole groups of 64, of which byte j has number j, plus
    8, in its low half and number j + 32, plus 8, in its high half; numbers are -8 ... 7; scales as
    int8's. fp8: data [N, K] e4m3, scales [N] fp32.
    """

    format: GpuFormat
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None


class LayerKV(NamedTuple):
    """One layer's keys and values. int8 and fp8 (e4m3) have an fp32 scale per slot and head."""

    keys: Tensor  # [slots, kv_heads, head_dim]
    values: Tensor
    key_scales: Tensor | None = None  # [slots, kv_heads] fp32
    value_scales: Tensor | None = None
