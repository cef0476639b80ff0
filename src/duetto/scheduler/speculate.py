"""Joins a policy of drafts to the plans of steps, and what came of them to the policy.

Drafts take only free room: what is left of the budget, and blocks that are free. Knows no prices
and no estimates, which are the policy's (scheduler/adaptive_drafts.py), and no models.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

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


class Policies(NamedTuple):
    """Who decides about which drafts."""

    of_grammars: DraftPolicy  # that a grammar makes follow: they come unasked
    of_proposers: DraftPolicy


def speculated(
    policies: Policies,
    plans: Plans,
    budget: StepBudget,
    pool: BlockPool,
    config: SchedulerConfig,
) -> Plans:
    """The plans with the drafts that the policies want to verify, and whom they ask for new ones.
    Takes free blocks for the drafts; changes nothing else."""
    of_grammars, policy = policies
    room = _DraftRoom(budget, pool, config)
    if of_grammars.is_on and any(r.grammar_drafts for r, _ in plans):
        plans = [
            (r, item._replace(has_grammar_drafts=True) if item.num_drafts else item)
            for r, item in _verifying(of_grammars, plans, _of_grammar, room)
        ]
    if not policy.is_on:
        return plans
    plans = _verifying(policy, plans, _of_proposer, room)
    # Who computes a text apart has no tokens of its own in this step.
    asks = policy.ask(_planned(r, item) for r, item in plans if item.source is None)
    if not asks:
        return plans
    return [(r, _asking(r, item, asks.get(r.request_id))) for r, item in plans]


def tell(
    policies: Policies,
    live: Mapping[str, Request],
    batch: ScheduledBatch,
    output: StepOutput,
    step_time: StepTime | None,
) -> StepDrafts | None:
    """Tell the policies, and the requests' timings, what came of a step's drafts; also of those
    that they did not verify, as what was sampled in their place says whether they were right. To be
    called before the results are taken. Returns the step in all; None without drafts."""
    of_grammars, policy = policies
    if not of_grammars.is_on and not policy.is_on:
        return None
    told_of_grammars, told = list[DraftOutcome](), list[DraftOutcome]()
    for item, result in zip(batch.requests, output.results, strict=True):
        request = live.get(item.request_id)
        if request is None:
            continue
        if request.grammar_drafts or item.has_grammar_drafts:
            num_drafts = item.num_drafts if item.has_grammar_drafts else 0
            told_of_grammars.append(_outcome(request, item, result, num_drafts))
        num_drafts = 0 if item.has_grammar_drafts else item.num_drafts
        if num_drafts or item.drafting is not None or request.drafts:
            told.append(_outcome(request, item, result, num_drafts))
    if not told and not told_of_grammars:
        return None
    step = account_drafts(live, batch.requests, output.results, output.drafting_s, step_time)
    if told_of_grammars:
        of_grammars.learn(told_of_grammars, output.mask_s)
    if told and policy.is_on:
        policy.learn(told, output.drafting_s)
    return step


class _DraftRoom:
    """What is left for drafts in a step: of its budget, and of blocks that are free."""

    def __init__(self, budget: StepBudget, pool: BlockPool, config: SchedulerConfig) -> None:
        self.limit_s = budget.limit_s
        self.num_left = budget.num_left
        self._pool, self._config = pool, config

    def take(self, request: Request, count: int) -> int:
        """Blocks for so many drafts of a request, or for fewer: how many."""
        count = _make_room(request, min(count, self.num_left), self._pool, self._config)
        self.num_left -= count
        return count


def _of_grammar(request: Request) -> tuple[int, ...]:
    return request.grammar_drafts


def _of_proposer(request: Request) -> tuple[int, ...]:
    return request.drafts


def _verifying(
    policy: DraftPolicy,
    plans: Plans,
    drafts_of: Callable[[Request], tuple[int, ...]],
    room: _DraftRoom,
) -> Plans:
    # Beside a placeholder nobody knows what the drafts would follow.
    candidates = [
        Candidate(r, proposed[: r.num_outputs_left - 1])
        for r, item in plans
        if (proposed := drafts_of(r))
        and item.rows
        and not item.num_drafts  # the grammar's go first: they are right more often
        and not r.num_pending_tokens
        and r.num_outputs_left > 1
    ]
    if not candidates:
        return plans
    shape = BatchShape(tuple([item.shape for _, item in plans]))
    wanted = policy.choose(candidates, shape, room.num_left, room.limit_s(shape))
    drafts: dict[str, tuple[int, ...]] = {}
    for request, own in candidates:
        count = room.take(request, min(wanted.get(request.request_id, 0), len(own)))
        if count > 0:
            drafts[request.request_id] = own[:count]
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


def _outcome(
    request: Request, item: ScheduledRequest, result: RequestResult, num_drafts: int
) -> DraftOutcome:
    tokens = tuple([token.token_id for token in result.tokens])
    asked, ask, num_sent = item.drafting, None, 0
    if asked is not None:
        ask, num_sent = Ask(asked.method, asked.num_wanted), len(asked.token_ids)
    return DraftOutcome(request, num_drafts, tokens, ask, num_sent, len(result.drafts))
