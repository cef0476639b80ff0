"""A world of requests that reuse texts' KV, and what must hold in it: for one prompt and choice the
same answer whatever the cache holds, the budget, the company, preemption and steps in flight; and
nothing approximate is ever found."""

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from fakes import ShadowExecutor, generate_alone, make_request, shadow_kvs

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.engine.engine import Engine
from duetto.scheduler.scheduler import Scheduler

MakeScheduler = Callable[[SchedulerConfig], Scheduler]
TEXTS = [tuple(Random(i).choices(range(1, 8), k=size)) for i, size in enumerate((5, 8, 11, 16, 3))]


def reusing(
    name: str,
    texts: list[tuple[int, ...]],
    *,
    before: tuple[int, ...] = (1, 1),
    after: tuple[int, ...] = (6, 2, 6),
    num_first: int = 0,
    **options: Any,
) -> Request:
    """Own tokens, then texts, then own tokens."""
    prompt, segments = list(before), list[TokenRange]()
    for text in texts:
        segments.append(TokenRange(len(prompt), len(prompt) + len(text)))
        prompt += text
    prompt += after
    request = make_request(name, prompt, **options)
    method = "first" if num_first else "none"
    return with_reuse(request, Reuse(tuple(segments), method, num_first))


def with_reuse(request: Request, reuse: Reuse) -> Request:
    return Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        seed=request.seed,
        cache_salt=request.cache_salt,
        reuse=reuse,
    )


def config(**options: int) -> SchedulerConfig:
    return SchedulerConfig(
        **{"num_blocks": 64, "max_model_len": 200, "block_size": 4, **options}  # type: ignore[arg-type]
    )


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
        self.num_moves = 0
        self.seen: list[Request] = []  # whose texts may be found

    def add(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self.engine.add(request)

    def step(self) -> None:
        for update in self.engine.step().updates:
            assert update.error is None, update.error
            self.tokens[update.request_id] += [token.token_id for token in update.tokens]
        self.num_moves = self.executor.num_moves
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
        exact = {kv for text in self.known_texts for kv in shadow_kvs(text)}
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
            num_first=random.choice((0, 0, 2)),
            max_tokens=random.randrange(1, 40),
            seed=len(requests),
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
