"""A workload through engines of this process, each request at its own time."""

from typing import Any

import pytest
from fakes import ShadowExecutor

from duetto.core.batch import ScheduledBatch, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.errors import DuettoError
from duetto.core.executor import Pending
from duetto.core.shape import BatchShape, RequestShape
from duetto.engine.engine import Engine
from duetto.engine.handle import EngineOpener
from duetto.engine.thread import in_thread
from duetto.measure.open_loop import OpenedEngines, check_same_answers, learn_steps, run_open_loop
from duetto.measure.workload import Workload, WorkloadRequest
from duetto.pricing.learned import LearnedStepTime
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=128)
WORKLOAD = Workload(
    tuple(
        WorkloadRequest(
            num_output_tokens=3 + i, prompt_token_ids=tuple(range(i + 1, i + 9)), arrival_s=0.02 * i
        )
        for i in range(6)
    )
)


def opener(executor: Any = None) -> EngineOpener:
    scheduler = Scheduler(CONFIG)
    return in_thread(
        Engine(scheduler, executor or ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size))
    )


@pytest.mark.parametrize("num_engines", [1, 2])
def test_every_request_is_answered_at_its_time(num_engines: int) -> None:
    run = run_open_loop(OpenedEngines([opener() for _ in range(num_engines)]), WORKLOAD)
    assert [len(answer) for answer in run.answers] == [3, 4, 5, 6, 7, 8]
    arrivals = [record.scheduled_s for record in run.records]
    assert [a - arrivals[0] for a in arrivals] == pytest.approx([0.02 * i for i in range(6)])
    assert all(record.outcome == "ok" and record.ttft_s is not None for record in run.records)
    assert len(run.steps) == num_engines and all(run.steps)
    assert run.duration_s >= 0.1


def test_two_engines_give_the_answers_of_one() -> None:
    one = run_open_loop(OpenedEngines([opener()]), WORKLOAD)
    two = run_open_loop(OpenedEngines([opener(), opener()]), WORKLOAD)
    check_same_answers([one, two, two])
    two.answers[3][0] += 1
    with pytest.raises(DuettoError, match="request 3: "):
        check_same_answers([one, two])


class Broken(ShadowExecutor):
    def submit(self, batch: ScheduledBatch) -> Pending:
        raise SystemExit  # ends the engine's thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_ends_the_run() -> None:
    with pytest.raises(DuettoError, match="no answer"):
        run_open_loop(
            OpenedEngines([opener(Broken(CONFIG.num_blocks, CONFIG.block_size))]),
            WORKLOAD,
            timeout_s=2.0,
        )


def test_what_is_decided_between_two_steps_is_part_of_their_price() -> None:
    shape = BatchShape((RequestShape(1, 10),))
    step = StepRecord(0.0, 0.001, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, shape)
    steps = [step._replace(start_time=0.002 * i, end_time=0.002 * i + 0.001) for i in range(40)]
    steps.append(step._replace(start_time=9.0, end_time=9.002))  # after an idle time
    times = LearnedStepTime()
    learn_steps(times, steps)
    assert times.step_time(shape) == pytest.approx(0.002, rel=0.1)
