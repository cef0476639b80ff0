"""Properties that no random walk can judge, as functions of the code under test.

They are tests of their own, and test_planted_faults.py asks them about faults that change no
answer: what is evicted first, what is computed twice, where the time goes.
"""

from collections.abc import Callable

from fakes import make_request
from scheduler.driver import MakeScheduler
from scheduler.scripted import Script

from duetto.core.request import FinishReason, Request, fan_out
from duetto.core.timings import Part
from duetto.scheduler.block_pool import BlockPool
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
    scheduler._preempt(scheduler.running["short"])
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
        script.scheduler._preempt(request)
    script.finish()
    told = [score.token_id for update in script.updates for score in update.prompt_logprobs]
    assert told == list(range(2, 13))


def publishes_again_what_a_preempted_request_lost(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    request = make_request("r", range(1, 10), 3)
    script.add(request)
    script.step()
    script.scheduler._preempt(request)
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
    script.scheduler._preempt(b)
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


def _parts(request: Request) -> dict[Part, float]:
    return {part: seconds for part, seconds in request.timings.parts.items() if seconds}


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
    publishes_again_what_a_preempted_request_lost,
    accounts_each_second_to_the_right_part,
]
