"""A world of requests that reuse texts' KV, and what must hold in it: for one prompt and choice the
same answer whatever the cache holds, the budget, the company, preemption and steps in flight; and
nothing approximate is ever found."""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from random import Random
from typing import Any

from fakes import ShadowExecutor, generate_alone, make_request
from shadow import shadow_kvs

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.reuse import Reuse, ReuseMethod, TokenRange
from duetto.engine.engine import Engine
from duetto.scheduler.scheduler import Scheduler

MakeScheduler = Callable[[SchedulerConfig], Scheduler]
MAX_STEPS = 4000
TEXTS = [tuple(Random(i).choices(range(1, 8), k=size)) for i, size in enumerate((5, 8, 11, 16, 3))]


def reusing(
    name: str,
    texts: list[tuple[int, ...]],
    *,
    before: tuple[int, ...] = (1, 1),
    after: tuple[int, ...] = (6, 2, 6),
    num_first: int = 0,
    ratio: float | None = None,
    num_rounds: int = 0,
    between: tuple[int, ...] = (),
    **options: Any,
) -> Request:
    """Own tokens, then texts, own tokens `between` them, then own tokens. With a ratio, what is
    computed is chosen by deviation, or in so many rounds by what the question attends to."""
    prompt, segments = list(before), list[TokenRange]()
    for text in texts:
        segments.append(TokenRange(len(prompt), len(prompt) + len(text)))
        prompt += text
        prompt += between
    prompt += after
    request, ranges = make_request(name, prompt, **options), tuple(segments)
    if ratio is None:
        method: ReuseMethod = "first" if num_first else "none"
        return with_reuse(request, Reuse(ranges, method, num_first))
    if not num_rounds:
        return with_reuse(request, Reuse(ranges, "hkvd", ratio=ratio))
    return with_reuse(request, Reuse(ranges, "query", ratio=ratio, num_rounds=num_rounds))


def with_reuse(request: Request, reuse: Reuse) -> Request:
    return Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        seed=request.seed,
        cache_salt=request.cache_salt,
        priority=request.priority,
        reuse=reuse,
    )


def config(**options: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"num_blocks": 64, "max_model_len": 200, "block_size": 4, **options})


@lru_cache(4096)
def _kvs_of(token_ids: tuple[int, ...]) -> list[int]:
    return shadow_kvs(token_ids)


