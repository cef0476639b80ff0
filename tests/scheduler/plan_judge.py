"""What must hold of every plan, asked from outside the scheduler, as soon as it is made.

Conservation laws and orders that follow from the requests and from what is in flight alone: never a
second scheduler, which would share its mistakes.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from scheduler.judge import Account

from duetto.core.batch import PLACEHOLDER, ScheduledBatch, ScheduledRequest
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import TokenRange
from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler import reuse
from duetto.scheduler.admission import MAX_PASSED_OVER
from duetto.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class PlanCase:
    """A plan and what was so when it was asked for."""

    batch: ScheduledBatch
    scheduler: Scheduler  # after it
    accounts: Mapping[str, Account]  # of all that live
    was_running: Collection[str]
    was_short: bool  # of blocks for the tokens of those that ran
    in_flight: Mapping[str, Sequence[ScheduledRequest]]  # what steps before compute for who lives
    chosen: Collection[str]  # the batch of static batching
    depth: int  # steps that may be in flight

    def of(self, ids: Collection[str]) -> list[Account]:
        return [self.accounts[i] for i in ids]


def lacks_blocks(request: Request, c: SchedulerConfig) -> bool:
    """Whether a running request must be given blocks before it is planned."""
    num_tokens = min(request.num_tokens + request.num_pending_tokens, request.most_tokens - 1)
    return len(request.block_table) * c.block_size < num_tokens


def judge_plan(case: PlanCase) -> None:
    """Also counts the preemptions of the step in the accounts."""
    batch, running, c = case.batch, case.scheduler.running, case.scheduler.config
    if not case.accounts:
        assert not batch.requests, "a step that computes for nobody"
        return
    is_idle = not batch.requests and not case.in_flight
    assert not is_idle, "a step that computes nothing although there is work"
    check_items(batch, running, c)
    check_time(batch, running, c)
    # Whoever was preempted may be back in the same step, if it finds its KV in others' blocks.
    preempted = {i for i in case.was_running if _was_preempted(case.accounts[i])}
    stayed = {i for i in case.was_running if i not in preempted}
    assert running.keys() >= stayed, "gone without a trace"
    depends = {i for i, items in case.in_flight.items() if depends_on(running.get(i), items)}
    check_budget(batch, running, stayed, running.keys() - depends, c)
    # Without steps in flight, who is admitted computes at once: so all that run get a part, but
    # where others were admitted while one is between two stages.
    has_stages = any(request.candidates for request in running.values())
    is_whole = len(batch.requests) == len(running)
    assert case.depth or has_stages or is_whole, "a running request gets nothing"
    newcomers = [i for i in running if i not in stayed]  # as they were admitted
    if preempted and not _is_claim(case, preempted, newcomers):
        assert case.was_short, "preempted although nobody lacks blocks"
        assert not newcomers, "a newcomer takes the blocks of one who has just lost them"
        check_preempted(case.of(preempted), case.of(running.keys()), c)
    _judge_admission(case, newcomers, stayed, is_free=not preempted)


def _judge_admission(
    case: PlanCase, newcomers: Sequence[str], stayed: Collection[str], *, is_free: bool
) -> None:
    """`is_free`: nobody was preempted, so whoever finds room may be admitted."""
    scheduler, waiting = case.scheduler, case.scheduler.waiting
    assert case.in_flight.keys().isdisjoint(newcomers), "admitted before its results are in"
    if newcomers and waiting:
        places = Counter(account.request.tenant for account in case.of(stayed))
        rivals = case.of([request.request_id for request in waiting])
        check_newcomers(case.of(newcomers), rivals, places, scheduler)
    if scheduler.config.scheduling_policy == "static":
        assert set(newcomers).issubset(case.chosen), "a newcomer joins a batch that runs"
        waiting = [request for request in waiting if request.request_id in case.chosen]
    if is_free and waiting:
        check_admission(case.batch, waiting, case.in_flight.keys(), scheduler)


def _was_preempted(account: Account) -> bool:
    return account.request.timings.num_preemptions > account.num_preemptions


def _is_claim(case: PlanCase, preempted: Collection[str], newcomers: Collection[str]) -> bool:
    """Whether one request gave its place to another client's, and then accounts for it. Nobody
    needs a place who cannot be admitted before its results are in."""
    if len(preempted) > 1:
        return False
    (victim,) = case.of(preempted)
    waiting = {request.request_id for request in case.scheduler.waiting}
    claimants = {*newcomers, *waiting} - {*preempted} - case.in_flight.keys()
    c = case.scheduler.config
    if not is_claim(victim, case.of(claimants), case.of(case.was_running), c):
        return False
    victim.num_preemptions += 1
    assert victim.num_preemptions <= c.max_preemptions, "preempted too often"
    return True


def check_items(batch: ScheduledBatch, running: Mapping[str, Request], c: SchedulerConfig) -> None:
    """Each row is what its request says, in a table with room for all its tokens."""
    assert len({item.request_id for item in batch.requests}) == len(batch.requests)
    assert batch.num_tokens <= c.max_num_batched_tokens
    for item in batch.requests:
        request, start = running[item.request_id], item.num_computed_tokens
        if item.source is not None:
            _check_text(item, request, c)
            continue
        end = item.end - item.num_drafts
        num_pending = request.num_pending_tokens - bool(item.rows)  # before this step
        num_tokens = request.num_tokens + num_pending
        assert start < end <= num_tokens
        assert request.num_computed_tokens == end + item.num_drafts, "progress has not moved"
        places = [p for run in item.runs for p in range(*run)][: num_needed(item)]
        known = tuple([request.token_ids[p] for p in places if p < request.num_tokens])
        placeholder = (PLACEHOLDER,) * (len(places) - len(known))
        assert len(placeholder) <= 1, "two tokens are unknown"
        assert item.token_ids[: len(places)] == known + placeholder
        assert item.block_table == tuple(request.block_table)
        needed = max(request.num_tokens, end + item.num_drafts)
        assert len(item.block_table) * c.block_size >= needed, "no room for a token"
        samples = end == num_tokens and request.choosing is None
        assert len(item.rows) == (1 + item.num_drafts if samples else 0)
        is_whole = num_needed(item) == num_wanted(item, request)
        assert c.enable_chunked_prefill or is_whole, "a chunk, but they are off"
        num_output = request.num_output_tokens + num_pending
        places = [row.num_output_tokens for row in item.rows]
        assert places == [*range(num_output, num_output + len(places))]
        assert num_output + len(places) <= request.max_tokens, "beyond the limit"
        assert not (item.num_drafts and num_pending), "nobody knows what the drafts follow"
        depends = bool(request.bad_word_ids) or request.sampling.needs_history
        assert not (item.rows and num_pending and depends), "sampled without its history"


def _check_text(item: ScheduledRequest, request: Request, c: SchedulerConfig) -> None:
    """A step that computes a text apart."""
    assert item.source is not None and item.positions is None
    source, end = request.sources[item.source], item.end
    assert item.token_ids == source.token_ids[item.num_computed_tokens : end]
    assert item.block_table == tuple(source.blocks)
    assert source.num_computed == end, "progress has not moved"
    assert c.enable_chunked_prefill or not source.num_left, "a chunk, but they are off"
    assert not item.rows and not item.moves and item.look is None and item.drafting is None


def num_needed(item: ScheduledRequest) -> int:
    """Tokens that are computed, drafts aside."""
    return len(item.token_ids) - item.num_drafts


def num_wanted(item: ScheduledRequest, request: Request) -> int:
    """What it lacked when the step was planned: of a text, or up to its next stage, if it is
    before one."""
    if item.source is not None:
        return len(item.token_ids) + request.sources[item.source].num_left
    num_pending, end = request.num_pending_tokens - bool(item.rows), item.end - item.num_drafts
    if request.choosing is not None and item.epoch == request.timings.num_preemptions:
        stage = next(stage for stage in request.choosing.stages if stage.end >= end)
        return len(item.token_ids) + sum(_after(end, stage.runs))
    num_left = request.num_tokens + num_pending - end - sum(_after(end, request.reused))
    return num_needed(item) + num_left


def _after(start: int, ranges: Sequence[TokenRange]) -> list[int]:
    """How many positions of each range come after the first `start`."""
    return [max(0, range_end - max(range_start, start)) for range_start, range_end in ranges]


def depends_on(request: Request | None, in_flight: Sequence[ScheduledRequest]) -> bool:
    """Whether a running request waits, by the contract, for results that are not in: those of
    `in_flight`, which steps compute for it."""
    if request is None:
        return False
    num_pending = sum(bool(item.rows) for item in in_flight)
    for item in in_flight:
        if item.num_drafts or (item.drafting is not None and item.drafting.num_wanted):
            return True
    if request.num_output_tokens + num_pending == request.max_tokens:
        return True
    choosing = request.choosing
    for item in in_flight:
        if item.look is not None and choosing and item.end == choosing.stages[-1].end:
            return True  # what it chooses is computed next
    depends = bool(request.bad_word_ids) or request.sampling.needs_history
    return depends and num_pending > 0


def check_budget(
    batch: ScheduledBatch,
    running: Mapping[str, Request],
    stayed: Collection[str],
    ready: Collection[str],
    c: SchedulerConfig,
) -> None:
    """No request waits for one that needs more, nor for a newcomer, nor while budget is left.

    `stayed` are those that ran before and were not preempted in this step; `ready` those that run
    and wait for no results.
    """
    served = {item.request_id: num_needed(item) for item in batch.requests}
    wanted = {r.request_id: num_wanted(r, running[r.request_id]) for r in batch.requests}
    assert served.keys() <= set(ready), "goes on before the results that it depends on"
    unserved = [
        reuse.num_wanted(running[i], running[i].num_computed_tokens)
        for i in ready
        if i not in served
    ]
    short = [
        wanted[request_id]
        for request_id, count in served.items()
        if count < wanted[request_id] and request_id in stayed
    ]
    if not short and not unserved:
        return
    least = min(short + unserved)
    most = max(wanted.values(), default=0)
    assert most <= least, "a request waits behind one that needs more"
    assert all(request_id in stayed for request_id in served), "a newcomer goes first"
    left = c.max_num_batched_tokens - sum(served.values())
    # A prompt that has begun gets a token, but where several have, between two stages.
    has_stages = any(request.candidates for request in running.values())
    if c.target_itl_s is None or (unserved and not has_stages) or not left:
        assert left == 0 if c.enable_chunked_prefill else left < least, "budget is left unused"


def price(shape: BatchShape) -> float:
    """Seconds of a step: each token, each pair and each logit row costs something."""
    pairs = sum(request.attended_pairs(None) for request in shape.requests)
    return 2.0 + shape.num_tokens + pairs / 16 + shape.num_logit_rows / 2


def check_time(batch: ScheduledBatch, running: Mapping[str, Request], c: SchedulerConfig) -> None:
    """A step beside streams is as long as the target allows, and no longer; a prompt goes on."""
    if c.target_itl_s is None:
        return
    plain = [item._replace(num_drafts=0, rows=item.rows[:1]) for item in batch.requests]
    plain = [
        p._replace(token_ids=p.token_ids[: num_needed(r)])
        for p, r in zip(plain, batch.requests, strict=True)
    ]
    shapes = [item.shape for item in plain]
    wanted = [num_wanted(item, running[item.request_id]) for item in batch.requests]
    first_chunk = next((i for i, count in enumerate(wanted) if count > 1), len(wanted))
    chunks = batch.requests[first_chunk:]
    beside = batch.requests[:first_chunk]
    has_streams = any(_has_begun(item, running[item.request_id]) for item in beside)
    limit = max(c.target_itl_s, c.target_itl_steps * price(BatchShape(tuple(shapes[:first_chunk]))))
    if has_streams and chunks:
        only_one_token = len(chunks) == 1 and len(chunks[0].token_ids) == 1
        in_time = price(BatchShape(tuple(shapes))) <= limit
        assert in_time or only_one_token, "the step takes longer than the target allows"
    cut = [
        item
        for item, count in zip(chunks, wanted[first_chunk:], strict=True)
        if num_needed(item) < count
    ]
    assert len(cut) <= 1, "two prompts are cut in one step"
    for item in cut:
        assert item is batch.requests[-1], "a prompt was begun behind one that was cut"
        request, end = running[item.request_id], item.num_computed_tokens + len(item.token_ids)
        if request.candidates and item.num_computed_tokens < request.num_prompt_tokens:
            continue  # what one token more costs depends on where it is
        is_scored = request.sampling.prompt_logprobs is not None
        scores = is_scored and end + 1 < request.num_prompt_tokens
        more = RequestShape(
            num_new=item.shape.num_new + 1,
            num_past=item.shape.num_past,
            num_logit_rows=item.shape.num_logit_rows + scores + (end + 1 == request.num_tokens),
        )
        longer = price(BatchShape((*shapes[:-1], more)))
        is_full = batch.num_tokens == c.max_num_batched_tokens
        assert is_full or (has_streams and longer > limit), "time is left unused"


def _has_begun(item: ScheduledRequest, request: Request) -> bool:
    """Whether a token of the answer was sampled, or is on its way, when the step was planned."""
    num_pending = request.num_pending_tokens - bool(item.rows)
    return request.num_output_tokens + num_pending > 0


def check_admission(
    batch: ScheduledBatch,
    waiting: Sequence[Request],
    in_flight: Collection[str],
    scheduler: Scheduler,
) -> None:
    """Nobody waits for nothing: the first of those that may be admitted, with a place, a token of
    budget and blocks for all that it can ever need.

    Whether the others could be is asked of no one: that would be a second scheduler. `waiting` are
    in order, and nobody was preempted; who has results `in_flight` waits for them, and others for
    it.
    """
    c, running, num_free = scheduler.config, scheduler.running, scheduler.pool.num_free
    wanted = [num_wanted(item, running[item.request_id]) for item in batch.requests]
    left = c.max_num_batched_tokens - sum(map(num_needed, batch.requests))
    is_cut = sum(wanted) > sum(map(num_needed, batch.requests))
    has_time = c.target_itl_s is None or all(count == 1 for count in wanted)
    if is_cut or not has_time or not left or len(running) == c.max_num_seqs:
        return

    def could(request: Request) -> bool:
        num_blocks = c.num_blocks_for(request.most_tokens - 1)
        num_blocks += sum(len(s.hashes) for s in reuse.find_sources(request, c, scheduler.pool))
        has_room = num_blocks <= num_free
        is_known = request.request_id not in in_flight
        if request.num_passed_over == MAX_PASSED_OVER:
            return False  # and so nobody overtakes it
        return has_room and is_known and (c.enable_chunked_prefill or request.num_tokens <= left)

    first = [*takewhile(could, waiting)]
    has_turns = len({request.tenant for request in waiting}) > 1  # and so anyone may be the first
    if not has_turns or len(first) == len(waiting):
        assert all(_waits_for_prefix(request, scheduler) for request in first), "waits for nothing"


def check_newcomers(
    newcomers: Sequence[Account],
    waiting: Collection[Account],
    num_running: Mapping[bytes, int],
    scheduler: Scheduler,
) -> None:
    """Nobody is overtaken, but by a client with fewer places, and by those who need not wait for a
    prefix that is being computed.

    `newcomers` are in the order in which they were admitted; `num_running` counts each client's
    places before the first of them.
    """
    policy, counts = scheduler.config.scheduling_policy, Counter(num_running)
    passed = {a.request.request_id for a in waiting if _waits_for_prefix(a.request, scheduler)}
    for number, admitted in enumerate(newcomers):
        rivals = [*newcomers[number + 1 :], *waiting]  # those passed over may be first of theirs
        for rival in rivals:
            if rival.request.request_id not in passed:
                assert not _is_overtaken(rival, admitted, rivals, counts, policy), "overtaken"
        counts[admitted.request.tenant] += 1


def _is_overtaken(
    rival: Account,
    admitted: Account,
    rivals: Collection[Account],
    num_running: Mapping[bytes, int],
    policy: str,
) -> bool:
    """Whether `rival` should have been admitted before."""
    own, other = rival.request, admitted.request
    if policy == "static" or own.tenant == other.tenant:
        return rival.place < admitted.place
    is_level = policy == "fcfs" or own.priority == other.priority
    if not is_level:  # one of the other's level must go before both
        leaders = (a for a in (admitted, *rivals) if a.request.priority == other.priority)
        return rival.place < admitted.place and min(a.place for a in leaders) > rival.place
    of_client = [a for a in rivals if a.request.tenant == own.tenant and a.place < rival.place]
    if of_client:  # not its client's first, or perhaps not
        return False
    return num_running[own.tenant] < num_running[other.tenant]


def is_claim(
    victim: Account,
    claimants: Collection[Account],
    running: Collection[Account],
    c: SchedulerConfig,
) -> bool:
    """Whether a running request may have had to give its place to another client's.

    `running` are those of before the step; `claimants` those that waited then.
    """
    counts, tenant = Counter(a.request.tenant for a in running), victim.request.tenant
    most = max(counts.values())
    if c.scheduling_policy == "static" or counts[tenant] < most:
        return False
    for claimant in claimants:
        own = claimant.request
        if counts[own.tenant] + 1 >= most:
            continue
        could = [
            a.place
            for a in running
            if a.request.tenant == tenant
            and a.num_preemptions < c.max_preemptions
            and (c.scheduling_policy == "fcfs" or a.request.priority == own.priority)
        ]
        if could and victim.place == max(could):
            return True
    return False


def _waits_for_prefix(request: Request, scheduler: Scheduler) -> bool:
    """Whether some running request is about to compute a full block of this one's prefix."""
    c, tokens = scheduler.config, request.token_ids
    if request.candidates or any(r.candidates for r in scheduler.running.values()):
        return _waits_for_text(request, scheduler)
    if not c.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
        return False
    for other in scheduler.running.values():
        first = other.num_written_tokens // c.block_size + 1
        last = min(len(tokens) - 1, other.num_tokens) // c.block_size
        if other.cache_salt == request.cache_salt and first <= last:
            end = first * c.block_size
            if tokens[:end] == other.token_ids[:end]:
                return True
    return False


