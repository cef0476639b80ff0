"""Blocks for KV from another engine, and blocks that are sent: alone, and in a walk through
everything that a scheduler and two sides of transfers can do."""

from dataclasses import dataclass
from random import Random

import pytest
from fakes import ShadowExecutor, generate_alone, make_request
from shadow import shadow_kvs

from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason, Request
from duetto.engine.engine import Engine
from duetto.scheduler.imports import TakenBlocks
from duetto.scheduler.scheduler import Scheduler

GARBAGE = 12345


def scheduler(num_blocks: int = 32, **options: bool) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks, max_model_len=64, block_size=4, max_num_seqs=4, **options
        )
    )


def take(one: Scheduler, request: Request) -> TakenBlocks:
    taken = one.imports.take(request)
    assert taken is not None
    one.check()
    return taken


def test_what_came_is_found_by_the_admission() -> None:
    one, request = scheduler(), make_request("r", range(10), 4)
    taken = take(one, request)
    assert (len(taken.missing), taken.num_here, one.pool.num_free) == (2, 0, 30)
    one.imports.publish(taken)
    one.check()
    one.add(request)
    (item,) = one.schedule(0.0).requests
    assert item.num_computed_tokens == 8
    assert item.block_table[:2] == taken.blocks
    assert one.imports.num_open == 0
    one.check()


def test_what_is_here_stays_and_only_the_rest_is_taken() -> None:
    one, request = scheduler(), make_request("r", range(17), 4)
    first = take(one, make_request("first", range(9), 4))
    one.imports.publish(first)
    one.imports.forget("first")
    taken = take(one, request)
    assert taken.num_here == 2
    assert taken.blocks[:2] == first.blocks
    assert one.pool.find(taken.hashes) == list(first.blocks)  # nothing else is found before
    one.imports.drop(taken)
    assert one.pool.num_free == 32
    one.check()


@pytest.mark.parametrize("request_", [
    make_request("short", range(4), 4),  # its only block holds the last token
    make_request("scored", range(12), 4, prompt_logprobs=1),
], ids=lambda r: r.request_id)  # fmt: skip
def test_nothing_is_taken_for_what_may_not_be_reused(request_: Request) -> None:
    assert scheduler().imports.take(request_) is None


def test_nothing_is_taken_without_a_prefix_cache_nor_for_what_is_all_here() -> None:
    off = scheduler(enable_prefix_caching=False)
    assert off.imports.take(make_request("r", range(12), 4)) is None
    one = scheduler()
    one.imports.publish(take(one, make_request("r", range(12), 4)))
    assert one.imports.take(make_request("alike", range(12), 4)) is None


def test_half_of_the_pool_is_the_most_and_a_reserve_stays_free() -> None:
    one = scheduler(num_blocks=16)
    one.imports.take(make_request("r", range(25), 4, cache_salt=b"r"))
    assert one.imports.take(make_request("more", range(13), 4)) is None  # 6 and 3
    assert one.imports.take(make_request("less", range(9), 4)) is not None
    two = scheduler(num_blocks=16)
    two.pool.allocate(12)
    assert two.imports.take(make_request("r", range(17), 4)) is None  # 4, and none left
    assert two.imports.take(make_request("less", range(13), 4)) is not None


def test_whoever_waits_has_been_there_before() -> None:
    one = scheduler(num_blocks=16)
    one.pool.allocate(8)
    one.add(make_request("waits", range(20), 4))
    assert one.imports.take(make_request("r", range(13), 4)) is None  # 3, and 5, and the reserve
    assert one.imports.take(make_request("less", range(9), 4)) is not None


def test_two_that_bring_the_same_share_what_came_first() -> None:
    one = scheduler()
    first, second = (take(one, make_request(name, range(12), 4)) for name in "ab")
    assert not {*first.blocks} & {*second.blocks}
    one.imports.publish(first)
    one.imports.publish(second)
    one.check()
    assert one.pool.num_free == 30
    one.imports.forget("a")
    one.imports.forget("b")
    assert one.pool.num_free == 32
    one.check()


def test_what_ends_before_it_is_admitted_holds_nothing() -> None:
    one, request = scheduler(), make_request("r", range(12), 4)
    one.imports.publish(take(one, request))
    one.add(request)
    one.end("r", FinishReason.ABORT, 0.0)
    assert one.pool.num_free == 32


def test_what_came_gives_way_to_whom_could_not_run_otherwise() -> None:
    one = scheduler(num_blocks=16)
    one.imports.publish(take(one, make_request("r", range(33), 4)))
    large = make_request("large", range(100, 160), 4)
    one.add(large)
    assert not one.schedule(0.0).requests
    assert one.schedule(1.0).requests[0].request_id == "large"
    one.check()


def test_sent_blocks_stay_whatever_becomes_of_their_request() -> None:
    one = scheduler(num_blocks=2)
    one.add(make_request("r", range(7), 1))
    (item,) = one.schedule(0.0).requests
    one.imports.retain("t", item.block_table[:1])
    one.check()
    one.end("r", FinishReason.ABORT, 0.0)
    assert one.pool.num_free == 1
    one.imports.release("t")
    one.imports.release("t")
    assert one.pool.num_free == 2
    one.check()


# --- everything at once --------------------------------------------------------------------


@dataclass
class Sending:
    blocks: list[int]
    contents: list[list[int]]


