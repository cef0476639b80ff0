"""What workers should have cached, by what they were sent."""

import random
from collections import OrderedDict

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.routing.prompt_blocks import prompt_hashes
from duetto.routing.sent_prefixes import SentPrefixes
from duetto.scheduler.prefix import reusable_hashes


def blocks(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "little") for number in numbers]


def test_what_was_sent_is_there_until_its_worker_leaves() -> None:
    sent = SentPrefixes()
    sent.sent("a", blocks(1, 2, 3), 10)
    sent.sent("b", blocks(1, 2), 10)
    assert sent.cached(blocks(1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert sent.cached(blocks(2, 3)) == {"a": 2, "b": 1}
    sent.left("a")
    assert sent.cached(blocks(1, 2, 3)) == {"b": 2}
    assert (sent.num_blocks("a"), sent.num_blocks("b")) == (0, 2)


def test_a_worker_keeps_as_many_blocks_as_it_has() -> None:
    """As a model of one dict per worker does."""
    source, sent = random.Random(3), SentPrefixes()
    model: dict[str, OrderedDict[bytes, None]] = {name: OrderedDict() for name in "abc"}
    for _ in range(1500):
        name, start = source.choice("abc"), source.randrange(8) * 10
        chain = blocks(*range(start, start + source.randrange(1, 10)))
        sent.sent(name, chain, 25)
        for each in reversed(chain):
            model[name][each] = None
            model[name].move_to_end(each)
        while len(model[name]) > 25:
            model[name].popitem(last=False)
        assert sent.num_blocks(name) == len(model[name]) <= 25
        asked = blocks(*range(start, start + 10))
        expected = {}
        for worker, kept in model.items():
            count = next((i for i, each in enumerate(asked) if each not in kept), len(asked))
            if count:
                expected[worker] = count
        assert sent.cached(asked) == expected


def test_a_prompt_longer_than_a_workers_cache() -> None:
    sent = SentPrefixes()
    sent.sent("a", blocks(*range(10)), 4)
    assert sent.cached(blocks(*range(10))) == {"a": 4}


def test_hashes_are_those_of_workers() -> None:
    config = SchedulerConfig(num_blocks=64, max_model_len=512, cache_namespace=b"n")
    for size in (1, 15, 16, 17, 32, 33, 100):
        request = Request(
            request_id="r",
            prompt_token_ids=tuple(range(size)),
            sampling=SamplingParams(),
            max_tokens=1,
            seed=0,
            cache_salt=b"s",
        )
        mine = prompt_hashes(request, config)
        assert mine == list(reusable_hashes(request, config))
    off = SchedulerConfig(num_blocks=64, max_model_len=512, enable_prefix_caching=False)
    assert prompt_hashes(request, off) == []
