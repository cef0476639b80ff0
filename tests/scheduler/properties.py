"""Properties that no random walk can judge, as functions of the code under test.

They are tests of their own, and test_planted_faults.py asks them about faults that change no
answer: what is evicted first, what is computed twice, where the time goes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random

import pytest
from fakes import make_request
from scheduler.driver import MakeScheduler
from scheduler.reuse_world import (
    brings_texts_to_their_places,
    chooses_the_same_whatever_happens,
    chooses_what_stands_before,
    computes_a_text_once,
    is_passed_over_no_more_than_some_times,
)
from scheduler.scripted import SMALL, Script

from duetto.core.batch import RequestResult, SampledToken, ScheduledBatch, StepOutput
from duetto.core.cache_miss import CacheMiss, MissReason
from duetto.core.config import SchedulerConfig
from duetto.core.errors import EngineError
from duetto.core.request import FinishReason, Request, fan_out
from duetto.core.shape import BatchShape
from duetto.core.timings import Part
from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, Planned
from duetto.scheduler.scheduler import Scheduler

MakePool = Callable[[int], BlockPool]


# --- of the block pool ---------------------------------------------------------------------


def evicts_the_tail_of_a_prefix_before_its_head(make_pool: MakePool = BlockPool) -> None:
    pool = make_pool(4)
    blocks = pool.allocate(3)
    for block, block_hash in zip(blocks, [b"a", b"b", b"c"], strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    assert blocks == [0, 1, 2]
    pool.allocate(1)  # block 3, which holds nothing
    assert pool.allocate(1) == [2]
    assert pool.find([b"a", b"b", b"c"]) == [0, 1]
    assert pool.allocate(2) == [1, 0]


def evicts_the_least_recently_freed_first(make_pool: MakePool = BlockPool) -> None:
    pool = make_pool(3)
    for block, block_hash in zip(pool.allocate(3), [b"a", b"b", b"c"], strict=True):
        pool.publish(block, block_hash)
    for block in (1, 0, 2):
        pool.release([block])
    pool.retain([1])  # used again: now the most recently freed
    pool.release([1])
    assert [pool.allocate(1) for _ in range(3)] == [[0], [2], [1]]


def reuses_empty_blocks_before_it_evicts(make_pool: MakePool = BlockPool) -> None:
    pool = make_pool(2)
    cached, empty = pool.allocate(2)
    pool.publish(cached, b"a")
    pool.release([cached])
    pool.release([empty])
    assert pool.allocate(1) == [empty]
    assert pool.find([b"a"]) == [cached]


# --- of the scheduler ----------------------------------------------------------------------


def computes_one_prompt_once_for_many_answers(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    script.add(*fan_out(make_request("r", range(1, 11), 2, n=4)))
    assert script.step() == {"r-0": 10}
    # Two blocks of 4 are shared; the last two tokens of the prompt are each one's own.
    assert script.step() == {"r-0": 1, "r-1": 2, "r-2": 2, "r-3": 2}
    script.finish()


def computes_a_system_prompt_once_for_a_burst(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    system = (7,) * 8
    script.add(*(make_request(f"r{i}", (*system, i, i), 1) for i in range(1, 4)))
    assert script.steps(2) == [{"r1": 10}, {"r2": 2, "r3": 2}]


def passes_over_who_waits_for_a_prefix(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_batched_tokens=8)
    script.add(make_request("first", (7,) * 6, 3))
    script.add(make_request("same", (7,) * 6, 3), make_request("other", (5,), 3))
    assert script.step() == {"first": 6, "other": 1}
    assert script.step() == {"first": 1, "other": 1, "same": 2}


def returns_a_preempted_member_to_its_static_batch(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, scheduling_policy="static", max_num_seqs=2)
    script.add(make_request("long", (1,) * 7, 8), make_request("short", (2,) * 7, 3))
    script.add(make_request("next", (3,), 1))
    script.step()
    scheduler = script.scheduler
    scheduler._room.preempt(scheduler.running["short"])
    assert script.waiting == ["short", "next"]
    script.step()
    assert script.running == ["long", "short"]
    script.finish()
    assert list(script.ended) == ["short", "long", "next"]


def gives_nobody_the_place_of_an_aborted_member(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, scheduling_policy="static", max_num_batched_tokens=4, max_num_seqs=3)
    script.add(*(make_request(name, (1,) * 4, 3) for name in "abcd"))
    assert script.step() == {"a": 4}
    script.scheduler.end("b", FinishReason.ABORT, script.now)
    assert script.step() == {"a": 1, "c": 3}
    assert script.step() == {"a": 1, "c": 1}  # and not d
    script.finish()
    assert list(script.ended) == ["a", "c", "d"]


def tells_each_score_once_however_often_preempted(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_batched_tokens=4)
    request = make_request("r", range(1, 13), 2, prompt_logprobs=0)
    script.add(request)
    for num_steps in (2, 1, 3):  # the second time within what the first had computed
        script.steps(num_steps)
        script.scheduler._room.preempt(request)
    script.finish()
    told = [score.token_id for update in script.updates for score in update.prompt_logprobs]
    assert told == list(range(2, 13))


def calls_lost_what_was_lost_before_the_last_preemption(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_batched_tokens=4, enable_prefix_caching=False)
    request = make_request("r", range(1, 13), 1)
    script.add(request)
    for num_steps in (2, 1):  # 8 tokens, then 4 of them again
        script.steps(num_steps)
        script.scheduler._room.preempt(request)
    script.finish()
    assert _parts(request) == {Part.PROMPT: 2 + 1, Part.PREEMPTED: 1 + 2}


def publishes_again_what_a_preempted_request_lost(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    request = make_request("r", range(1, 10), 3)
    script.add(request)
    script.step()
    script.scheduler._room.preempt(request)
    script.scheduler.pool.forget_all()
    script.step()
    same = make_request("same", range(1, 10), 1)
    script.add(same)
    script.step()
    assert same.num_cached_tokens == 8


def accounts_each_second_to_the_right_part(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_batched_tokens=4, max_num_seqs=2, enable_prefix_caching=False)
    a, b, c = (make_request(name, (1,) * 6, 3) for name in "abc")
    script.add(a, b, c)
    script.now = 10.0
    assert script.step(1) == {"a": 4}
    assert script.step(2) == {"a": 2, "b": 2}
    assert script.step(4) == {"a": 1, "b": 3}
    assert script.step(8) == {"a": 1, "b": 1}  # the last of a and of b's prompt
    script.scheduler._room.preempt(b)
    script.now += 16
    assert script.step(32) == {"b": 4}  # computed before
    assert script.step(64) == {"b": 3, "c": 1}
    assert script.step(128) == {"b": 1, "c": 3}
    assert script.step(256) == {"c": 2}
    assert script.step(512) == {"c": 1}
    script.now += 1024
    script.scheduler.end("c", FinishReason.ABORT, script.now)
    assert _parts(a) == {Part.WAITING: 10, Part.PROMPT: 1 + 2, Part.SHARED: 4 + 8}
    lost = 16 + 32 + 64
    assert _parts(b) == {
        Part.WAITING: 11, Part.PROMPT: 2 + 4 + 8, Part.PREEMPTED: lost, Part.SHARED: 128
    }  # fmt: skip
    assert _parts(c) == {
        Part.WAITING: 73, Part.PROMPT: 64 + 128 + 256, Part.DECODE: 512, Part.STALLED: 1024
    }  # fmt: skip
    assert (a.timings.ttft_s, a.timings.itl_s, a.timings.e2e_s) == (13, [4, 8], 25)


def tells_want_of_blocks_from_waiting_for_a_turn(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, num_blocks=4, max_num_seqs=2, enable_prefix_caching=False)
    script.add(make_request("big", (1,) * 9, 5))
    script.now = 1.0
    assert script.step(2) == {"big": 9}  # three blocks of four
    next_ = make_request("next", (3,) * 5, 1, arrival_time=script.now)
    script.add(next_)  # needs two blocks, and one is free
    script.now += 4  # until it is looked at, it waits for its turn
    assert script.step(8) == {"big": 1}
    assert script.step(16) == {"big": 1}
    last = make_request("last", (4,) * 5, 1, arrival_time=script.now)
    script.add(last)  # the queue has stood still for long, but not for this one
    script.now += 32
    script.scheduler.end("big", FinishReason.ABORT, script.now)
    small = make_request("small", (2,) * 2, 1, arrival_time=script.now)
    script.add(small)
    assert script.step(64) == {"next": 5, "last": 5}
    assert _parts(next_) == {Part.WAITING: 4, Part.BLOCKS: 8 + 16 + 32, Part.PROMPT: 64}
    assert _parts(last) == {Part.BLOCKS: 32, Part.PROMPT: 64}
    script.finish()
    assert _parts(small) == {Part.WAITING: 64, Part.PROMPT: 1}  # it waited for a place


def says_why_the_cache_had_no_more(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, num_blocks=6, max_num_seqs=1)

    def miss(*prompt: int, salt: bytes = b"", scored: int | None = None) -> CacheMiss | None:
        name = f"r{script.now}"
        script.add(make_request(name, prompt, 1, cache_salt=salt, prompt_logprobs=scored))
        script.finish()
        return script.updates[-1].timings.cache_miss  # type: ignore[union-attr]

    never, differs, evicted = MissReason.NEVER_SEEN, MissReason.DIFFERS, MissReason.EVICTED
    first = tuple(range(1, 11))
    assert miss(1, 2, 3, 4) == CacheMiss(MissReason.TOO_SHORT, 0)  # its last token is computed
    assert miss(*first) == CacheMiss(never, 4)
    assert miss(*first) is None
    assert miss(*first[:8], 9, 10, 11, 12, 13) == CacheMiss(never, 8)
    assert miss(*first[:6], 0, 0, 0) == CacheMiss(differs, 4, 6)
    assert miss(1, 0, 0, 0, 0) == CacheMiss(differs, 0, 1)
    assert miss(7, 7, 7, 7, 7) == CacheMiss(never, 0)
    assert miss(*first, salt=b"mine") == CacheMiss(MissReason.OTHER_SALT, 0)
    assert miss(*first, scored=0) == CacheMiss(MissReason.SCORED, 0)
    miss(*range(30, 54))  # takes all six blocks
    assert miss(*first) == CacheMiss(evicted, 0)
    assert miss(*first) is None
    script.scheduler.pool.forget_all()
    assert miss(*first) == CacheMiss(MissReason.DROPPED, 0)
    off = Script(make, enable_prefix_caching=False)
    off.add(make_request("off", first, 1))
    off.finish()
    assert off.updates[-1].timings.cache_miss == CacheMiss(MissReason.OFF, 0)  # type: ignore[union-attr]


def says_that_others_have_it_before_what_differs(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, num_blocks=9, max_num_seqs=1)
    for name, prompt, salt in (("theirs", (1, 2, 3, 4, 5), b"a"), ("mine", (1, 2, 0, 0, 0), b"b")):
        script.add(make_request(name, prompt, 1, cache_salt=salt))
        script.finish()
    script.add(make_request("theirs again", (1, 2, 3, 4, 5), 1, cache_salt=b"b"))
    script.finish()
    miss = script.updates[-1].timings.cache_miss  # type: ignore[union-attr]
    assert miss == CacheMiss(MissReason.OTHER_SALT, 0, 2)


def cuts_prompts_by_the_price_of_the_step(make: MakeScheduler = Scheduler) -> None:
    """A step costs 2 s and 1 s for each token; the next tokens of two streams so cost 4 s."""
    prices: list[BatchShape] = []

    def price(shape: BatchShape) -> float:
        prices.append(shape)
        return 2.0 + shape.num_tokens

    script = Script(partial(make, step_time=price), target_itl_s=9.0, enable_prefix_caching=False)
    prompt = make_request("long", (1,) * 19, 1)
    script.add(make_request("a", (2,) * 3, 20), make_request("b", (3,) * 12, 20))
    assert script.step() == {"a": 3, "b": 12} and not prices  # no stream, so no price is asked
    script.add(prompt)
    assert script.steps(3) == [{"a": 1, "b": 1, "long": 5}] * 3  # 2 + 7 = 9
    assert len(prices) < 3 * 8  # bisection
    assert script.step() == {"a": 1, "b": 1, "long": 4}
    script.finish()


def lets_a_prompt_go_on_beside_streams_that_are_too_slow(make: MakeScheduler = Scheduler) -> None:
    script = Script(
        partial(make, step_time=lambda shape: 8.0 * shape.num_tokens),
        target_itl_s=1.0,
        max_num_seqs=16,
        enable_prefix_caching=False,
        num_blocks=64,
    )
    script.add(*(make_request(f"{i}", (1,), 20) for i in range(9)))
    script.step()
    script.add(make_request("long", (1,) * 9, 1))
    streams = {f"{i}": 1 for i in range(9)}
    assert script.step() == {**streams, "long": 2}  # a quarter of nine tokens' time
    for i in range(6):
        script.scheduler.end(f"{i}", FinishReason.ABORT, script.now)
    assert script.step() == {"6": 1, "7": 1, "8": 1, "long": 1}  # less than one token's worth
    script.finish()


def gives_a_prompt_four_steps_of_streams_that_are_slow(make: MakeScheduler = Scheduler) -> None:
    """The default: a time, or so many steps of the streams alone if that is more."""
    for seconds, chunk in ((3.0, 6), (12.0, 10)):  # two streams take 2 s, of which 4 are 8
        script = Script(
            partial(make, step_time=lambda shape: float(shape.num_tokens)),
            target_itl_s=seconds,
            target_itl_steps=4.0,
            enable_prefix_caching=False,
        )
        script.add(make_request("a", (2,), 30), make_request("b", (3,), 30))
        script.step()
        script.add(make_request("long", (1,) * 40, 1))
        assert script.steps(2) == [{"a": 1, "b": 1, "long": chunk}] * 2
        script.finish()


def begins_no_prompt_behind_one_that_was_cut(make: MakeScheduler = Scheduler) -> None:
    """Though its first token, with nothing before it, would cost less than the other's next."""

    def price(shape: BatchShape) -> float:
        return sum(r.num_new + r.attended_pairs(None) / 4 for r in shape.requests)

    script = Script(partial(make, step_time=price), target_itl_s=10.0, enable_prefix_caching=False)
    script.add(make_request("a", (2,), 30))
    script.step()
    script.add(make_request("long", (1,) * 9, 1), make_request("late", (3,) * 9, 1))
    assert script.step() == {"a": 1, "long": 4}  # 1.5 + 6.5; one of late's would take 1.25
    script.finish()