class Walk:
    """An engine without a model, and two ends of transfers that do what real ones may."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        self.size = rng.choice([1, 2, 4])
        num_blocks = rng.randint(24 // self.size + 2, 60 // self.size)
        config = SchedulerConfig(
            num_blocks=num_blocks,
            max_model_len=24,
            block_size=self.size,
            max_num_seqs=rng.randint(1, 4),
            max_num_batched_tokens=rng.randint(2, 16),
        )
        self.scheduler = Scheduler(config)
        self.executor = ShadowExecutor(num_blocks, self.size)
        self.now = 0.0
        self.engine = Engine(self.scheduler, self.executor, clock=lambda: self.now)
        self.prompts = [[rng.randrange(5) for _ in range(20)] for _ in range(2)]
        self.taken: list[TakenBlocks] = []
        self.sending: dict[int, Sending] = {}
        self.answers: dict[str, list[int]] = {}
        self.told: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.num_added = self.num_published = self.num_sent = self.num_hits = 0

    def request(self) -> Request:
        self.num_added += 1
        length = self.rng.randint(1, 18)
        return make_request(
            f"r{self.num_added}",
            self.rng.choice(self.prompts)[:length],
            self.rng.randint(1, 24 - length),
            cache_salt=self.rng.choice([b"", b"salt"]),
            arrival_time=self.now,
        )

    def add(self, request: Request) -> None:
        self.answers[request.request_id] = generate_alone(request)
        self.told[request.request_id] = []
        self.engine.add(request)

    def begin(self) -> None:
        request = self.request()
        taken = self.scheduler.imports.take(request)
        if taken is None:
            self.add(request)
            return
        self.taken.append(taken)
        self.write(taken, wrong=True)

    def write(self, taken: TakenBlocks, *, wrong: bool = False) -> None:
        """What another engine sends; half of it is no KV yet."""
        tokens = taken.request.prompt_token_ids[: len(taken.blocks) * self.size]
        kvs = shadow_kvs(tokens)
        for index in range(taken.num_here, len(taken.blocks)):
            for offset in range(self.size):
                slot, position = (
                    taken.blocks[index] * self.size + offset,
                    index * self.size + offset,
                )
                self.executor._slots[slot] = GARBAGE if wrong else kvs[position]
                self.executor._tokens[slot] = tokens[position]

    def end(self) -> None:
        """A transfer is over: all came, it failed, or its request was aborted."""
        taken = self.taken.pop(self.rng.randrange(len(self.taken)))
        draw = self.rng.random()
        if draw < 0.6:
            self.write(taken)
            self.scheduler.imports.publish(taken)
            self.num_published += 1
        else:
            self.scheduler.imports.drop(taken)
        if draw > 0.9:
            self.scheduler.imports.forget(taken.request.request_id)
        else:
            self.add(taken.request)

    def send(self) -> None:
        running = [r for r in self.scheduler.running.values() if r.num_written_tokens >= self.size]
        if not running:
            return
        request = self.rng.choice(running)
        blocks = request.block_table[: request.num_written_tokens // self.size]
        self.num_sent += 1
        self.scheduler.imports.retain(self.num_sent, blocks)
        contents = [self.executor.read_block(block) for block in blocks]
        self.sending[self.num_sent] = Sending(blocks, contents)

    def acknowledge(self) -> None:
        number = self.rng.choice([*self.sending])
        sending = self.sending.pop(number)
        now = [self.executor.read_block(block) for block in sending.blocks]
        assert now == sending.contents, "somebody wrote what was being read"
        self.scheduler.imports.release(number)

    def step(self) -> None:
        self.now += 1
        report = self.engine.step()
        if self.executor.complaint is not None:
            raise self.executor.complaint
        for update in report.updates:
            self.told[update.request_id] += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                self.num_hits += update.num_cached_tokens > 0
                assert self.told[update.request_id] == self.answers.pop(update.request_id)

    def meddle(self) -> None:
        draw, live = self.rng.random(), [*self.answers]
        if draw < 0.3 and live:
            victim = self.rng.choice(live)
            self.engine.abort(victim)
            del self.answers[victim]
        elif draw < 0.6 and self.scheduler.running:
            victim = self.rng.choice([*self.scheduler.running])
            self.scheduler._room.preempt(self.scheduler.running[victim])
        elif draw < 0.7:
            self.scheduler.forget_cached()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            draw = self.rng.random()
            if draw < 0.15 and len(self.answers) < 8:
                self.begin()
            elif draw < 0.25 and self.taken:
                self.end()
            elif draw < 0.3:
                self.send()
            elif draw < 0.36 and self.sending:
                self.acknowledge()
            elif draw < 0.4:
                self.meddle()
            else:
                self.step()
            self.scheduler.check()
        while self.taken:
            self.end()
        while self.sending:
            self.acknowledge()
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.answers, "a request never ends"
        self.scheduler.check()
        assert self.scheduler.imports.num_open == 0
        assert self.scheduler.pool.num_free == self.scheduler.config.num_blocks


def test_a_walk_through_everything() -> None:
    num_published = num_sent = num_hits = 0
    for seed in range(30):
        walk = Walk(seed)
        walk.run(200)
        num_published += walk.num_published
        num_sent += walk.num_sent
        num_hits += walk.num_hits
    assert min(num_published, num_sent, num_hits) > 50  # it happened
