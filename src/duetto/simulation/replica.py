"""One simulated engine: the real Scheduler and Engine, a virtual clock and a price for a step.

Knows nothing of other replicas. Runs of next tokens are fast-forwarded, which changes no number.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush
from itertools import islice

from duetto.core.batch import RequestUpdate, ScheduledBatch, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import NOTHING_DRAFTED
from duetto.core.errors import EngineError
from duetto.core.executor import Executor, Pending
from duetto.core.request import Request
from duetto.core.shape import BatchShape, StepTime
from duetto.engine.engine import Engine
from duetto.pricing.reuse import ReusePrices
from duetto.scheduler.scheduler import Scheduler
from duetto.simulation.executor import NextTokenTimes, SimulatedExecutor, step_by_step, token_of
from duetto.simulation.pipeline import Pipeline, PipelineExecutor, PipelineSpec
from duetto.simulation.speculation import SimulatedDrafts, SpeculatingExecutor
from duetto.simulation.tier_totals import DiskUse, TierUse
from duetto.simulation.tiers import MovingExecutor, TierSpec
from duetto.simulation.virtual_clock import VirtualClock

OnEnd = Callable[[RequestUpdate], None]
OnStep = Callable[[ScheduledBatch, float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One engine on a group of devices."""

    scheduler: SchedulerConfig
    step_time: StepTime
    next_token_times: NextTokenTimes | None = None  # the same prices, faster; None: step by step
    num_devices: int = 1
    drafts: SimulatedDrafts | None = None  # None: without speculation
    # Of requests that reuse segments; None: moves cost nothing, and looks what computing does.
    reuse: ReusePrices | None = None
    tiers: TierSpec | None = None  # beside the KV on the device
    pipeline: PipelineSpec | None = None
    """Of a replica with stages that overlap batches; `scheduler` is then that of each batch, and
    `step_time` what a batch takes alone. None: one step after the other."""

    def batch_time(self, batch: ScheduledBatch) -> float:
        if self.reuse is None:
            return self.step_time(batch.shape)
        return self.reuse.of(batch, self.step_time)

    def planned_time(self, shape: BatchShape) -> float:
        """What the scheduler takes a step for that it has not planned yet: without moves."""
        if self.reuse is None:
            return self.step_time(shape)
        return self.reuse.time_of(shape, self.step_time)

    @property
    def num_stages(self) -> int:
        return 1 if self.pipeline is None else self.pipeline.num_stages

    @property
    def num_batches(self) -> int:
        """That may be under way at one time."""
        return 1 if self.pipeline is None else self.pipeline.num_batches


def _floats() -> "array[float]":
    return array("d")


def _ints() -> "array[int]":
    return array("q")


@dataclass(frozen=True, slots=True)
class StepLog:
    """What `StepRecord` says of every step, in columns: a simulation has hundreds of thousands."""

    start_time: "array[float]" = field(default_factory=_floats)
    end_time: "array[float]" = field(default_factory=_floats)
    num_tokens: "array[int]" = field(default_factory=_ints)
    num_prompt_tokens: "array[int]" = field(default_factory=_ints)
    num_running: "array[int]" = field(default_factory=_ints)
    num_waiting: "array[int]" = field(default_factory=_ints)
    num_free_blocks: "array[int]" = field(default_factory=_ints)
    num_preemptions: "array[int]" = field(default_factory=_ints)
    num_drafts: "array[int]" = field(default_factory=_ints)
    num_accepted: "array[int]" = field(default_factory=_ints)  # of them
    drafting_s: "array[float]" = field(default_factory=_floats)

    def __len__(self) -> int:
        return len(self.start_time)

    def add(self, record: StepRecord) -> None:
        for column in _COLUMNS:
            getattr(self, column).append(getattr(record, column))
        drafts = record.drafts or NOTHING_DRAFTED
        count = drafts.verified.total
        self.num_drafts.append(count.num_proposed)
        self.num_accepted.append(count.num_accepted)
        self.drafting_s.append(drafts.drafting_s)

    def add_next_tokens(
        self,
        start: float,
        ends: Sequence[float],
        num_free: Sequence[int],
        running: int,
        waiting: int,
    ) -> None:
        """Steps, one after the other, that each computed a token for `running` requests."""
        num_steps = len(ends)
        self.start_time.extend((start, *ends[:-1]))
        self.end_time.extend(ends)
        self.num_tokens.extend([running] * num_steps)
        self.num_prompt_tokens.extend([0] * num_steps)
        self.num_running.extend([running] * num_steps)
        self.num_waiting.extend([waiting] * num_steps)
        self.num_free_blocks.extend(num_free)
        self.num_preemptions.extend([0] * num_steps)
        self.num_drafts.extend([0] * num_steps)
        self.num_accepted.extend([0] * num_steps)
        self.drafting_s.extend([0.0] * num_steps)


_OF_DRAFTS = ("num_drafts", "num_accepted", "drafting_s")
_COLUMNS = tuple(f.name for f in fields(StepLog) if f.name not in _OF_DRAFTS)