def _of(tenant: bytes, count: int, max_tokens: int, first: int = 0) -> list[Request]:
    return [
        make_request(
            f"{tenant.decode()}{first + i}", (1 + i, 2, 3), max_tokens, tenant=tenant, seed=i
        )
        for i in range(count)
    ]


def lets_clients_take_turns(make: MakeScheduler = Scheduler) -> None:
    """At each admission the client with the fewest running requests is next."""
    script = Script(make, max_num_seqs=4, num_blocks=64)
    script.add(*_of(b"a", 6, 2), *_of(b"b", 2, 2), *_of(b"c", 1, 2))
    script.step()
    assert script.running == ["a0", "b0", "c0", "a1"]
    script.finish()


def lets_clients_take_turns_at_the_only_place(make: MakeScheduler = Scheduler) -> None:
    """None runs whenever the place is free: the last turns tell. Nobody starves, though two others
    ask again each time."""
    script = Script(make, max_num_seqs=1, num_blocks=64)
    script.add(*_of(b"a", 3, 1))
    order: list[str] = []
    for number in range(8):
        for tenant in (b"b", b"c"):
            if not any(r.tenant == tenant for r in script.scheduler.waiting):
                script.add(*_of(tenant, 1, 1, number))
        order += script.step()
    assert [each[0] for each in order] == list("abcabcab")
    script.finish()


