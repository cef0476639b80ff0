"""Which tokens of a prompt a request need not compute, since texts' own KV is brought there.

A text's own KV is the exact KV of a prompt that is the text alone, so it lies in ordinary blocks,
findable under its own chain of hashes; only its last block, which need not be full, has a hash of
its own. A request computes the texts that are not there, each alone, then moves them, then computes
the rest of its prompt. Which tokens are computed depends on the request alone, never on what the
cache held; so does the answer. Changes nothing.
"""

from collections.abc import Sequence

from duetto.core.batch import KVMove, ScheduledRequest
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockHash, BlockPool, next_hash, root_hash


def num_wanted(request: Request, num_past: int, sources: Sequence[Source] = ()) -> int:
    """Tokens that a request lacks after its first `num_past`: those of its own that are to be
    computed, or first those of a text that is not there (of `sources`, if it is not admitted)."""
    num_left = len(request.token_ids) + request.num_pending_tokens - num_past
    if not request.reused:
        return num_left
    source = next_source(sources or request.sources)
    if source is not None:
        return source.num_left
    return num_left - sum([max(0, end - max(start, num_past)) for start, end in request.reused])


def next_source(sources: Sequence[Source]) -> Source | None:
    """The first text that is still to be computed."""
    return next((source for source in sources if source.num_left), None)


def find_sources(request: Request, config: SchedulerConfig, pool: BlockPool) -> list[Source]:
    """The texts that a request reuses, each once, with the blocks that are there."""
    places: dict[tuple[int, ...], list[int]] = {}
    for start, end in request.reuse.segments if request.reuse is not None else ():
        if any(start <= reused.start < end for reused in request.reused):
            places.setdefault(request.prompt_token_ids[start:end], []).append(start)
    return [_found(request, ids, tuple(at), config, pool) for ids, at in places.items()]


def _found(
    request: Request,
    token_ids: tuple[int, ...],
    places: tuple[int, ...],
    config: SchedulerConfig,
    pool: BlockPool,
) -> Source:
    hashes = text_hashes(token_ids, config, request.cache_salt)
    blocks = pool.find(hashes)
    num_there = min(len(blocks) * config.block_size, len(token_ids))
    return Source(token_ids, places, hashes, blocks, num_there, num_there)


def text_hashes(
    token_ids: tuple[int, ...], config: SchedulerConfig, salt: bytes
) -> list[BlockHash]:
    """Of all blocks of a text; the last one's says how many tokens it has."""
    size, parent = config.block_size, root_hash(config.cache_namespace, salt)
    hashes: list[BlockHash] = []
    for start in range(0, len(token_ids), size):
        parent = next_hash(parent, token_ids[start : start + size])
        hashes.append(parent)
    return hashes


def unwritten_hashes(request: Request, config: SchedulerConfig) -> list[BlockHash]:
    """Of the texts that a request is computing, the blocks that others will find."""
    return [h for s in request.sources for h in s.hashes[s.num_written // config.block_size :]]


def plan_source(request: Request, source: Source, count: int) -> ScheduledRequest:
    """The next `count` tokens of a text, alone."""
    start = source.num_computed
    return ScheduledRequest(
        request.request_id,
        source.token_ids[start : start + count],
        start,
        tuple(source.blocks),
        epoch=request.timings.num_preemptions,
        source=request.sources.index(source),
    )


def moves(request: Request) -> tuple[KVMove, ...]:
    """What brings the texts to their places; () once that has been done."""
    if request.has_moved:
        return ()
    found = []
    for source in request.sources:
        for place in source.places:
            for start, end in request.reused:
                if place <= start < place + len(source.token_ids):
                    found.append(KVMove(tuple(source.blocks), start - place, end - place, start))
    return tuple(found)


def next_positions(request: Request, count: int) -> tuple[int, ...] | None:
    """The positions of the next `count` tokens that are to be computed; None if no gap is there."""
    start, left = request.num_computed_tokens, count
    positions: list[int] = []
    for reused in request.reused:
        if reused.end <= start:
            continue
        run = range(start, min(max(start, reused.start), start + left))
        positions += run
        left -= len(run)
        if not left:
            break
        start = reused.end
    positions += range(start, start + left)
    has_gap = positions[-1] - positions[0] >= count
    return tuple(positions) if has_gap or positions[0] != request.num_computed_tokens else None
