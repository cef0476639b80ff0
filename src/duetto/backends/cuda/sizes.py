"""How much a GPU backend holds beside weights and KV: known before there is a GPU. No torch."""

from collections.abc import Mapping
from typing import NamedTuple

from duetto.backends.cuda.limits import StepLimits
from duetto.program.op import Op
from duetto.program.ops import Attention, Rope
from duetto.program.program import Program
from duetto.program.rewrites.runs import GPU_RUNS, FusedRun, fuse_runs
from duetto.program.shape import SELECTED

SPLIT = 512  # positions of a split of attention; splits stand at its multiples
KEY_BLOCK = 64  # keys that are multiplied at a time; blocks stand at its multiples
FEW_ROWS = 16  # of a tile of queries whose splits are shared out
SAMPLER_CHUNK = 4096  # logits of a row that one program looks at
SAMPLER_PARTS = 8  # of a chunk, of which the largest logits are kept
SAMPLER_LIST = 2048  # tokens of a row that are gathered for top_k
_FP32 = 4


class BufferSize(NamedTuple):
    width: int
    is_selected: bool  # its rows are those whose logits are wanted
    is_float: bool  # logits are in fp32, all others in the model's dtype


def buffer_sizes(program: Program) -> Mapping[str, BufferSize]:
    """Of the buffers that a fused program uses; what its runs drop needs none."""
    selected = {r.buffer for op in program.ops if op.rows == SELECTED for r in op.writes}
    used = {ref.buffer for op in program.ops for ref in (*op.reads, *op.writes)}
    logits = None if program.is_headless else program.logits.buffer
    return {
        name: BufferSize(width, name in selected, name == logits)
        for name, width in program.buffers.items()
        if name in used
    }


def parts_of(program: Program) -> list[Op]:
    """All operations, those of runs one by one."""
    parts: list[Op] = []
    for op in program.ops:
        parts += op.parts if isinstance(op, FusedRun) else (op,)
    return parts


def num_splits(max_model_len: int) -> int:
    return -(-max_model_len // SPLIT)


def partials_bytes(num_rows: int, num_heads: int, head_dim: int, max_model_len: int) -> int:
    """Sums of splits of num_rows query tokens: a largest exponent, a sum, and values."""
    return num_rows * num_heads * num_splits(max_model_len) * (head_dim + 2) * _FP32


def held_bytes(program: Program, limits: StepLimits, number_bytes: int) -> int:
    """Buffers, sines and cosines, sums of splits, and what the sampler keeps of chunks; of a
    program as a model gives it, whose numbers take number_bytes. What comes with a step (ids,
    tables) is less than the room that an allocator leaves between these."""
    fused = fuse_runs(program, GPU_RUNS)
    return (
        _buffer_bytes(fused, limits, number_bytes)
        + _rotation_bytes(fused)
        + _partials_bytes(fused, limits)
        + _sampler_bytes(fused, limits)
    )


def _buffer_bytes(program: Program, limits: StepLimits, number_bytes: int) -> int:
    total = 0
    for size in buffer_sizes(program).values():
        rows = limits.num_logit_rows if size.is_selected else limits.num_tokens
        total += rows * size.width * (_FP32 if size.is_float else number_bytes)
    return total


def _rotation_bytes(program: Program) -> int:
    specs = {op.spec for op in parts_of(program) if isinstance(op, Rope)}
    return sum(program.max_model_len * spec.rotary_dim * _FP32 for spec in specs)


def most_partials(program: Program) -> tuple[int, int]:
    """Heads, and numbers of one, of the layers whose sums of splits take the most room."""
    heads = {(op.num_heads, op.head_dim) for op in parts_of(program) if isinstance(op, Attention)}
    return max(heads, key=lambda pair: pair[0] * (pair[1] + 2))


def _partials_bytes(program: Program, limits: StepLimits) -> int:
    num_heads, head_dim = most_partials(program)
    return partials_bytes(limits.num_few_tokens, num_heads, head_dim, limits.max_model_len)


def _sampler_bytes(program: Program, limits: StepLimits) -> int:
    width = program.logits.width
    numbers = -(-width // SAMPLER_CHUNK) * (5 + SAMPLER_PARTS) + 2 * sampler_list(width)
    return limits.num_logit_rows * numbers * _FP32


def sampler_list(vocab_size: int) -> int:
    """Tokens of a row that are gathered at most: a power of two."""
    return min(SAMPLER_LIST, 1 << (vocab_size - 1).bit_length())
