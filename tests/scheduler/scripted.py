"""A scheduler with a clock that the test moves by hand, for tests that spell out what happens."""

from collections.abc import Callable
from typing import Any

from fakes import ShadowExecutor, generate_alone

from duetto.core.batch import RequestUpdate, ScheduledBatch
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.scheduler import Scheduler

SMALL: dict[str, Any] = {
    "num_blocks": 16,
    "block_size": 4,
    "max_model_len": 64,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
}


class Script:
    """Steps of `seconds` each, from time 0; what each request was given is kept."""

    def __init__(
        self, make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler, **config: Any
    ) -> None:
        self.config = SchedulerConfig(**SMALL | config)
        self.scheduler = make_scheduler(self.config)
        self.executor = ShadowExecutor(self.config.num_blocks, self.config.block_size)
        self.now = 0.0
        self.updates: list[RequestUpdate] = []
        self._requests: list[Request] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self._requests.append(request)

    def plan(self) -> ScheduledBatch:
        """Schedule alone: for a step that the test executes itself."""
        return self.scheduler.schedule(self.now)

    def step(self, seconds: float = 1.0) -> dict[str, int]:
        """One whole step; returns how many tokens each request computed."""
        batch = self.plan()
        output = self.executor.submit(batch).result()
        self.now += seconds
        self.updates += self.scheduler.update(batch, output, self.now)
        self.scheduler.check()
        return {item.request_id: len(item.token_ids) for item in batch.requests}

    def steps(self, count: int) -> list[dict[str, int]]:
        return [self.step() for _ in range(count)]

    def finish(self) -> None:
        """Run to the end, and check every answer and the last block."""
        for _ in range(1000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_free == self.config.num_blocks
        for request in self._requests:
            answer = generate_alone(request)
            assert list(request.output_token_ids) == answer[: request.num_output_tokens]

    @property
    def running(self) -> list[str]:
        return list(self.scheduler.running)

    @property
    def waiting(self) -> list[str]:
        return [request.request_id for request in self.scheduler.waiting]

    @property
    def ended(self) -> dict[str, str]:
        """Why each ended request ended, in order of their ends."""
        return {u.request_id: u.finish_reason.value for u in self.updates if u.finish_reason}