def gives_a_small_request_a_place_at_once(make: MakeScheduler = Scheduler) -> None:
    """It waits neither behind those of another client nor for all the tokens of their answers."""
    script = Script(make, max_num_seqs=4, num_blocks=64)
    script.add(*_of(b"a", 12, 30))
    script.steps(3)
    script.add(*_of(b"b", 1, 2))
    assert "b0" in script.step()
    assert script.running == ["a0", "a1", "a2", "b0"]  # the last of the other's gave way
    script.step()
    assert script.step().keys() == {"a0", "a1", "a2", "a3"}  # and is back before those who wait
    script.finish()


def moves_as_few_places_as_make_the_shares_even(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_seqs=7, num_blocks=256, max_num_batched_tokens=64)
    script.add(*_of(b"a", 20, 40))
    script.step()
    script.add(*_of(b"b", 20, 40))
    script.steps(12)
    running = [name[0] for name in script.running]
    assert running.count("a") == 4 and running.count("b") == 3
    assert script.scheduler.counts.num_preemptions == 3  # and none is claimed back
    script.finish()


def gives_blocks_to_a_client_that_has_none(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_seqs=8, num_blocks=8, enable_prefix_caching=False)
    script.add(*(make_request(f"a{i}", (1,) * 5, 24, tenant=b"a") for i in range(4)))
    script.step()
    script.add(make_request("b0", (2,) * 5, 2, tenant=b"b"))
    assert script.waiting == ["b0"]
    assert script.step().keys() == {"a0", "a1", "a2", "b0"}
    script.finish()


