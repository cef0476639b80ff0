"""What a scheduler must not do, each in few steps: a random walk meets it seldom."""

from collections.abc import Callable

import pytest
from fakes import make_request
from scheduler.driver import MakeScheduler
from scheduler.properties import AsksForAll
from scheduler.scripted import SMALL, Script

from duetto.core.batch import RequestResult, SampledToken, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.core.errors import EngineError
from duetto.scheduler.scheduler import Scheduler

SEVEN = (SampledToken(7),)


def cuts_no_prompt_where_chunks_are_off(make: MakeScheduler = Scheduler) -> None:
    script = Script(make, enable_chunked_prefill=False, max_model_len=16)
    script.add(make_request("a", (1,) * 10, 3), make_request("b", (2,) * 10, 3))
    assert script.step() == {"a": 10}
    assert script.step() == {"a": 1, "b": 10}
    script.finish()


def takes_no_result_without_its_scores(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    script.add(make_request("r", (1, 2, 3), 4, prompt_logprobs=0))
    batch = script.plan()
    with pytest.raises(EngineError, match="0 prompt log-probabilities for request r, not 2"):
        script.scheduler.update(batch, StepOutput((RequestResult(SEVEN),)), 1.0)


def sends_a_proposer_all_again_after_a_preemption(make: MakeScheduler = Scheduler) -> None:
    scheduler = make(SchedulerConfig(**SMALL), drafts=AsksForAll())
    request = make_request("r", (1, 2, 3), 9)
    scheduler.add(request)
    for now in (0.0, 1.0):
        batch = scheduler.schedule(now)
        scheduler.update(batch, StepOutput((RequestResult(SEVEN),)), now + 1.0)
    scheduler._room.preempt(request)
    (item,) = scheduler.schedule(2.0).requests
    assert item.drafting is not None
    assert (item.drafting.start, item.drafting.token_ids) == (0, (1, 2, 3, 7, 7))


def computes_nothing_again_in_blocks_that_are_lost(make: MakeScheduler = Scheduler) -> None:
    script = Script(make)
    kept, lost = make_request("kept", (1, 2), 4), make_request("lost", (3, 4), 4)
    script.add(kept, lost)
    batch = script.plan()
    script.scheduler._room.preempt(lost)
    assert script.scheduler.renew(batch).requests == batch.requests[:1]
    assert (kept.num_in_flight, lost.num_in_flight) == (1, 0)


REFUSALS: list[Callable[[MakeScheduler], None]] = [
    cuts_no_prompt_where_chunks_are_off,
    takes_no_result_without_its_scores,
    sends_a_proposer_all_again_after_a_preemption,
    computes_nothing_again_in_blocks_that_are_lost,
]
