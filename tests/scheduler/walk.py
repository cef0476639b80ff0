"""A seeded random walk through the rules of the Driver, cheap enough for a million steps.

Each episode draws a small world (so that blocks are scarce and ids collide), the habits of its
callers, and which rules never happen in it: long runs of few rules find what an even mix does not.
"""

from dataclasses import dataclass
from random import Random

from fakes import make_request
from scheduler.driver import FAULTS, Driver, MakeScheduler
from scheduler.guesses import Guesses

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request, fan_out
from duetto.core.reuse import Reuse, TokenRange
from duetto.scheduler.scheduler import Scheduler

STEPS_PER_EPISODE = 200
MAX_MODEL_LEN = 24
CHECK_EVERY = 3  # a leak stays, so it need not be looked for at once
CHECK_CACHE_EVERY = 32
RULES = ("abort", "stop", "preempt", "forget")


@dataclass(frozen=True, slots=True)
class Habits:
    """How often a rule happens per step, and what the requests of an episode have in common."""

    add: float
    meddle: float
    fault: float
    rules: tuple[str, ...]  # those of RULES that happen
    prefixes: tuple[tuple[int, ...], ...]
    salts: tuple[bytes, ...]
    tenants: tuple[bytes, ...]
    texts: tuple[tuple[int, ...], ...]  # parts of prompts that may be reused
    rare: float  # how many requests ask for something special
    max_live: int


def walk(seed: int, num_steps: int, make_scheduler: MakeScheduler = Scheduler) -> int:
    """Walk at least `num_steps` steps, and return how many. Raises if anything is ever wrong."""
    rng = Random(seed)
    steps = 0
    while steps < num_steps:
        driver = random_driver(rng, make_scheduler)
        _episode(driver, rng)
        steps += driver.num_steps
    return steps


def random_driver(rng: Random, make_scheduler: MakeScheduler) -> Driver:
    config, draw = random_config(rng), rng.random()
    driver = Driver(
        config,
        make_scheduler,
        depth=0 if draw < 0.4 else rng.randint(1, 2),
        drafts=Guesses(rng.randrange(1000)) if rng.random() < 0.6 else None,
    )
    driver.executor.skill = rng.choice([0.0, 0.7, 0.7, 1.0])
    driver.encodes = rng.random() < 0.02
    return driver


