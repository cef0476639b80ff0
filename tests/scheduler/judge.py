"""What must hold of every answer and every state, asked from outside the scheduler.

`Account` is what a judge remembers of one request; plan_judge.py judges the plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from fakes import ShadowExecutor, generate_alone
from shadow import shadow_kvs

from duetto.core.batch import RequestUpdate
from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason, Request
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
    if last_needed > room or last_needed >= config.max_model_len:
        return False
    if not request.candidates or request.reuse is None:
        return True
    texts = {request.prompt_token_ids[start:end] for start, end in request.reuse.segments}
    apart = sum(config.num_blocks_for(len(text)) for text in texts)
    has_room = config.num_blocks_for(last_needed) + apart <= config.num_blocks
    scores = request.sampling.prompt_logprobs is not None
    return config.enable_prefix_caching and not scores and has_room


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
        tables = [request.block_table, *(source.blocks for source in request.sources)]
        for block in chain.from_iterable(tables):
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
        self._learn(request.block_hashes, request, request.token_ids, account.kvs, block_size)
        for text in request.texts or ():
            kvs = shadow_kvs(text.token_ids)
            self._learn(text.hashes, request, text.token_ids, kvs, block_size)

    def _learn(
        self,
        hashes: Sequence[bytes],
        request: Request,
        token_ids: Sequence[int],
        kvs: list[int],
        block_size: int,
    ) -> None:
        for index, block_hash in enumerate(hashes):
            start, end = index * block_size, (index + 1) * block_size
            meaning = (request.cache_salt, tuple(token_ids[:end]))
            assert self._meaning.setdefault(block_hash, meaning) == meaning, "one hash for two"
            assert self._hash.setdefault(meaning, block_hash) == block_hash, "two hashes for one"
            self._kvs[block_hash] = kvs[start:end]

    def check(self, scheduler: Scheduler, executor: ShadowExecutor) -> None:
        for block_hash, block in scheduler.pool._block_of.items():
            expected = self._kvs[block_hash]  # a text's last block need not be full
            held = executor.read_block(block)[: len(expected)]
            assert held == expected, "stale or uncomputed KV"