class World:
    """An engine that is checked after every step."""

    def __init__(
        self,
        config: SchedulerConfig,
        depth: int = 0,
        make_scheduler: MakeScheduler = Scheduler,
    ) -> None:
        self.scheduler = make_scheduler(config)
        self.executor = ShadowExecutor(config.num_blocks, config.block_size)
        self.engine = Engine(self.scheduler, self.executor, clock=lambda: 0.0, depth=depth)
        self.tokens: dict[str, list[int]] = {}
        self.num_steps = self.num_moves = self.num_looks = 0
        self.seen: list[Request] = []  # whose texts may be found

    def add(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self.engine.add(request)

    def step(self) -> None:
        self.num_steps += 1
        assert self.num_steps < MAX_STEPS, "no end of it in sight"
        for update in self.engine.step().updates:
            assert update.error is None, update.error
            self.tokens[update.request_id] += [token.token_id for token in update.tokens]
        self.num_moves, self.num_looks = self.executor.num_moves, self.executor.num_looks
        assert self.executor.complaint is None, self.executor.complaint
        self.scheduler.check()
        self.check_found()

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.add(request)
        while self.engine.has_work:
            self.step()
        for request in requests:
            assert self.tokens[request.request_id] == generate_alone(request)

    def check_found(self) -> None:
        """All that can be found by hash is exact: a text from its own first token on."""
        exact = {kv for text in self.known_texts for kv in _kvs_of(text)}
        for block in self.scheduler.pool._hash_of:
            held = [kv for kv in self.executor.read_block(block) if kv != -1]
            assert held, "an empty block is published"
            assert held[0] in exact, "what can be found is not exact"

    @property
    def known_texts(self) -> list[tuple[int, ...]]:
        live = [*self.scheduler.running.values(), *self.scheduler.waiting, *self.seen]
        found = [*TEXTS]
        for request in live:
            found.append(tuple(request.token_ids))
        return found


def swarm(seed: int, depth: int, make_scheduler: MakeScheduler = Scheduler) -> World:
    """Requests come at random, into a pool that is mostly too small for them all."""
    random = Random(seed)
    block_size = random.choice((1, 3, 4, 8))
    world = World(
        config(
            num_blocks=random.choice((90, 120, 160)) // block_size,
            block_size=block_size,
            max_num_batched_tokens=random.choice((3, 7, 16, 200)),
            max_num_seqs=random.choice((2, 4, 6)),
        ),
        depth,
        make_scheduler,
    )
    requests: list[Request] = []
    while len(requests) < 20:
        request = reusing(
            f"r{len(requests)}",
            random.choices(TEXTS, k=random.randrange(4)),
            before=tuple(random.choices(range(1, 8), k=random.randrange(4))),
            between=tuple(random.choices(range(1, 8), k=random.choice((0, 0, 1, 2)))),
            max_tokens=random.randrange(1, 40),
            seed=len(requests),
            **any_choice(random),
        )
        with suppress(InvalidRequest):  # it cannot fit
            world.scheduler.config.check_fits(request)
            requests.append(request)
            if random.random() < 0.4:  # the same prompt in full, which others may find
                name = f"r{len(requests)}"
                requests.append(make_request(name, request.prompt_token_ids, 5))
    world.seen = requests
    waiting = [*requests]
    while world.engine.has_work or waiting:
        if waiting and random.random() < 0.4:
            world.add(waiting.pop())
        if world.engine.has_work:
            world.step()
        if random.random() < 0.05:
            world.scheduler.pool.forget_all()
    for request in requests:
        assert world.tokens[request.request_id] == generate_alone(request)
    return world


def any_choice(random: Random) -> dict[str, Any]:
    ratio = random.choice((0.0, 0.07, 0.15, 0.3, 0.5, 0.9, 1.0))
    kind = random.randrange(4)
    if kind < 2:
        return {"num_first": 2 * kind}
    return {"ratio": ratio, "num_rounds": 0 if kind == 2 else random.choice((1, 1, 2, 3))}


def brings_texts_to_their_places(make_scheduler: MakeScheduler = Scheduler) -> None:
    for seed in range(8):
        swarm(seed, seed % 3, make_scheduler)


def computes_a_text_once(make_scheduler: MakeScheduler = Scheduler) -> None:
    """Whoever needs it, at once or one after the other, but for those with another salt."""
    world = World(config(), make_scheduler=make_scheduler)
    first = reusing("a", [TEXTS[0], TEXTS[1], TEXTS[2]])
    second = reusing("b", [TEXTS[2], TEXTS[0], TEXTS[1]], before=(1, 2, 3))
    third = reusing("c", [TEXTS[1], TEXTS[1]], before=(7,))
    salted = reusing("d", [TEXTS[1]], cache_salt=b"another")
    world.seen = [first, second, third, salted]
    world.run(first, second)
    # Before the texts, after them, and the answers but their last tokens.
    own = 2 * (3 + 3) + 2 + 3
    assert world.executor.num_tokens_run == own + sum(map(len, TEXTS[:3]))
    world.run(third)
    assert world.executor.num_tokens_run == own + sum(map(len, TEXTS[:3])) + 1 + 3 + 3
    before = world.executor.num_tokens_run
    world.run(salted)
    assert world.executor.num_tokens_run - before == 2 + 3 + 3 + len(TEXTS[1])


CHOICES: tuple[dict[str, Any], ...] = (  # none of which chooses what another one does
    {"ratio": 0.3},
    {"ratio": 0.03},  # one token, of the second text
    {"ratio": 0.3, "num_rounds": 1},
    {"ratio": 0.3, "num_rounds": 3},
)


def choosing(name: str, choice: dict[str, Any], **options: Any) -> Request:
    return reusing(name, [TEXTS[3], TEXTS[2]], between=(6,), **choice, **options)


def meddle_at_any_stage(
    choice: dict[str, Any],
    depth: int,
    meddle: Callable[[World, Request], None],
    make_scheduler: MakeScheduler = Scheduler,
) -> int:
    """Let something happen after a number of steps, for each such number; returns how many."""
    for number in range(1, 100):
        world = World(config(max_num_batched_tokens=8), depth, make_scheduler)
        request = choosing("a", choice)
        others = [make_request(name, [5, 6], 60, seed=1) for name in "bc"]  # no step is one's alone
        world.seen = [request, *others]
        for each in (*others, request):
            world.add(each)
        for _ in range(number):
            world.step()
        if "a" not in world.scheduler.running:
            return number
        meddle(world, request)
        world.scheduler.check()
        while request.finish_reason is None:
            world.step()
        assert world.tokens["a"] == generate_alone(request)
    raise AssertionError("it never ends")


def preempt(world: World, request: Request) -> None:
    world.scheduler._room.preempt(request)


def fail(world: World, _: Request) -> None:
    """The next step raises when it has written: deviations are not those from what it wrote."""
    world.executor.fail_after_writing = True


def chooses_the_same_whatever_happens(make_scheduler: MakeScheduler = Scheduler) -> None:
    for number, choice in enumerate(CHOICES):
        for meddle in (preempt, fail):
            meddle_at_any_stage(choice, number % 3, meddle, make_scheduler)


def chooses_what_stands_before(make_scheduler: MakeScheduler = Scheduler) -> None:
    """Of texts with and without own tokens between them, and of shares of any size."""
    world, requests = World(config(), make_scheduler=make_scheduler), list[Request]()
    for number, ratio in enumerate((0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6) * 3):
        texts = Random(number).sample(TEXTS, 4)
        between = (6,) * (number % 3)
        options: dict[str, Any] = {
            "ratio": ratio,
            "num_rounds": 1,
            "between": between,
            "seed": number,
        }
        requests.append(reusing(f"r{number}", texts, max_tokens=4, **options))
    world.seen = requests
    for request in requests:
        world.run(request)


def is_passed_over_no_more_than_some_times(make_scheduler: MakeScheduler = Scheduler) -> None:
    """While others, who come before it, compute its text anew in each step, since it is evicted."""
    scheduler = make_scheduler(
        config(scheduling_policy="priority", num_blocks=200, max_num_seqs=100)
    )
    executor = ShadowExecutor(scheduler.config.num_blocks, scheduler.config.block_size)
    waiting = reusing("waiting", [TEXTS[0]], priority=1, max_tokens=1)
    scheduler.add(waiting)
    num_overtaken = 0
    for number in range(40):
        scheduler.add(reusing(f"first{number}", [TEXTS[0]], before=(number,), max_tokens=1))
        scheduler.add(make_request(f"late{number}", [number], 1, priority=2))
        batch = scheduler.schedule(0.0)
        num_overtaken += f"late{number}" in {item.request_id for item in batch.requests}
        scheduler.update(batch, executor.execute(batch), 0.0)
        assert waiting in scheduler.waiting
        scheduler.pool.forget_all()
    assert num_overtaken == 16, "passed over too often, or too seldom"
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        scheduler.update(batch, executor.execute(batch), 0.0)
