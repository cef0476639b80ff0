"""From an engine's steps to a router's index: the same blocks, whatever the engine does."""

import time
from random import Random

import pytest
from cluster.events.test_followed import ANY, following, of, wait_for
from fakes import ShadowExecutor, make_request

from duetto.cluster.events.publisher import EventPublisher, PublisherAddresses
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.routing.prefix_index import PrefixIndex
from duetto.routing.prompt_blocks import prompt_hashes
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=24, max_model_len=32, block_size=2, max_num_seqs=4)


def random_request(rng: Random, number: int) -> Request:
    start = rng.choice([(1, 2, 1, 2), (2, 2), (1, 1, 1, 1, 2, 2)])
    prompt = [*start, *rng.choices((1, 2), k=rng.randint(1, 8))]
    salt = rng.choice((b"", b"tenant"))
    return make_request(f"r{number}", prompt, rng.randint(1, 6), cache_salt=salt)


@pytest.mark.parametrize("seed", range(3))
def test_an_index_finds_what_the_pool_would(seed):
    rng, index, late = Random(seed), PrefixIndex(), PrefixIndex()
    engine = Engine(Scheduler(CONFIG), ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size))
    pool = engine.scheduler.pool
    publisher = EventPublisher(PublisherAddresses(ANY))
    publisher.follow(pool, CONFIG.block_size)
    try:
        with following(index) as subscriber:
            subscriber.follow(of(publisher))
            for number in range(60):
                engine.add(random_request(rng, number))
                for _ in range(rng.randrange(4)):
                    if engine.has_work:
                        engine.step()
                if rng.random() < 0.05:
                    engine.scheduler.forget_cached()
                if number % 10 == 0:
                    time.sleep(0.01)  # or all of it is one batch
            while engine.has_work:
                engine.step()
            subscriber.follow(of(publisher, "again"))
            wait_for(lambda: index.holding("w") == set(pool._block_of))
            wait_for(lambda: index.holding("again") == set(pool._block_of))
        with following(late) as subscriber:
            subscriber.follow(of(publisher))
            wait_for(lambda: late.holding("w") == set(pool._block_of))
            for number in range(40):
                hashes = prompt_hashes(random_request(rng, number), CONFIG)
                found = len(pool.find(hashes))
                assert late.cached(hashes) == ({"w": found} if found else {})
    finally:
        publisher.close()