def takes_no_place_from_a_more_urgent_request(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_seqs=2, scheduling_policy="priority", num_blocks=64)
    script.add(*_of(b"a", 2, 9))
    script.step()
    script.add(make_request("b0", (7,), 2, tenant=b"b", priority=1))
    assert script.step().keys() == {"a0", "a1"}
    script.add(make_request("b1", (8,), 2, tenant=b"b"))
    assert script.step().keys() == {"a0", "b1"}
    script.finish()


def keeps_a_static_batch_as_it_is(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, max_num_seqs=2, scheduling_policy="static", num_blocks=64)
    script.add(*_of(b"a", 2, 9))
    script.step()
    script.add(*_of(b"b", 1, 2))
    script.steps(5)
    assert script.running == ["a0", "a1"]
    script.finish()


def _parts(request: Request) -> dict[Part, float]:
    return {part: seconds for part, seconds in request.timings.parts.items() if seconds}


def _sampled(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(map(SampledToken, token_ids))


class AsksForAll:
    """A policy that verifies every draft, and asks for four."""

    is_on = True

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        return {request.request_id: len(drafts) for request, drafts in candidates}

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        return {p.request.request_id: Ask("all", min(4, p.num_left)) for p in planned if p.num_left}

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


def _planned(
    make: MakeScheduler, request: Request, *drafts: int
) -> tuple[Scheduler, ScheduledBatch]:
    """A step that verifies drafts after the first token of a request, which is 7."""
    scheduler = make(SchedulerConfig(**SMALL), drafts=AsksForAll())
    scheduler.add(request)
    batch = scheduler.schedule(0.0)
    scheduler.update(batch, StepOutput((RequestResult(_sampled(7), drafts),)), 1.0)
    return scheduler, scheduler.schedule(1.0)


def drops_what_is_beyond_the_limit(make: MakeScheduler = Scheduler) -> None:
    """Though a plan never has more drafts than there are outputs left."""
    request = make_request("r", (1, 2, 3), 9)
    scheduler, batch = _planned(make, request, 4, 5, 6)
    request.max_tokens = 3
    output = StepOutput((RequestResult(_sampled(4, 5, 6, 8)),))
    (update,) = scheduler.update(batch, output, 2.0)
    assert update.finish_reason is FinishReason.LENGTH
    assert [token.token_id for token in update.tokens] == [4, 5]
    assert list(request.output_token_ids) == [7, 4, 5]
    assert request.timings.token_times == [1.0, 2.0, 2.0]
    assert scheduler.pool.num_free == scheduler.config.num_blocks


def ends_with_the_first_stop_token_of_a_run(make: MakeScheduler = Scheduler) -> None:
    request = make_request("r", (1, 2, 3), 9, stop_token_ids=[5])
    scheduler, batch = _planned(make, request, 4, 5, 6)
    output = StepOutput((RequestResult(_sampled(4, 5, 6, 5)),))
    (update,) = scheduler.update(batch, output, 2.0)
    assert (update.finish_reason, update.stop_reason) == (FinishReason.STOP, 5)
    assert [token.token_id for token in update.tokens] == [4, 5]
    assert list(request.output_token_ids) == [7, 4, 5]
    assert request.timings.token_times == [1.0, 2.0, 2.0]


def publishes_no_draft_that_is_wrong(make: MakeScheduler = Scheduler) -> None:
    """Drafts over two edges of blocks, of which one is right."""
    request = make_request("r", (1, 2, 3), 12)
    scheduler, batch = _planned(make, request, 4, 5, 6, 7)
    (item,) = batch.requests
    assert (item.token_ids, item.num_drafts) == ((7, 4, 5, 6, 7), 4)
    assert [row.num_output_tokens for row in item.rows] == [1, 2, 3, 4, 5]
    assert len(item.block_table) == 2
    scheduler.update(batch, StepOutput((RequestResult(_sampled(4, 8)),)), 2.0)
    assert (request.num_written_tokens, request.num_tokens) == (5, 6)
    assert request.num_published_blocks == 1
    scheduler.check()
    (item,) = scheduler.schedule(2.0).requests
    assert (item.token_ids, item.num_computed_tokens, item.num_drafts) == ((8,), 5, 0)


def refuses_a_run_that_is_not_its_drafts(make: MakeScheduler = Scheduler) -> None:
    for tokens in ((4, 6, 6), (5, 5), (4, 5, 6, 7, 8), ()):
        scheduler, batch = _planned(make, make_request("r", (1, 2, 3), 9), 4, 5, 6)
        output = StepOutput((RequestResult(_sampled(*tokens)),))
        with pytest.raises(EngineError):
            scheduler.update(batch, output, 2.0)


def preempts_nobody_for_a_guess(make: MakeScheduler = Scheduler) -> None:
    config = SchedulerConfig(**SMALL | {"num_blocks": 2})
    scheduler = make(config, drafts=AsksForAll())
    scheduler.add(make_request("a", (1, 2), 4))
    scheduler.add(make_request("b", (3, 4), 4))
    batch = scheduler.schedule(0.0)
    results = (RequestResult(_sampled(7), (4, 5, 6)), RequestResult(_sampled(7), (4, 5, 6)))
    scheduler.update(batch, StepOutput(results), 1.0)
    items = scheduler.schedule(1.0).requests
    assert [item.num_drafts for item in items] == [1, 1]  # up to the edge of their blocks
    assert scheduler.counts.num_preemptions == 0


def fails_where_it_would_have_failed_without_drafts(make: MakeScheduler = Scheduler) -> None:
    """The row after two accepted drafts leaves no token: they are told, and it fails alone."""
    request = make_request("r", (1, 2, 3), 9)
    scheduler, batch = _planned(make, request, 4, 5, 6)
    (update,) = scheduler.update(batch, StepOutput((RequestResult(_sampled(4, 5)),)), 2.0)
    assert update.finish_reason is None
    assert [token.token_id for token in update.tokens] == [4, 5]
    (item,) = scheduler.schedule(2.0).requests
    assert (item.token_ids[0], item.num_computed_tokens) == (5, 5)


def advances_as_step_by_step(make: MakeScheduler = Scheduler) -> None:
    """Many steps at once leave what they leave one at a time, in every field; in the last worlds
    two clients take turns."""
    num_run = 0
    for seed in range(30):
        rng, tenants = Random(seed), b"a" if seed < 24 else b"aaab"
        block_size = rng.choice([1, 2, 4])
        config = SchedulerConfig(
            num_blocks=rng.choice([36, 48, 120]) // block_size,
            max_model_len=48,
            block_size=block_size,
            max_num_seqs=rng.choice([3, 6]),
            max_num_batched_tokens=rng.choice([5, 64]),
            enable_prefix_caching=rng.random() < 0.7,
            max_preemptions=rng.choice([0, 1, 4]),
        )
        fast, slow = make(config), make(config)
        now = 0.0
        for number in range(60):
            if len(fast.waiting) < 2 and rng.random() < 0.7:
                for each in (fast, slow):
                    each.add(_numbered(number, now, tenants, Random(100 * seed + number)))
            num_steps = min(fast.num_certain_steps(), rng.choice([1, 7, 99]))
            if num_steps:
                num_free = fast.advance(now, [now + k + 1 for k in range(num_steps)], _own_token)
                num_run += num_steps
            else:
                _step_with_own_tokens(fast, now)
            for step in range(num_steps or 1):
                _step_with_own_tokens(slow, now + step)
                assert not num_steps or num_free[step] == slow.pool.num_free
            now += num_steps or 1
            fast.check()
            assert _everything(fast) == _everything(slow)
    assert num_run > 300


def _numbered(number: int, now: float, tenants: bytes, rng: Random) -> Request:
    tenant = tenants[number % len(tenants) :][:1]
    prompt = [rng.randint(1, 2) for _ in range(rng.randint(1, 9))]
    return make_request(
        f"r{number}", prompt, rng.randint(3, 24), arrival_time=now, seed=number, tenant=tenant
    )


def _own_token(request: Request) -> int:
    return 1000 + request.seed  # it stands in no prompt


def _step_with_own_tokens(scheduler: Scheduler, now: float) -> None:
    """One second, from `now`."""
    batch = scheduler.schedule(now)
    tokens = [_own_token(scheduler.running[item.request_id]) for item in batch.requests]
    results = [
        RequestResult(_sampled(token) if item.rows else ())
        for item, token in zip(batch.requests, tokens, strict=True)
    ]
    scheduler.update(batch, StepOutput(tuple(results)), now + 1)


def _everything(scheduler: Scheduler) -> list[object]:
    pool = scheduler.pool
    state: list[object] = [scheduler.counts, list(pool._free), pool._block_of, pool._ref_counts]
    state += [list(scheduler.running), [r.request_id for r in scheduler.waiting]]
    state += [vars(scheduler._queues.clock), scheduler._misses._next_of]
    state += [request.block_hashes for request in scheduler.running.values()]
    for request in (*scheduler.running.values(), *scheduler.waiting):  # these hash when asked for
        state += [request.token_ids, request.block_table, request.timings]
        state += [request.num_computed_tokens, request.num_written_tokens]
        state += [request.num_published_blocks, request.num_lost_tokens]
    return state


OF_THE_POOL: list[Callable[[MakePool], None]] = [
    evicts_the_tail_of_a_prefix_before_its_head,
    evicts_the_least_recently_freed_first,
    reuses_empty_blocks_before_it_evicts,
]
OF_THE_SCHEDULER: list[Callable[[MakeScheduler], None]] = [
    computes_one_prompt_once_for_many_answers,
    computes_a_system_prompt_once_for_a_burst,
    passes_over_who_waits_for_a_prefix,
    returns_a_preempted_member_to_its_static_batch,
    gives_nobody_the_place_of_an_aborted_member,
    tells_each_score_once_however_often_preempted,
    calls_lost_what_was_lost_before_the_last_preemption,
    publishes_again_what_a_preempted_request_lost,
    accounts_each_second_to_the_right_part,
    tells_want_of_blocks_from_waiting_for_a_turn,
    says_why_the_cache_had_no_more,
    says_that_others_have_it_before_what_differs,
    cuts_prompts_by_the_price_of_the_step,
    lets_a_prompt_go_on_beside_streams_that_are_too_slow,
    gives_a_prompt_four_steps_of_streams_that_are_slow,
    begins_no_prompt_behind_one_that_was_cut,
    lets_clients_take_turns,
    lets_clients_take_turns_at_the_only_place,
    gives_a_small_request_a_place_at_once,
    moves_as_few_places_as_make_the_shares_even,
    gives_blocks_to_a_client_that_has_none,
    takes_no_place_from_a_more_urgent_request,
    keeps_a_static_batch_as_it_is,
    drops_what_is_beyond_the_limit,
    ends_with_the_first_stop_token_of_a_run,
    publishes_no_draft_that_is_wrong,
    refuses_a_run_that_is_not_its_drafts,
    preempts_nobody_for_a_guess,
    fails_where_it_would_have_failed_without_drafts,
    advances_as_step_by_step,
    computes_a_text_once,
    is_passed_over_no_more_than_some_times,
    chooses_what_stands_before,
    chooses_the_same_whatever_happens,
    brings_texts_to_their_places,  # takes longest
]