def random_config(rng: Random) -> SchedulerConfig:
    block_size = rng.randint(1, 4)
    policy = rng.choice(["fcfs", "priority", "static"])
    chunked = rng.random() < 0.75
    return SchedulerConfig(
        num_blocks=rng.randint(12 // block_size + 1, 32 // block_size),
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.randint(1, 12)
        if chunked
        else rng.randint(MAX_MODEL_LEN, MAX_MODEL_LEN + 4),
        enable_chunked_prefill=chunked,
        enable_prefix_caching=rng.random() < 0.75,
        scheduling_policy=policy,  # type: ignore[arg-type]
        max_preemptions=rng.randint(0, 4),
        ageing_s=rng.choice([1.0, 8.0, 64.0]),
        target_itl_s=rng.choice([None, None, 6.0, 14.0]) if chunked else None,
        target_itl_steps=rng.choice([1.25, 1.25, 4.0]),
    )


def random_habits(rng: Random) -> Habits:
    def sometimes(rate: float) -> float:
        return rate if rng.random() < 0.5 else 0.0

    return Habits(
        add=rng.choice([0.1, 0.5, 1.0]),
        meddle=rng.choice([0.0, 0.05, 0.2]),
        fault=sometimes(0.06),
        rules=tuple(rng.sample(RULES, rng.randint(1, len(RULES)))),
        prefixes=tuple(_tokens(rng, rng.randint(0, 7)) for _ in range(rng.randint(1, 3))),
        salts=(b"",) if rng.random() < 0.7 else (b"", b"a"),
        tenants=(b"",) if rng.random() < 0.5 else (b"", b"", b"", b"x", b"y"),
        texts=tuple(_tokens(rng, rng.randint(1, 5)) for _ in range(rng.choice((0, 0, 1, 3)))),
        rare=sometimes(0.3),
        max_live=rng.randint(2, 8),
    )


def random_request(rng: Random, habits: Habits, request_id: str) -> Request:
    prompt, reuse = rng.choice(habits.prefixes), None
    if habits.texts and rng.random() < 0.7:
        prompt, reuse = _with_texts(rng, habits, prompt)
    prompt += _tokens(rng, rng.randint(1, 4))
    max_tokens = rng.randint(1, 16 if rng.random() < 0.95 else 30)  # beyond what can ever fit
    special = rng.random() < habits.rare
    return make_request(
        request_id,
        prompt,
        max_tokens,
        stop_token_ids=[1] if rng.random() < 0.3 else [],
        bad_word_ids=[[3], [1, 2], [4, 5, 5]] if special and rng.random() < 0.5 else [],
        seed=rng.randrange(4),
        priority=rng.randrange(4),
        cache_salt=rng.choice(habits.salts),
        tenant=rng.choice(habits.tenants),
        reuse=reuse,
        min_tokens=rng.randint(0, max_tokens) if special else 0,
        prompt_logprobs=2 if special and rng.random() < 0.7 else None,
        n=rng.randint(2, 4) if special and rng.random() < 0.5 else 1,
    )


def _with_texts(
    rng: Random, habits: Habits, prompt: tuple[int, ...]
) -> tuple[tuple[int, ...], Reuse]:
    """Some texts after a prefix, perhaps with own tokens between them."""
    segments: list[TokenRange] = []
    for _ in range(rng.randint(1, 3)):
        text = rng.choice(habits.texts)
        segments.append(TokenRange(len(prompt), len(prompt) + len(text)))
        prompt += text + _tokens(rng, rng.choice((0, 0, 1)))
    ranges, ratio = tuple(segments), rng.choice((0.0, 0.1, 0.3, 0.6, 0.9, 1.0))
    match rng.randrange(4):
        case 0:
            return prompt, Reuse(ranges)
        case 1:
            return prompt, Reuse(ranges, "first", rng.randint(0, 2))
        case 2:
            return prompt, Reuse(ranges, "hkvd", ratio=ratio)
        case _:
            return prompt, Reuse(ranges, "query", ratio=ratio, num_rounds=rng.choice((1, 1, 2, 3)))


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices((1, 2), k=count))


def _episode(driver: Driver, rng: Random) -> None:
    habits = random_habits(rng)
    for number in range(STEPS_PER_EPISODE):
        if not driver.live or (len(driver.live) < habits.max_live and rng.random() < habits.add):
            for request in fan_out(random_request(rng, habits, f"r{number}")):
                is_doomed = rng.random() < habits.rare / 3
                driver.add(request, rng.randrange(request.max_tokens) if is_doomed else None)
        if rng.random() < habits.meddle:
            _meddle(driver, rng, habits)
        if rng.random() < habits.fault:
            driver.step(rng.choice(FAULTS), rng.choice([*driver.live, ""]))
        else:
            driver.step()
        if number % CHECK_EVERY == 0:
            driver.check()
        if number % CHECK_CACHE_EVERY == 0:
            driver.check_cache()
    driver.drain()


def _meddle(driver: Driver, rng: Random, habits: Habits) -> None:
    """Let one of the rules happen that this episode knows."""
    rule = rng.choice(habits.rules)
    request_id = rng.choice([*driver.live, "unknown"])
    match rule:
        case "abort":
            driver.abort(request_id)
            driver.abort(request_id)  # a second time it is unknown
        case "stop":
            driver.stop(request_id)
        case "preempt":
            driver.preempt(request_id)
        case "forget":
            driver.forget_all()
