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
from duetto.core.reuse import Source, Text, TokenRange
from duetto.core.reuse_count import ReuseCount, count_reuse
from duetto.scheduler.block_pool import BlockHash, BlockPool, next_hash, root_hash
from duetto.scheduler.choice import next_in_stage, num_in_stage


def num_wanted(request: Request, num_past: int, sources: Sequence[Source] = ()) -> int:
    """Tokens that a request lacks after its first `num_past`: those of its own that are to be
    computed, or up to its next stage; or first those of a text that is not there (of `sources`, if
    it is not admitted)."""
    num_left = len(request.token_ids) + request.num_pending_tokens - num_past
    if not request.candidates:
        return num_left
    source = next_source(sources or request.sources)
    if source is not None:
        return source.num_left
    if request.choosing is not None:
        return num_in_stage(request.choosing, num_past)
    if num_past >= request.candidates[-1].end:
        return num_left
    return num_left - sum([max(0, end - max(start, num_past)) for start, end in request.reused])


def next_source(sources: Sequence[Source]) -> Source | None:
    """The first text that is still to be computed."""
    return next((source for source in sources if source.num_left), None)


def find_sources(request: Request, config: SchedulerConfig, pool: BlockPool) -> list[Source]:
    """The texts that a request reuses, each once, with the blocks that are there."""
    if not request.candidates:
        return []
    if request.texts is None:
        request.texts = _texts(request, config)
    return [_found(text, config, pool) for text in request.texts]


def _texts(request: Request, config: SchedulerConfig) -> tuple[Text, ...]:
    """Hashed once in a request's life."""
    places: dict[tuple[int, ...], list[int]] = {}
    for start, end in request.reuse.segments if request.reuse is not None else ():
        if any(start <= reused.start < end for reused in request.candidates):
            places.setdefault(request.prompt_token_ids[start:end], []).append(start)
    salt = request.cache_salt
    return tuple(
        [Text(ids, tuple(at), text_hashes(ids, config, salt)) for ids, at in places.items()]
    )


def _found(text: Text, config: SchedulerConfig, pool: BlockPool) -> Source:
    token_ids, places, hashes = text
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


def moves(request: Request, positions: Sequence[int]) -> tuple[KVMove, ...]:
    """What a step, which computes these positions, is to bring to its places first: all texts, once
    and at once. But a look at deviations writes where they are, so that each of its steps brings
    what it looks at itself: then it may be computed again."""
    if request.has_moved:
        return ()
    wanted = request.candidates
    if request.choosing is not None and request.choosing.stages[-1].method == "deviation":
        first, end = positions[0], positions[-1] + 1
        wanted = tuple([TokenRange(max(r.start, first), min(r.end, end)) for r in wanted])
    found = []
    for source in request.sources:
        for place in source.places:
            for start, end in wanted:
                if place <= start < min(end, place + len(source.token_ids)):
                    found.append(KVMove(tuple(source.blocks), start - place, end - place, start))
    return tuple(found)


def brings_the_last(request: Request, item: ScheduledRequest) -> bool:
    """Whether everything that a request reuses is in its place behind this step."""
    last = request.candidates[-1].end
    return any(move.position + move.end - move.start == last for move in item.moves)


def next_positions(request: Request, num_past: int, count: int) -> Sequence[int]:
    """The positions of the next `count` tokens that are to be computed after the first
    `num_past`."""
    start, left = num_past, count
    if request.choosing is not None:
        return next_in_stage(request.choosing, start, count)
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
    return positions


def counted_reuse(request: Request) -> ReuseCount | None:
    """For who asked for reuse: what came of it."""
    if request.reuse is None:
        return None
    return count_reuse(
        request.reuse,
        request.reused,
        request.num_prompt_tokens,
        num_exact=request.num_cached_tokens,
        num_missing=request.num_missing_tokens,
        why_not=request.why_not_reused,
    )