def _waits_for_text(request: Request, scheduler: Scheduler) -> bool:
    """Whether some running request is about to compute a block that this one looks for: of its
    prefix, or of a text."""
    size = scheduler.config.block_size
    if request.sampling.prompt_logprobs is not None:
        return False
    wanted = {*_beginnings(request.token_ids[: request.num_exact_tokens], 0, size)}
    for start, end in request.reuse.segments if request.reuse is not None else ():
        wanted |= {*_beginnings(request.prompt_token_ids[start:end], 0, size, is_text=True)}
    computing = set[tuple[int, ...]]()
    for other in scheduler.running.values():
        if other.cache_salt == request.cache_salt:
            own = other.token_ids[: other.num_exact_tokens]
            computing |= {*_beginnings(own, other.num_written_tokens, size)}
            for source in other.sources:
                text, num_written = source.token_ids, source.num_written
                computing |= {*_beginnings(text, num_written, size, is_text=True)}
    return bool(wanted & computing)


def _beginnings(
    token_ids: Sequence[int], num_written: int, size: int, *, is_text: bool = False
) -> list[tuple[int, ...]]:
    """What the hashes of the blocks stand for that are not written whole; a text's last one need
    not be full."""
    first, end = num_written // size, len(token_ids) + (size - 1) * is_text
    return [tuple(token_ids[: (i + 1) * size]) for i in range(first, end // size)]


def check_preempted(
    preempted: Collection[Account], stayed: Collection[Account], c: SchedulerConfig
) -> None:
    """Those that lost their blocks are the last in order of those that could."""
    first = min(account.place for account in preempted)
    for account in preempted:
        account.num_preemptions += 1
        assert account.num_preemptions <= c.max_preemptions, "preempted too often"
    for account in stayed:
        protected = account.num_preemptions >= c.max_preemptions
        assert protected or account.place < first, "an older request was preempted first"
