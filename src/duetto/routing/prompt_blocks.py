"""The blocks of a prompt that a worker may have cached, under the hashes that workers use."""

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.block_pool import BlockHash, next_hash, root_hash


def prompt_hashes(request: Request, config: SchedulerConfig) -> list[BlockHash]:
    """Of the blocks of a prompt that a worker would look for (scheduler/prefix.py): its last token
    is computed anyway. `config` is the workers'."""
    if not config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
        return []
    prompt, size = request.prompt_token_ids, config.block_size
    end = min(len(prompt) - 1, request.num_exact_tokens)
    parent, hashes = root_hash(config.cache_namespace, request.cache_salt), []
    for start in range(0, end - size + 1, size):
        parent = next_hash(parent, prompt[start : start + size])
        hashes.append(parent)
    return hashes
