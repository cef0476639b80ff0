"""The KV of ShadowExecutor (fakes.py): what stands for KV, attention and the choice of tokens.

All are hashes of ints, so they are the same in every process, and another history gives another
one. What looks choose is chosen here by the dumbest route.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil

from duetto.core.batch import ScheduledRequest
from duetto.core.request import Request
from duetto.core.reuse import Reuse


def shadow_kv(history: Sequence[int], token_id: int) -> int:
    """Stands in for K and V at one position: depends on this token and every position before."""
    return hash((*history, token_id))  # of ints only, so it is the same in every process


def shadow_kvs(token_ids: Sequence[int]) -> list[int]:
    """The KV of every position of a text."""
    kvs: list[int] = []
    for token_id in token_ids:
        kvs.append(shadow_kv(kvs, token_id))
    return kvs


def shadow_moved(kv: int, distance: int) -> int:
    """The KV of a text that was computed elsewhere, brought `distance` positions on."""
    return hash((kv, 0x5EED, distance)) if distance else kv


def shadow_attention(query: int, key: int) -> int:
    """How much a token attends to one before it, in whole units: few, so that many are equal."""
    return hash((query, key)) % 3


def shadow_deviation(old: int, token_ids: Sequence[int]) -> int:
    """How far the first layers of the last of these tokens are from what lies in its place."""
    return hash((old, *token_ids)) % 11


def shadow_looked(old: int, token_ids: Sequence[int]) -> int:
    """What lies there then: the first layers are new, the others are not."""
    return hash((old, 0x10C, *token_ids))


def shadow_prompt_kvs(request: Request) -> list[int]:
    """The KV of a prompt of which some is reused: each text alone, and what comes after it reads
    what was brought there. What looks choose is chosen by the dumbest route."""
    prompt, reuse = request.prompt_token_ids, request.reuse
    if reuse is None:
        return shadow_kvs(prompt)
    moved: dict[int, int] = {}
    for start, end in reuse.segments:
        alone = shadow_kvs(prompt[start:end])
        moved |= {start + i: shadow_moved(kv, start) for i, kv in enumerate(alone)}
    places = [p for start, end in reuse.reused(len(prompt)) for p in range(start, end)]
    moved = {p: moved[p] for p in places}
    if reuse.method == "hkvd" and reuse.ratio:
        scores = {p: shadow_deviation(kv, prompt[: p + 1]) for p, kv in moved.items()}
        chosen = _largest(scores, ceil(Fraction(str(reuse.ratio)) * len(places)))
        moved = {p: shadow_looked(kv, prompt[: p + 1]) for p, kv in moved.items()}
        moved = {p: kv for p, kv in moved.items() if p not in chosen}
    if reuse.method == "query" and places:
        chosen, question = set[int](), places[-1] + 1
        for number in range(1, reuse.num_rounds + 1):
            kvs = _beside(prompt, moved)
            looking = [*chosen] if number > 1 else [*range(question, len(prompt))]
            scores = {
                p: sum(shadow_attention(kvs[at], kv) for at in looking if at > p)
                for p, kv in moved.items()
            }
            count = num_chosen(reuse, len(places), number) - len(chosen)
            if reuse.num_rounds == 1:
                chosen = with_what_stands_before(scores, count, reuse)
            else:
                chosen |= _largest(scores, count)
            moved = {p: kv for p, kv in moved.items() if p not in chosen}
    return _beside(prompt, moved)


def num_chosen(reuse: Reuse, num_candidates: int, number: int) -> int:
    """After so many rounds: 7 of 10 after the first one, then even parts of the others."""
    count = ceil(Fraction(str(reuse.ratio)) * num_candidates)
    if number == reuse.num_rounds:
        return count
    first = ceil(Fraction(7, 10) * count)
    return first + ceil(Fraction(count - first) * (number - 1) / (reuse.num_rounds - 1))


def with_what_stands_before(scores: Mapping[int, float], count: int, reuse: Reuse) -> set[int]:
    """Three of five by rank; then of each of these what stands before it, if it has a score: the
    token, if it is of the same text, and the end of the text before; then by rank again."""
    ranked = sorted(scores, key=lambda p: (-scores[p], p))
    starts = [start for start, _ in reuse.segments]
    found = ranked[: -(-3 * count // 5)]
    for place in list(found):
        own_start = max(start for start in starts if start <= place)
        wanted = [place - 1] if place > own_start else []
        wanted += sorted(p for p in scores if p < own_start)[-1:]
        found += [p for p in wanted if p in scores and p not in found]
    found += [p for p in ranked if p not in found]
    return set(found[:count])


def _beside(prompt: Sequence[int], reused: Mapping[int, int]) -> list[int]:
    """The KV of a prompt, of which some is there."""
    kvs: list[int] = []
    for position, token_id in enumerate(prompt):
        kvs.append(reused[position] if position in reused else shadow_kv(kvs, token_id))
    return kvs


def _largest(scores: Mapping[int, int], count: int) -> set[int]:
    """Positions; of equal scores the smaller ones."""
    return set(sorted(sorted(scores), key=lambda p: scores[p], reverse=True)[:count])


def shadow_token(last_kv: int, seed: int, num_output_tokens: int, forbidden: Sequence[int]) -> int:
    """A token that depends on the whole context and on the request's own random stream."""
    token_id = hash((last_kv, seed, num_output_tokens)) % 7 + 1
    while token_id in forbidden:
        token_id += 1
    return token_id


def shadow_attended(item: ScheduledRequest, kvs: Sequence[int]) -> tuple[float, ...]:
    """What a look at attention is told: of tokens before each of those that the step computes."""
    if item.look is None:
        return ()
    assert not item.rows, "it looks and samples"
    positions = [p for start, end in item.look.ranges for p in range(start, end)]
    assert positions and positions == sorted({*positions}), "looks at a token twice"
    assert positions[-1] < item.end - 1, "looks at what nobody attends to"
    queries = [p for run in item.runs for p in range(*run)]
    assert not {*queries} & {*positions}, "looks at what it computes"
    return tuple(
        [sum(shadow_attention(kvs[q], kvs[p]) for q in queries if q > p) for p in positions]
    )
