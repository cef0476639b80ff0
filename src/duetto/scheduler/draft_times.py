"""What the drafts of a step gave and took, for each request and in all (core/draft_counts.py).

Seconds are by the price of a step, as no clock sees what a draft alone takes. A step with drafts is
longer than it would have been, for everyone in it; a request that has k of its drafts accepted
needs k steps fewer. So a request has saved

    accepted * (a step of the next tokens alone) - (step with drafts - step without) - proposing

while it pays a share only of what verifying and proposing took, so that shares add up. Knows no
clock and decides nothing.
"""

from collections.abc import Mapping, Sequence

from duetto.core.batch import RequestResult, ScheduledRequest
from duetto.core.draft_counts import GRAMMAR, NO_CHAINS, Chains, Speculation, StepDrafts
from duetto.core.request import Request
from duetto.core.shape import BatchShape, RequestShape, StepTime
from duetto.scheduler.accept import accept


def account_drafts(
    live: Mapping[str, Request],
    items: Sequence[ScheduledRequest],
    results: Sequence[RequestResult],
    drafting_s: float,
    step_time: StepTime | None = None,
) -> StepDrafts | None:
    """Write a step's drafts into the timings of its requests. Call it before the results are taken.

    Returns the step in all; None if it verified no drafts and proposed none. Without `step_time`
    nothing is said of seconds, but for those of proposing. Requests that have ended have no part.
    """
    concerned = [
        (request, item, result)
        for item, result in zip(items, results, strict=True)
        if (item.num_drafts or item.drafting is not None)
        and (request := live.get(item.request_id)) is not None
    ]
    if not concerned:
        return None
    prices = None if step_time is None else _Prices(items, step_time)
    work = sum([_work(item) for _, item, _ in concerned])
    verified = of_grammars = NO_CHAINS
    for request, item, result in concerned:
        told = request.timings.speculation
        if told is None:
            told = request.timings.speculation = Speculation()
        chain = NO_CHAINS
        if item.num_drafts and result.error is None:
            chain = Chains.of(item.num_drafts, _num_accepted(request, result))
        if not chain.num_chains:
            pass
        elif item.has_grammar_drafts:
            told.add_chain(chain, GRAMMAR)
            of_grammars = of_grammars.plus(chain)
        else:  # of the method asked before this
            told.add_chain(chain)
            verified = verified.plus(chain)
        if prices is not None:
            prices.add_to(told, item, chain, drafting_s)
        if item.drafting is not None:
            told.drafting_s += drafting_s * _work(item) / max(1, work)
            _note_ask(told, item, result)
    num_asked = sum([item.drafting is not None for _, item, _ in concerned])
    verifying_s = None if prices is None else prices.verifying_s
    return StepDrafts(verified, num_asked, drafting_s, verifying_s, of_grammars)


class _Prices:
    """Of one step."""

    def __init__(self, items: Sequence[ScheduledRequest], step_time: StepTime) -> None:
        shapes = [item.shape for item in items]
        plain = [_without_drafts(item) for item in items]
        streams = [shape for item, shape in zip(items, plain, strict=True) if item.is_next_token]
        with_s, without_s = (step_time(BatchShape(tuple(each))) for each in (shapes, plain))
        self.verifying_s = max(0.0, with_s - without_s) if shapes != plain else 0.0
        self.next_tokens_s = step_time(BatchShape(tuple(streams))) if streams else 0.0
        self._num_drafts = max(1, sum([item.num_drafts for item in items]))

    def add_to(
        self, told: Speculation, item: ScheduledRequest, chain: Chains, drafting_s: float
    ) -> None:
        gained_s = chain.total.num_accepted * self.next_tokens_s
        told.add_price(
            verifying=self.verifying_s * item.num_drafts / self._num_drafts,
            saved=gained_s - self.verifying_s - drafting_s,
            gain=self.next_tokens_s,
        )


def _without_drafts(item: ScheduledRequest) -> RequestShape:
    shape, drafts = item.shape, item.num_drafts
    return shape._replace(
        num_new=shape.num_new - drafts, num_logit_rows=shape.num_logit_rows - drafts
    )


def _num_accepted(request: Request, result: RequestResult) -> int:
    """How many steps fewer the answer takes: all tokens that are told are drafts, but the last."""
    tokens, _ = accept(request, result.tokens)
    return len(tokens) - 1


def _note_ask(told: Speculation, item: ScheduledRequest, result: RequestResult) -> None:
    assert item.drafting is not None
    if item.drafting.num_wanted:  # else the proposer only keeps up with the tokens
        told.asked = item.drafting.method
        told.num_asked += 1
        told.num_made += len(result.drafts)


def _work(item: ScheduledRequest) -> int:
    """Tokens that a proposer was sent, and those that it was to propose."""
    return 0 if item.drafting is None else len(item.drafting.token_ids) + item.drafting.num_wanted
