"""Which tokens of reused texts are computed after all, where that is chosen by looks.

A request that chooses goes through stages (core/reuse.Stage); then its round ends: it chooses, and
its progress goes back to what it computes anew.

    hkvd   own tokens before the texts | a look at all up to the last text's end, layers 0 and 1
    query  own tokens                  | the question, which looks at the texts
           then, in each further round, from the first chosen token to the last one: own tokens, and
           chosen ones, which look

What is chosen depends on the request alone, neither on how its stages are cut into steps nor on
preemptions, after which it begins anew. Knows no blocks, no budget and no other request.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from heapq import nsmallest
from itertools import groupby
from math import ceil

from duetto.core.batch import Look, ScheduledRequest
from duetto.core.request import Request
from duetto.core.reuse import Choosing, LookMethod, Stage, TokenRange

OWN_SHARE = Fraction(6, 10)  # of what a question chooses at once (docs/design/reuse.md)


def begin(request: Request) -> None:
    """Nothing is chosen (any more)."""
    request.reused, request.choosing = request.candidates, None
    if request.reuse is None or not request.candidates:
        return
    rounds = request.reuse.rounds(sum([end - start for start, end in request.candidates]))
    if rounds:
        is_query = request.reuse.method == "query"
        stages = _asking_stages(request) if is_query else _hkvd_stages(request)
        request.choosing = Choosing(rounds, stages)


def num_in_stage(choosing: Choosing, num_past: int) -> int:
    """Tokens after the first `num_past` up to the end of their stage; 0 at the end of a round,
    whose results are on their way."""
    stage = _stage_at(choosing, num_past)
    if stage is None:
        return 0
    return sum([max(0, end - max(start, num_past)) for start, end in stage.runs])


def next_in_stage(choosing: Choosing, num_past: int, count: int) -> list[int]:
    """The positions of the next `count` of them."""
    stage, found = _stage_at(choosing, num_past), list[int]()
    for start, end in stage.runs if stage is not None else ():
        first = max(start, num_past)
        found += range(first, min(end, first + count - len(found)))
    return found


def look_method(request: Request, last: int) -> LookMethod | None:
    """How a step looks whose last token is at this position."""
    stage = None if request.choosing is None else _stage_at(request.choosing, last)
    return None if stage is None else stage.method


def look_at(request: Request, last: int) -> Look | None:
    """What such a step tells."""
    method = look_method(request, last)
    if method is None:
        return None
    if method == "deviation":
        return Look("deviation")
    before = tuple([reused for reused in request.reused if reused.start < last])
    return Look("attention", before) if before else None


def take_look(request: Request, item: ScheduledRequest, looked: tuple[float, ...]) -> None:
    """Add what a step told. If it was the last one of the round: choose, and go back."""
    choosing, look = request.choosing, item.look
    assert choosing is not None and look is not None, "a look of another stage"
    ranges = item.runs if look.method == "deviation" else look.ranges
    positions = [p for start, end in ranges for p in range(start, end)]
    scores = choosing.scores
    for position, score in zip(positions, looked, strict=True):
        scores[position] = scores.get(position, 0) + score
    if request.num_written_tokens == choosing.stages[-1].end:
        _choose(request, choosing)


def _choose(request: Request, choosing: Choosing) -> None:
    """Choose for this round, and go back; or go on with what is chosen."""
    left = _choose_round(request, choosing, choosing.scores)
    is_over = choosing.num_done == len(choosing.rounds)
    while not is_over and left[0] > choosing.chosen[-1]:  # who would look has nothing to look at
        left = _choose_round(request, choosing, {})
        is_over = choosing.num_done == len(choosing.rounds)
    # What comes before is as it was, but for what a look at deviations wrote.
    has_all_layers = choosing.stages[-1].method == "attention"
    start = choosing.chosen[0] if has_all_layers else request.candidates[0].start
    request.num_computed_tokens = request.num_written_tokens = start
    if is_over:
        request.choosing = None
    else:
        choosing.scores = {}
        choosing.stages = _seeking_stages(request, choosing.chosen)


def _choose_round(request: Request, choosing: Choosing, scores: Mapping[int, float]) -> list[int]:
    """The largest scores, of equal ones those at smaller positions. What nobody looked at has a
    score of 0. Returns what is left."""
    left = [p for start, end in request.reused for p in range(start, end)]
    number = choosing.rounds[choosing.num_done] - len(choosing.chosen)

    def order(position: int) -> tuple[float, int]:
        score = scores.get(position, 0)
        return -score if score == score else float("-inf"), position  # no number: better computed

    if request.reuse is not None and request.reuse.asks_once:
        best = {*_with_what_stands_before(sorted(left, key=order), number, request.candidates)}
    else:
        best = {*nsmallest(number, left, key=order)}
    choosing.chosen = tuple(sorted(best.union(choosing.chosen)))
    choosing.num_done += 1
    left = [p for p in left if p not in best]
    request.reused = _ranges(left)
    return left


def _with_what_stands_before(
    ranked: Sequence[int], number: int, texts: Sequence[TokenRange]
) -> list[int]:
    """So many of the positions, the first of which are asked for most. OWN_SHARE of them by
    themselves, and for each of these the token before it in its text, and the last one of the text
    before; what is left, by themselves again.

    A token that is computed anew reads what it stands behind. Where that is not, it takes the text
    that it is read from for the first of all, and says so better than those who are right."""
    starts = [text.start for text in texts]
    own = ranked[: ceil(OWN_SHARE * number)]
    before = []
    for position in own:
        text = bisect_right(starts, position) - 1
        if position > starts[text]:
            before.append(position - 1)
        if text > 0:
            before.append(texts[text - 1].end - 1)
    return [*dict.fromkeys([*own, *before, *ranked])][:number]


def _hkvd_stages(request: Request) -> tuple[Stage, ...]:
    start, end = request.candidates[0].start, request.candidates[-1].end
    before = Stage((TokenRange(0, start),), None)
    return before, Stage((TokenRange(start, end),), "deviation")


def _asking_stages(request: Request) -> tuple[Stage, ...]:
    """All but the texts, of which the question looks."""
    texts, question = request.candidates[0].start, request.candidates[-1].end

    def method(position: int) -> LookMethod | None:
        # What comes before the texts looks at nothing: so it may share a step with the question.
        return "attention" if position < texts or position >= question else None

    return _stages(request, range(request.num_prompt_tokens), method)


def _seeking_stages(request: Request, chosen: tuple[int, ...]) -> tuple[Stage, ...]:
    """From the first chosen token to the last one. They look; nobody else has seen what they have,
    and the question has been heard."""
    looking = frozenset(chosen)
    places = range(chosen[0], chosen[-1] + 1)
    return _stages(request, places, lambda p: "attention" if p in looking else None)


def _stages(
    request: Request, places: range, method: Callable[[int], LookMethod | None]
) -> tuple[Stage, ...]:
    """What is computed of these places."""
    reused = {p for start, end in request.reused for p in range(start, end)}
    computed = [p for p in places if p not in reused]
    return tuple([Stage(_ranges(part), kind) for kind, part in groupby(computed, method)])


def _stage_at(choosing: Choosing, position: int) -> Stage | None:
    """The stage of the next token at or after a position."""
    return next((stage for stage in choosing.stages if stage.end > position), None)


def _ranges(positions: Iterable[int]) -> tuple[TokenRange, ...]:
    """Ascending positions as ranges without gaps."""
    found: list[TokenRange] = []
    for position in positions:
        if found and found[-1].end == position:
            found[-1] = TokenRange(found[-1].start, position + 1)
        else:
            found.append(TokenRange(position, position + 1))
    return tuple(found)
