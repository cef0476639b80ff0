"""A replica whose pipeline holds several batches: virtual engines, which take turns at its stages.

Each is an engine with its own scheduler, requests and share of the KV blocks, as vLLM's virtual
engines are; only the stages are shared. Knows no prices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from duetto.core.request import Request
from duetto.simulation.executor import NextPrices
from duetto.simulation.pipeline import Passage, Pipeline, PipelineSpec
from duetto.simulation.replica import OnEnd, OnStep, Replica, ReplicaSpec, StepLog


class PipelinedReplica:
    """Offers what a Replica does. A request stays with the engine that has the fewest when it
    arrives; ties go in turn."""

    def __init__(
        self,
        spec: ReplicaSpec,
        pipeline: PipelineSpec,
        *,
        on_end: OnEnd,
        on_step: OnStep | None = None,
        fast: bool = True,
    ) -> None:
        self._stages = Pipeline(pipeline.num_stages)
        self._engines = [
            _Engine(
                Replica(spec, on_end=on_end, on_step=on_step, fast=fast, pipeline=self._stages),
                self._stages,
                pipeline.next_passages,
            )
            for _ in range(pipeline.num_batches)
        ]
        self._turn = 0
        self._engine_of: dict[str, _Engine] = {}

    @property
    def logs(self) -> tuple[StepLog, ...]:
        """Of each engine: the steps of two overlap."""
        return tuple(engine.replica.steps for engine in self._engines)

    @property
    def tier_use(self) -> None:
        """There are none."""

    @property
    def computed_s(self) -> float:
        """Seconds that devices computed, one of each stage."""
        return self._stages.computed_s

    def offer(self, request: Request, time: float) -> None:
        """Let a request arrive. Raises InvalidRequest, and changes nothing, if it can never fit."""
        self.run_until(time)
        count = len(self._engines)
        index = min(
            range(count),
            key=lambda i: (self._engines[i].replica.num_live, (i - self._turn) % count),
        )
        self._engines[index].offer(request, time)
        self._engine_of[request.request_id] = self._engines[index]
        self._turn = (index + 1) % count

    def run_until(self, time: float) -> None:
        """Run every step that starts before `time`, in the order of their starts, as this is the
        order in which batches come to the first stage."""
        while True:
            waiting = [each for each in self._engines if each.starts_before(time)]
            if not waiting:
                break
            min(waiting, key=lambda each: each.replica.clock.now).step(time)
        if time != float("inf"):
            for each in self._engines:
                each.replica.clock.reach(time)

    def hold(self, request_id: str, blocks: Sequence[int], until: float) -> None:
        """As Replica.hold, of a request that was offered."""
        self._engine_of[request_id].replica.hold(request_id, blocks, until)


def make_replica(
    spec: ReplicaSpec, *, on_end: OnEnd, on_step: OnStep | None = None, fast: bool = True
) -> Replica | PipelinedReplica:
    if spec.pipeline is None:
        return Replica(spec, on_end=on_end, on_step=on_step, fast=fast)
    return PipelinedReplica(spec, spec.pipeline, on_end=on_end, on_step=on_step, fast=fast)


@dataclass(slots=True)
class _Engine:
    """One engine, and the steps of a stretch of next tokens that are sure to come.

    Their ends depend on the other engines, so they are found one by one, in turn; the scheduler is
    told all at once, before anything else happens to it.
    """

    replica: Replica
    stages: Pipeline
    next_passages: NextPrices[Passage]
    num_left: int = 0  # of the stretch
    start: float = 0.0
    ends: list[float] = field(default_factory=list)
    passages: Iterator[Passage] = field(default_factory=lambda: iter(()))

    def starts_before(self, time: float) -> bool:
        return self.replica.has_work and self.replica.clock.now < time

    def offer(self, request: Request, time: float) -> None:
        self._take_over()
        self.replica.clock.reach(time)
        self.replica.offer(request, time)

    def step(self, until: float) -> None:
        if not self.num_left:
            self._take_over()
            if not self._has_stretch():
                self.replica.step(until)
                return
        clock = self.replica.clock
        clock.reach(self.stages.enter(clock.now, next(self.passages)))
        self.ends.append(clock.now)
        self.num_left -= 1

    def _has_stretch(self) -> bool:
        most = self.replica.num_certain_steps()
        if most < 2:
            return False
        self.num_left, self.start = most, self.replica.clock.now
        self.passages = self.next_passages(self.replica.pasts)
        return True

    def _take_over(self) -> None:
        if self.ends:
            self.replica.take_over(self.start, self.ends)
        self.num_left, self.ends = 0, []
