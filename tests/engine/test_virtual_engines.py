"""Several engines as one: answers are those of an engine alone, whatever ends where and when."""

from random import Random
from threading import Event

import pytest
from fakes import ShadowExecutor, generate_alone, make_request

from duetto.core.cache_control import CachedText, Drop, LookUp
from duetto.core.config import SchedulerConfig
from duetto.core.errors import DeviceLost, InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.engine import Engine
from duetto.engine.virtual_engines import VirtualEngines
from duetto.scheduler.reuse import text_hashes
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=16, max_model_len=64, block_size=4, max_num_batched_tokens=16)


class Held:
    """An executor whose steps end when they are let."""

    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        self._executor = ShadowExecutor(config.num_blocks, config.block_size)
        self.may_end, self.has_begun, self.lost = Event(), Event(), False
        self.may_end.set()

    def submit(self, batch):
        self.has_begun.set()
        self.may_end.wait(30)
        if self.lost:
            raise DeviceLost("stage 1", "a test ended it")
        return self._executor.submit(batch)


def engines(count: int) -> tuple[VirtualEngines, list[Held]]:
    executors = [Held() for _ in range(count)]
    return VirtualEngines([Engine(Scheduler(CONFIG), each) for each in executors]), executors


def finished(together: VirtualEngines, updates: dict | None = None) -> dict[str, list]:
    updates = {} if updates is None else updates
    while together.has_work:
        for update in together.step().updates:
            updates.setdefault(update.request_id, []).append(update)
    return updates


def tokens_of(updates) -> list[int]:
    return [token.token_id for update in updates for token in update.tokens]


def request(number: int, random: Random) -> Request:
    prompt = [random.randrange(50) for _ in range(random.randrange(1, 30))]
    return make_request(f"r{number}", prompt, random.randrange(1, 12), seed=number)


@pytest.mark.parametrize("seed", range(6))
def test_each_request_ends_once_with_its_own_answer(seed: int) -> None:
    random = Random(seed)
    together, _ = engines(random.randrange(2, 5))
    updates: dict[str, list] = {}
    requests, aborted = {}, set()
    for number in range(30):
        requests[f"r{number}"] = one = request(number, random)
        together.add(one)
        if random.random() < 0.3 or number == 9:  # that one lives for sure
            chosen = f"r{random.randrange(number + 1) if number != 9 else 9}"
            if (update := together.abort(chosen)) is not None:
                updates.setdefault(chosen, []).append(update)
                aborted.add(chosen)
        for _ in range(random.randrange(4)):
            for update in together.step().updates:
                updates.setdefault(update.request_id, []).append(update)
    finished(together, updates)
    for request_id, own in updates.items():
        ends = [u.finish_reason for u in own if u.finish_reason is not None]
        assert len(ends) == 1
        assert own[-1].finish_reason is not None
        if request_id not in aborted:
            again = make_request(
                request_id,
                requests[request_id].prompt_token_ids,
                requests[request_id].sampling.max_tokens,
                seed=requests[request_id].seed,
            )
            assert tokens_of(own) == generate_alone(again)
    assert updates.keys() == requests.keys()
    assert aborted


def test_one_batch_is_in_each_at_one_time() -> None:
    together, (first, _) = engines(2)
    first.may_end.clear()
    together.add(make_request("a", [1, 2, 3], 3))
    together.add(make_request("b", [4, 5, 6], 3))
    while not any(u.request_id == "b" and u.finish_reason for u in together.step().updates):
        pass
    assert first.has_begun.is_set()  # and is not yet over
    assert together.computing is not None
    together.add(make_request("c", [7], 2))  # to the one that is idle
    while not any(u.request_id == "c" and u.finish_reason for u in together.step().updates):
        pass
    first.may_end.set()
    assert tokens_of(finished(together)["a"]) == generate_alone(make_request("a", [1, 2, 3], 3))
    assert together.computing is None


def test_what_comes_while_its_engine_computes_waits_for_the_step() -> None:
    together, (only,) = engines(1)
    only.may_end.clear()
    together.add(make_request("a", [1, 2, 3], 2))
    together._start()
    only.has_begun.wait(30)
    together.add(make_request("b", [4, 5], 2))
    together.add(make_request("c", [6], 2))
    together.add(make_request("long", [1] * 60, 60))
    gone = together.abort("c")
    assert gone is not None
    assert gone.finish_reason is FinishReason.ABORT
    only.may_end.set()
    updates = finished(together)
    assert updates.keys() == {"a", "b", "long"}
    assert tokens_of(updates["b"]) == generate_alone(make_request("b", [4, 5], 2))
    assert updates["long"][-1].finish_reason is FinishReason.ERROR
    with pytest.raises(InvalidRequest):
        together.add(make_request("long", [1] * 60, 60))
    assert together.abort("long") is None


def test_a_device_that_is_lost_ends_all() -> None:
    together, (first, _) = engines(2)
    first.lost = True
    together.add(make_request("a", [1, 2, 3], 3))
    together.add(make_request("b", [4, 5, 6], 3))
    with pytest.raises(DeviceLost, match="stage 1"):
        finished(together)


def test_the_cache_can_be_looked_at_and_forgotten_but_not_kept() -> None:
    together, _ = engines(2)
    prompt = list(range(17))
    together.add(make_request("a", prompt, 3))
    finished(together)
    text = CachedText(17, tuple(text_hashes(prompt, CONFIG, b"")))
    assert together.control(LookUp(text)).num_cached == 16
    with pytest.raises(InvalidRequest, match="--pp"):
        together.control(Drop(b"", text))
    together.forget_cached()
    assert together.control(LookUp(text)).num_cached == 0
