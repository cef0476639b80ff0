"""Properties of steps in flight, and of steps not planned yet, that no walk comes to often.

As those of properties.py, they are functions of the code under test.
"""

from collections.abc import Callable

from fakes import make_request
from scheduler.driver import MakeScheduler
from scheduler.scripted import SMALL

from duetto.core.batch import RequestResult, SampledToken, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.scheduler.scheduler import Scheduler


def admits_nobody_before_its_results(make: MakeScheduler = Scheduler) -> None:
    """Nor one of whom a chunk alone is in flight, though no token of it is unknown."""
    request = make_request("r", (1,) * 9, 4)
    scheduler = make(SchedulerConfig(**SMALL | {"max_num_batched_tokens": 5}))
    scheduler.add(request)
    chunk = scheduler.schedule(0.0)
    assert not request.num_pending_tokens
    scheduler._room.preempt(request)
    assert not scheduler.schedule(1.0).requests
    scheduler.update(chunk, StepOutput((RequestResult(),)), 2.0)
    (item,) = scheduler.schedule(2.0).requests
    assert (item.num_computed_tokens, item.epoch) == (0, 1)


def takes_no_place_for_who_waits_for_results(make: MakeScheduler = Scheduler) -> None:
    """Whoever gave it would lose its KV, and nobody could use what it gave."""
    scheduler = make(SchedulerConfig(**SMALL | {"num_blocks": 4}))
    first = make_request("b", (1,) * 8, 4, tenant=b"b")
    scheduler.add(first)
    for number in (2, 3):
        scheduler.add(make_request(f"a{number}", (number,) * 4, 4, tenant=b"a"))
    assert len(scheduler.schedule(0.0).requests) == 3
    scheduler._room.preempt(first)
    batch = scheduler.schedule(1.0)  # the others grow into its blocks
    assert [item.request_id for item in batch.requests] == ["a2", "a3"]
    assert not scheduler.pool.num_free
    assert scheduler.counts.num_preemptions == 1


def is_sure_of_no_step_beside_one_in_flight(make: MakeScheduler = Scheduler) -> None:
    """Its token is unknown, so what comes next may be an end."""
    scheduler = make(SchedulerConfig(**SMALL))
    scheduler.add(make_request("r", (1, 2, 3), 9))
    result = RequestResult((SampledToken(7),))
    scheduler.update(scheduler.schedule(0.0), StepOutput((result,)), 1.0)
    assert scheduler.num_certain_steps() > 1
    batch = scheduler.schedule(1.0)
    assert not scheduler.num_certain_steps()
    scheduler.update(batch, StepOutput((result,)), 2.0)
    assert scheduler.num_certain_steps() > 1


def is_sure_of_no_step_while_a_whole_prompt_waits(make: MakeScheduler = Scheduler) -> None:
    """It lacks blocks now. Once it fits the budget no more, that is what it lacks."""
    config = SMALL | {"max_num_batched_tokens": 64, "num_blocks": 16}
    whole = config | {"enable_chunked_prefill": False}
    for fields, is_sure in ((config, True), (whole, False)):
        scheduler = make(SchedulerConfig(**fields))
        scheduler.add(make_request("r", (1,) * 5, 9))
        scheduler.update(
            scheduler.schedule(0.0), StepOutput((RequestResult((SampledToken(7),)),)), 1.0
        )
        scheduler.add(make_request("long", (2,) * 57, 4))
        assert (scheduler.num_certain_steps() > 0) == is_sure


OF_STEPS_IN_FLIGHT: list[Callable[[MakeScheduler], None]] = [
    admits_nobody_before_its_results,
    takes_no_place_for_who_waits_for_results,
    is_sure_of_no_step_beside_one_in_flight,
    is_sure_of_no_step_while_a_whole_prompt_waits,
]
