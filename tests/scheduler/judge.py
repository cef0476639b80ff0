"""What must hold of every plan and every state, asked from outside the scheduler.

Conservation laws and orders that follow from the requests alone: never a second scheduler, which
would share its mistakes. `Account` is what a judge remembers of one request.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fakes import ShadowExecutor, generate_alone, shadow_kvs

from duetto.core.batch import PLACEHOLDER, RequestUpdate, ScheduledBatch, ScheduledRequest
from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason, Request
from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class Account:
    """One accepted request: the answer it must get, and what it was told so far."""

    request: Request
    place: tuple[float, int]
    dead_end: int | None = None  # tokens after which it can only fail
    answer: list[int] = field(init=False)  # by the dumbest route, alone
    kvs: list[int] = field(init=False)  # of prompt and answer
    tokens: list[int] = field(init=False, default_factory=list)
    scored: list[int] = field(init=False, default_factory=list)  # prompt tokens, with a logprob
    num_preemptions: int = field(init=False, default=0)
    final: FinishReason | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.answer = generate_alone(self.request)
        self.kvs = shadow_kvs([*self.request.prompt_token_ids, *self.answer])

    def hear(self, update: RequestUpdate) -> None:
        """Take one update, and check that a caller may trust what it says."""
        request = self.request
        assert self.final is None, "an update after the final one"
        num_before = len(self.tokens)
        self.tokens += [token.token_id for token in update.tokens]
        self.scored += [score.token_id for score in update.prompt_logprobs]
        assert request.num_output_tokens == len(self.tokens)
        assert len(request.timings.token_times) == len(self.tokens)
        if self.dead_end is not None:
            assert len(self.tokens) <= self.dead_end, "goes on where nothing is left to sample"
        assert self.tokens[num_before:] == self.answer[num_before : len(self.tokens)], "wrong token"
        prompt = request.prompt_token_ids if request.sampling.prompt_logprobs is not None else ()
        assert tuple(self.scored) == prompt[1 : 1 + len(self.scored)], "scored twice or not at all"
        assert (update.error is not None) == (update.finish_reason is FinishReason.ERROR)
        if update.tokens:
            assert len(self.scored) == max(0, len(prompt) - 1), "a token before the prompt's scores"
        if update.finish_reason is None:
            assert len(self.tokens) < len(self.answer), "complete, and yet it goes on"
            assert update.tokens or update.prompt_logprobs, "an update that says nothing"
        else:
            assert update.timings is request.timings
            if update.finish_reason is FinishReason.STOP:
                assert self.tokens[-1] in request.stop_token_ids, "nothing stopped it"
            self.end(update.finish_reason)

    def end(self, reason: FinishReason) -> None:
        assert self.final is None, "a second final update"
        self.final = reason
        request, timings = self.request, self.request.timings
        assert request.finish_reason is reason
        assert not request.block_table, "an ended request holds blocks"
        assert sum(timings.parts.values()) == timings.e2e_s, "the parts do not tile the latency"
        assert len(timings.token_times) == len(self.tokens)
        assert list(request.output_token_ids) == self.tokens == self.answer[: len(self.tokens)]
        if reason is FinishReason.LENGTH:
            assert len(self.tokens) == request.max_tokens


def fits(request: Request, config: SchedulerConfig) -> bool:
    """Whether a request could run if it were alone, by the arithmetic of one engine."""
    last_needed = request.num_prompt_tokens + request.max_tokens - 1
    room = config.num_blocks * config.block_size
    return last_needed <= room and last_needed < config.max_model_len


# --- one plan ------------------------------------------------------------------------------


def check_items(batch: ScheduledBatch, running: Mapping[str, Request], c: SchedulerConfig) -> None:
    """Each row is what its request says, in a table with room for all its tokens."""
    assert len({item.request_id for item in batch.requests}) == len(batch.requests)
    assert batch.num_tokens <= c.max_num_batched_tokens
    for item in batch.requests:
        request, start = running[item.request_id], item.num_computed_tokens
        end = start + num_needed(item)
        num_pending = request.num_pending_tokens - bool(item.rows)  # before this step
        num_tokens = request.num_tokens + num_pending
        assert start < end <= num_tokens
        assert request.num_computed_tokens == end + item.num_drafts, "progress has not moved"
        known = tuple(request.token_ids[start:end])
        placeholder = (PLACEHOLDER,) * (end - start - len(known))
        assert len(placeholder) <= 1, "two tokens are unknown"
        assert item.token_ids[: end - start] == known + placeholder
        assert item.block_table == tuple(request.block_table)
        needed = max(request.num_tokens, end + item.num_drafts)
        assert len(item.block_table) * c.block_size >= needed, "no room for a token"
        assert len(item.rows) == (1 + item.num_drafts if end == num_tokens else 0)
        assert c.enable_chunked_prefill or end == num_tokens, "a chunk, but they are off"
        num_output = request.num_output_tokens + num_pending
        places = [row.num_output_tokens for row in item.rows]
        assert places == [*range(num_output, num_output + len(places))]
        assert num_output + len(places) <= request.max_tokens, "beyond the limit"
        assert not (item.num_drafts and num_pending), "nobody knows what the drafts follow"
        depends = bool(request.bad_word_ids) or request.sampling.needs_history
        assert not (item.rows and num_pending and depends), "sampled without its history"


def num_needed(item: ScheduledRequest) -> int:
    """Tokens that are computed, drafts aside."""
    return len(item.token_ids) - item.num_drafts


def num_wanted(item: ScheduledRequest, request: Request) -> int:
    """What it lacked when the step was planned."""
    num_pending = request.num_pending_tokens - bool(item.rows)
    return request.num_tokens + num_pending - item.num_computed_tokens


def check_budget(
    batch: ScheduledBatch,
    running: Mapping[str, Request],
    stayed: Collection[str],
    c: SchedulerConfig,
) -> None:
    """No request waits for one that needs more, nor for a newcomer, nor while budget is left.

    `stayed` are those that ran before and were not preempted in this step.
    """
    served = {item.request_id: num_needed(item) for item in batch.requests}
    wanted = {r.request_id: num_wanted(r, running[r.request_id]) for r in batch.requests}
    # Who is admitted computes at once, so no more run than there is budget for: all get a part.
    assert served.keys() == running.keys(), "a running request computes nothing"
    short = [
        wanted[request_id]
        for request_id, count in served.items()
        if count < wanted[request_id] and request_id in stayed
    ]
    if not short:
        return
    least = min(short)
    most = max(wanted.values())
    assert most <= least, "a request waits behind one that needs more"
    assert all(request_id in stayed for request_id in served), "a newcomer goes first"
    left = c.max_num_batched_tokens - sum(served.values())
    if c.target_itl_s is None or not left:
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
    has_streams = any(running[item.request_id].num_output_tokens for item in beside)
    limit = max(c.target_itl_s, c.target_itl_steps * price(BatchShape(tuple(shapes[:first_chunk]))))
    if has_streams and chunks:
        only_one_token = len(chunks) == 1 and len(chunks[0].token_ids) == 1
        in_time = price(BatchShape(tuple(shapes))) <= limit
        assert in_time or only_one_token, "the step takes longer than the target allows"
    cut = [item for item in chunks if not item.rows]
    assert len(cut) <= 1, "two prompts are cut in one step"
    for item in cut:
        assert item is batch.requests[-1], "a prompt was begun behind one that was cut"
        request, end = running[item.request_id], item.num_computed_tokens + len(item.token_ids)
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


# --- one state -----------------------------------------------------------------------------


def check_state(scheduler: Scheduler, accounts: Mapping[str, Account]) -> None:
    """Every live request is in one queue; every block is free or owned; salts share nothing.

    `accounts` are those of the requests that have had no final update.
    """
    scheduler.check()
    assert scheduler.config.enable_prefix_caching or not scheduler.pool._block_of
    queued = [request.request_id for request in scheduler.waiting]
    assert len(queued) + len(scheduler.running) == len(accounts), "a request is lost or undead"
    assert accounts.keys() == {*queued, *scheduler.running}
    salts: dict[int, bytes] = {}
    for request in scheduler.running.values():
        for block in request.block_table:
            assert salts.setdefault(block, request.cache_salt) == request.cache_salt
    assert len(salts) + scheduler.pool.num_free == scheduler.config.num_blocks
    for account in accounts.values():
        timings = account.request.timings
        accounted = timings.accounted_until - timings.arrival_time
        assert sum(timings.parts.values()) == accounted, "the parts do not tile the time so far"
        assert timings.num_preemptions == account.num_preemptions


class CacheJudge:
    """Checks that what can be found under a hash is the KV of the tokens that the hash stands for.

    A hash stands for (salt, tokens from the first of the text to the end of the block); one hash
    for each, and one of them for each hash.
    """

    def __init__(self) -> None:
        self._meaning: dict[bytes, tuple[bytes, tuple[int, ...]]] = {}
        self._hash: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._kvs: dict[bytes, list[int]] = {}

    def learn(self, account: Account, block_size: int) -> None:
        """Remember what the hashes of a request stand for."""
        request = account.request
        for index, block_hash in enumerate(request.block_hashes):
            start, end = index * block_size, (index + 1) * block_size
            meaning = (request.cache_salt, tuple(request.token_ids[:end]))
            assert self._meaning.setdefault(block_hash, meaning) == meaning, "one hash for two"
            assert self._hash.setdefault(meaning, block_hash) == block_hash, "two hashes for one"
            self._kvs[block_hash] = account.kvs[start:end]

    def check(self, scheduler: Scheduler, executor: ShadowExecutor) -> None:
        for block_hash, block in scheduler.pool._block_of.items():
            assert executor.read_block(block) == self._kvs[block_hash], "stale or uncomputed KV"
