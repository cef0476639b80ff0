"""How much KV cache to take, and how long a request may therefore be.

Knows a program's KV per token and a number of bytes; not where the bytes lie, and no weights.
"""

from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.program.dtype import KVDtype, kv_head_bytes
from duetto.program.program import Program

MAX_SLOTS = 2**31  # slots travel as int32
_DEFAULT_SHARE = 0.25  # of the available memory; the rest is for activations and the machine
_MOST_BLOCKS = 2**20  # by default: who decides about them keeps a little of each


@dataclass(frozen=True, slots=True)
class KVPlan:
    """A KV cache that fits. `notes` says, for people, what was chosen on their behalf."""

    num_blocks: int
    max_model_len: int
    memory_bytes: int
    notes: tuple[str, ...] = ()


def bytes_per_block(program: Program, block_size: int, kv_dtype: KVDtype) -> int:
    """Of all layers, with nothing between the numbers: a backend's own layout may add padding."""
    return block_size * sum(
        2 * layer.num_kv_heads * kv_head_bytes(kv_dtype, layer.head_dim) for layer in program.kv
    )


def kv_number_bytes(program: Program, kv_dtype: KVDtype) -> float:
    """Bytes per number of KV, scales included."""
    numbers = sum(layer.numbers_per_token for layer in program.kv)
    return bytes_per_block(program, 1, kv_dtype) / numbers


def plan_kv(
    program: Program,
    *,
    block_size: int,
    block_bytes: int,
    max_num_seqs: int,
    memory_bytes: int | None,
    available_bytes: int,
    may_shorten: bool,
    takes_all: bool = False,
) -> KVPlan:
    """Size the cache for requests of `program.max_model_len` tokens, in blocks of `block_bytes`.

    The rule:

    - `memory_bytes`, where it is given, is used in full. Otherwise a quarter of the available
      memory is, but no more than `max_num_seqs` requests of the greatest length can fill; or all,
      where it is there for nothing else (`takes_all`).
    - If one request of that length does not fit, the length becomes what fits if it
      `may_shorten`; if not, more of the available memory is taken, as long as `memory_bytes`
      was not given.

    Raises ConfigError, with the numbers and the flags to change, if that is not enough.
    """
    length = program.max_model_len
    needed = -(-length // block_size)  # blocks of one request of that length
    limit = available_bytes if memory_bytes is None else memory_bytes
    num_blocks = min(limit // block_bytes, MAX_SLOTS // block_size)
    if memory_bytes is None and takes_all:
        num_blocks = min(num_blocks, _MOST_BLOCKS)
    elif memory_bytes is None:
        num_blocks = default_kv_blocks(
            program,
            block_size=block_size,
            block_bytes=block_bytes,
            max_num_seqs=max_num_seqs,
            available_bytes=available_bytes,
            may_shorten=may_shorten,
        )
    if num_blocks >= needed:
        return KVPlan(num_blocks, length, num_blocks * block_bytes)

    fitting, needed_bytes = num_blocks * block_size, needed * block_bytes
    if not may_shorten or fitting == 0:
        origin = "are left beside the weights" if memory_bytes is None else "are given to it"
        raise ConfigError(
            f"--max-model-len {length}: the KV cache of one such request takes "
            f"{_size(needed_bytes)}, and {_size(limit)} {origin}, enough for {fitting} tokens; "
            f"lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    note = (
        f"max_model_len is {fitting}, not the model's {length}: the KV cache of one request that "
        f"long takes {_size(needed_bytes)}, more than the {_size(num_blocks * block_bytes)} set "
        f"aside (--max-model-len or --kv-cache-memory-bytes change this)"
    )
    return KVPlan(num_blocks, fitting, num_blocks * block_bytes, (note,))


def default_kv_blocks(
    program: Program,
    *,
    block_size: int,
    block_bytes: int,
    max_num_seqs: int,
    available_bytes: int,
    may_shorten: bool,
) -> int:
    """How many blocks the rule of `plan_kv` takes where nobody says how much memory KV has."""
    needed = -(-program.max_model_len // block_size)
    share = int(available_bytes * _DEFAULT_SHARE) // block_bytes
    floor = 0 if may_shorten else needed
    wanted = max(floor, min(share, max_num_seqs * needed))
    return min(available_bytes // block_bytes, MAX_SLOTS // block_size, wanted)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
