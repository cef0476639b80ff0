"""Joins a policy of drafts to the plans of steps, and what came of them to the policy.

Drafts take only free room: what is left of the budget, and blocks that are free. Knows no prices
and no estimates, which are the policy's (scheduler/adaptive_drafts.py), and no models.
"""

from collections.abc import Mapping

from duetto.core.batch import (
    Drafting,
    RequestResult,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import StepDrafts
from duetto.core.request import Request
from duetto.core.shape import BatchShape, StepTime
from duetto.scheduler.block_pool import BlockPool, root_hash
from duetto.scheduler.budget import StepBudget
from duetto.scheduler.draft_times import account_drafts
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, DraftPolicy, Planned
from duetto.scheduler.plan import with_drafts

Plans = list[tuple[Request, ScheduledRequest]]


def speculated(
    policy: DraftPolicy,
    plans: Plans,
    budget: StepBudget,
    pool: BlockPool,
    config: SchedulerConfig,
) -> Plans:
    """The plans with the drafts that the policy wants to verify, and whom it asks for new ones.
    Takes free blocks for the drafts; changes nothing else."""
    if not policy.is_on:
        return plans
    plans = _verifying(policy, plans, budget, pool, config)
    # Who computes a text apart has no tokens of its own in this step.
    asks = policy.ask(_planned(r, item) for r, item in plans if item.source is None)
    if not asks:
        return plans
    return [(r, _asking(r, item, asks.get(r.request_id))) for r, item in plans]


def tell(
    policy: DraftPolicy,
    live: Mapping[str, Request],
    batch: ScheduledBatch,
    output: StepOutput,
    step_time: StepTime | None,
) -> StepDrafts | None:
    """Tell the policy, and the requests' timings, what came of a step's drafts; also of those that
    it did not verify, as what was sampled in their place says whether they were right. To be called
    before the results are taken. Returns the step in all; None without drafts."""
    if not policy.is_on:
        return None
    items, results, drafting_s = batch.requests, output.results, output.drafting_s
    outcomes = [
        _outcome(live[item.request_id], item, result)
        for item, result in zip(items, results, strict=True)
        if item.request_id in live
        and (item.num_drafts or item.drafting is not None or live[item.request_id].drafts)
    ]
    if not outcomes:
        return None
    told = account_drafts(live, items, results, drafting_s, step_time)
    policy.learn(outcomes, drafting_s)
    return told


def _verifying(
    policy: DraftPolicy,
    plans: Plans,
    budget: StepBudget,
    pool: BlockPool,
    config: SchedulerConfig,
) -> Plans:
    # Beside a placeholder nobody knows what the drafts would follow.
    candidates = [
        Candidate(r, r.drafts[: r.num_outputs_left - 1])
        for r, item in plans
        if r.drafts and item.rows and not r.num_pending_tokens and r.num_outputs_left > 1
    ]
    if not candidates:
        return plans
    shape = BatchShape(tuple([item.shape for _, item in plans]))
    room = budget.num_left
    wanted = policy.choose(candidates, shape, room, budget.limit_s(shape))
    drafts: dict[str, tuple[int, ...]] = {}
    for request, proposed in candidates:
        count = min(wanted.get(request.request_id, 0), len(proposed), room)
        count = _make_room(request, count, pool, config)
        room -= count
        if count > 0:
            drafts[request.request_id] = proposed[:count]
    return [
        (r, with_drafts(r, item, drafts[r.request_id]) if r.request_id in drafts else item)
        for r, item in plans
    ]


def _make_room(request: Request, count: int, pool: BlockPool, config: SchedulerConfig) -> int:
    """Take free blocks for `count` drafts; returns for how many there is room."""
    missing = config.num_blocks_for(request.num_tokens + count) - len(request.block_table)
    request.block_table += pool.allocate(max(0, min(missing, pool.num_free)))
    return min(count, len(request.block_table) * config.block_size - request.num_tokens)


def _planned(request: Request, item: ScheduledRequest) -> Planned:
    # Of two unknown tokens the proposer would be told the second only.
    can_use = item.rows and request.num_pending_tokens <= 1
    num_left = max(0, request.num_outputs_left - 2) if can_use else 0
    return Planned(request, num_left, request.num_tokens - request.num_sent_tokens)


def _asking(request: Request, item: ScheduledRequest, ask: Ask | None) -> ScheduledRequest:
    if ask is None:
        return item
    # A proposer that was not the last to be asked may have been sent nothing, or an older answer.
    start = request.num_sent_tokens if ask.method == request.sent_to else 0
    end = request.num_tokens if ask.max_sent is None else start + ask.max_sent
    return item._replace(
        drafting=Drafting(
            ask.method,
            ask.num_wanted,
            _owner(request),
            start,
            tuple(request.token_ids[start:end]),
            request.num_prompt_tokens,
        )
    )


def _owner(request: Request) -> bytes:
    """Who may be given drafts made of this request's tokens: as with KV, salts part them too."""
    if not request.cache_salt:
        return request.tenant
    return root_hash(request.tenant, request.cache_salt)


def _outcome(request: Request, item: ScheduledRequest, result: RequestResult) -> DraftOutcome:
    tokens = tuple([token.token_id for token in result.tokens])
    asked, ask, num_sent = item.drafting, None, 0
    if asked is not None:
        ask, num_sent = Ask(asked.method, asked.num_wanted), len(asked.token_ids)
    return DraftOutcome(request, item.num_drafts, tokens, ask, num_sent, len(result.drafts))
