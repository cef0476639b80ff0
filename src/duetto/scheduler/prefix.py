"""A request's chain of block hashes: what it may reuse, and what it makes findable.

The chain of a request covers every full block of the tokens it has, computed or not, so others can
also see what it is about to compute. Each block is hashed once in a request's life.
"""

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockHash, BlockPool, next_hash, root_hash


def reusable_hashes(request: Request, config: SchedulerConfig) -> list[BlockHash]:
    """Hashes of the blocks that may be reused, first block first.

    Not of the block with the last token, since at least one token must be computed to give logits;
    and none at all if the prompt itself is to be scored.
    """
    if not config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
        return []
    _hash_full_blocks(request, config)
    return request.block_hashes[: (request.num_tokens - 1) // config.block_size]


def uncomputed_hashes(request: Request, config: SchedulerConfig) -> list[BlockHash]:
    """Hashes of the blocks that this request will publish: what is in flight too."""
    return request.block_hashes[request.num_written_tokens // config.block_size :]


def publish_full_blocks(request: Request, config: SchedulerConfig, pool: BlockPool) -> None:
    """Make every block findable that is full of known tokens and written: what was rejected, or is
    a placeholder, is not. For who has prefix caching."""
    _hash_full_blocks(request, config)
    num_exact = request.num_exact_tokens  # what comes after is approximate, and never found
    num_full = min(request.num_written_tokens, num_exact) // config.block_size
    for index in range(request.num_published_blocks, num_full):
        pool.publish(request.block_table[index], request.block_hashes[index])
    request.num_published_blocks = num_full


def publish_source(source: Source, end: int, config: SchedulerConfig, pool: BlockPool) -> range:
    """The first `end` tokens of a text are written: make their blocks findable; the last one too,
    which need not be full: nobody adds to it. Which of its blocks are new."""
    size, start = config.block_size, source.num_written
    source.num_written = end
    is_whole = end == len(source.token_ids)
    last = config.num_blocks_for(end) if is_whole else end // size
    written = range(start // size, last)
    for index in written:
        pool.publish(source.blocks[index], source.hashes[index])
    return written


def _hash_full_blocks(request: Request, config: SchedulerConfig) -> None:
    size, hashes = config.block_size, request.block_hashes
    for start in range(len(hashes) * size, request.num_exact_tokens - size + 1, size):
        parent = hashes[-1] if hashes else root_hash(config.cache_namespace, request.cache_salt)
        hashes.append(next_hash(parent, request.token_ids[start : start + size]))
