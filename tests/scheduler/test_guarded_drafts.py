"""A policy that raises, in each of its calls, under an engine with steps in flight and without."""

import logging

import pytest
from fakes import ShadowExecutor, generate_alone, make_request
from scheduler.guesses import Guesses

from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.llm import LLM
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import Ask
from duetto.scheduler.guarded_drafts import GuardedDrafts
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=64, max_model_len=128, block_size=4, max_num_batched_tokens=32)
CALLS = ["choose", "ask", "learn", "forget"]


class FailsAt(Guesses):
    """Raises in the call of one name, the n-th time, and must not be asked again."""

    def __init__(self, name, at):
        super().__init__(at)
        self.left, self.has_failed = at, False
        for call in CALLS:
            setattr(self, call, self._planted(call == name, getattr(self, call)))

    def _planted(self, is_it, call):
        def planted(*arguments):
            assert not self.has_failed
            self.left -= is_it
            if is_it and not self.left:
                self.has_failed = True
                raise RuntimeError("planted")
            return call(*arguments)

        return planted


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("name", CALLS)
def test_a_policy_that_raises_costs_the_drafts_and_no_answer(caplog, name, at, depth):
    policy = FailsAt(name, at)
    scheduler = Scheduler(CONFIG, drafts=GuardedDrafts(policy))
    engine = Engine(scheduler, ShadowExecutor(64, 4), clock=lambda: 0.0, depth=depth)
    requests = [make_request(f"r{i}", (1, 2, i), 8 + i, seed=i) for i in range(6)]
    for request in requests:
        engine.add(request)
    tokens = {request.request_id: [] for request in requests}
    with caplog.at_level(logging.WARNING):
        while engine.has_work:
            for update in engine.step().updates:
                assert update.error is None
                tokens[update.request_id] += [each.token_id for each in update.tokens]
            scheduler.check()
    assert tokens == {r.request_id: generate_alone(r) for r in requests}
    assert policy.has_failed
    (record,) = [each for each in caplog.records if "speculation is off" in each.message]
    assert record.exc_info is not None and "planted" in str(record.exc_info[1])
    later = make_request("later", (1, 2, 3), 9)
    engine.add(later)
    while engine.has_work:
        engine.step()
    assert later.token_ids[3:] == generate_alone(later)


@pytest.mark.parametrize("name", ["ask", "learn"])
def test_so_it_is_with_the_policy_that_runs(monkeypatch, caplog, name):
    def asks(self, planned):
        return {p.request.request_id: Ask("ngram", p.num_left) for p in planned}

    def fails(self, *arguments):
        raise RuntimeError("planted")

    with LLM("duetto-demo", kv_cache_memory_bytes=2**24) as llm:
        (plain,) = llm.generate("once upon a time", use_tqdm=False)
    monkeypatch.setattr(AdaptiveDrafts, "ask", asks)
    monkeypatch.setattr(AdaptiveDrafts, name, fails)
    drafting = {"speculative_config": {"method": "ngram"}}
    with LLM("duetto-demo", kv_cache_memory_bytes=2**24, **drafting) as llm:
        (answer,) = llm.generate("once upon a time", use_tqdm=False)
    assert answer.outputs[0].token_ids == plain.outputs[0].token_ids
    assert sum("speculation is off" in each.message for each in caplog.records) == 1