class Replica:
    """An engine whose time is virtual. Requests are offered in the order of their arrival."""

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        on_end: OnEnd,
        on_step: OnStep | None = None,
        fast: bool = True,
        pipeline: Pipeline | None = None,
    ) -> None:
        """`on_end` gets each request's final update; `on_step` each batch with the instants at
        which it starts and ends, which rules fast-forwarding out. With `pipeline` steps go through
        stages that others use too (simulation/virtual_engines.py)."""
        self.clock = VirtualClock()
        self.steps = StepLog()
        self._next_token_times = spec.next_token_times or step_by_step(spec.step_time)
        policy = None if spec.drafts is None else spec.drafts.policy(spec.step_time)
        tiers, executor = None, _executor(spec, pipeline, self.clock)
        self._moving: MovingExecutor | None = None
        if spec.tiers is not None:
            tiers = spec.tiers.tiers(spec.scheduler.block_size, spec.step_time)
            executor = self._moving = MovingExecutor(executor, spec.tiers, self.clock)
        self._scheduler = Scheduler(spec.scheduler, spec.planned_time, policy, tiers)
        self._pipeline = pipeline
        self._executor = _Watched(executor)
        self._engine = Engine(self._scheduler, self._executor, clock=self.clock)
        self._on_end = on_end
        self._on_step = on_step
        self._fast = fast and on_step is None
        self._held: list[tuple[float, list[int]]] = []  # blocks, and until when; a heap

    @property
    def logs(self) -> tuple[StepLog, ...]:
        """Steps that do not overlap are in one of them."""
        return (self.steps,)

    @property
    def tier_use(self) -> TierUse | None:
        if self._moving is None:
            return None
        use = TierUse(
            self._scheduler.tiers.counts, self._moving.counts, self._scheduler.config.block_size
        )
        if (disk := self._moving.disk) is None:
            return use
        return use._replace(disk=DiskUse(disk.read_s, disk.write_s, disk.num_dropped))

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    @property
    def computed_s(self) -> float:
        """Seconds that a device computed."""
        return sum(self.steps.end_time) - sum(self.steps.start_time)

    def offer(self, request: Request, time: float) -> None:
        """Let a request arrive. Raises InvalidRequest, and changes nothing, if it can never fit."""
        self.run_until(time)
        self._engine.add(request)

    def run_until(self, time: float) -> None:
        """Run every step that starts before `time`; all of them if it is infinite."""
        while self._engine.has_work and self.clock.now < time:
            if not self._fast_forward(time):
                self.step(time)
        if time != float("inf"):
            self.clock.reach(time)

    def hold(self, _request_id: str, blocks: Sequence[int], until: float) -> None:
        """Keep blocks that a request has just given back: their KV is still being read."""
        kept = list(blocks)
        self._scheduler.pool.retain(kept)
        heappush(self._held, (until, kept))

    def _release_due(self) -> None:
        while self._held and self._held[0][0] <= self.clock.now:
            self._scheduler.pool.release(heappop(self._held)[1])

    def step(self, until: float) -> None:
        """Run one step, or wait for blocks that are held, at most `until`."""
        self._release_due()
        start = self.clock.now
        self._executor.batch = None
        report = self._engine.step()
        if report.record is None and self._executor.batch is not None:
            return  # KV was moved, or waited for
        if report.record is None:  # all room is held for others
            if not self._held:
                raise EngineError("requests wait, and nothing can be scheduled")
            self.clock.reach(min(until, self._held[0][0]))
            return
        self.steps.add(report.record)
        if self._on_step is not None and self._executor.batch is not None:
            begun = start if self._pipeline is None else self._pipeline.entered
            self._on_step(self._executor.batch, begun, self.clock.now)
        for update in report.updates:
            if update.error is not None:
                raise EngineError("a simulated step failed; the log says why")
            if update.finish_reason is not None:
                self._on_end(update)

    def num_certain_steps(self) -> int:
        """How many of the next steps compute a next token of each running request, and nothing
        else, unless a request arrives; 0 where steps are not to be run at once."""
        return self._scheduler.num_certain_steps() if self._fast else 0

    @property
    def pasts(self) -> list[int]:
        """Tokens that have KV, of each running request."""
        return [r.num_computed_tokens for r in self._scheduler.running.values()]

    def take_over(self, start: float, ends: Sequence[float]) -> None:
        """Let certain steps have happened, one after the other from `start`, to each of `ends`."""
        num_free = self._scheduler.advance(start, ends, token_of)
        num_running, num_waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        self.steps.add_next_tokens(start, ends, num_free, num_running, num_waiting)

    def _fast_forward(self, until: float) -> bool:
        """Run a stretch of next tokens at once; False, and nothing done, if there is none."""
        most = self.num_certain_steps()
        if most < 2:
            return False
        start = self.clock.now
        ends = self._ends(self.pasts, most, until)
        self.take_over(start, ends)
        self.clock.reach(ends[-1])
        if self._moving is not None:
            self._scheduler.tiers.take(self._moving.pass_steps())
        return True

    def _ends(self, pasts: Sequence[int], most: int, until: float) -> list[float]:
        """The ends of the next steps, up to the first at `until` or after."""
        ends: list[float] = []
        now = self.clock.now
        for seconds in islice(self._next_token_times(pasts), most):
            now += seconds
            ends.append(now)
            if now >= until:
                break
        return ends


def _executor(spec: ReplicaSpec, pipeline: Pipeline | None, clock: VirtualClock) -> Executor:
    if pipeline is None or spec.pipeline is None:
        if spec.drafts is not None:
            return SpeculatingExecutor(spec.batch_time, spec.drafts, clock)
        return SimulatedExecutor(spec.batch_time, clock)
    return PipelineExecutor(spec.pipeline.passage, pipeline, clock)


class _Watched:
    """An executor of which the last batch is seen."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.batch: ScheduledBatch | None = None

    def submit(self, batch: ScheduledBatch) -> Pending:
        self.batch = batch
        return self._executor.submit(batch)
