"""A workload through simulated replicas: routing, disaggregation, and what came of each request.

The schedulers and engines are the real ones. Knows no models and no hardware: each replica brings
the price of its steps. No wall clock and no random state, so the same input gives the same output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from duetto.core.batch import RequestUpdate, ScheduledBatch
from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.request import Request
from duetto.core.timings import Part, RequestTimings
from duetto.routing.policies import RouterName
from duetto.simulation.disaggregation import Disaggregation, LinkClock
from duetto.simulation.replica import OnEnd, ReplicaSpec, StepLog
from duetto.simulation.routed import SimulatedRouter
from duetto.simulation.tier_totals import TierUse
from duetto.simulation.virtual_engines import make_replica
from duetto.simulation.workload import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What serves: replicas that are alike, behind a router. With disaggregation they decode, and
    compute only the prompts that are not worth sending away."""

    replica: ReplicaSpec
    num_replicas: int = 1
    router: RouterName = "round-robin"
    disaggregation: Disaggregation | None = None

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"--replicas {self.num_replicas}: must be 1 or more")

    @property
    def num_devices(self) -> int:
        num_devices = self.num_replicas * self.replica.num_devices
        if self.disaggregation is not None:
            apart = self.disaggregation
            num_devices += apart.num_replicas * apart.prefill.num_devices
        return num_devices


@dataclass(slots=True)
class Served:
    """What came of one request. Instants in seconds since the start of the workload."""

    index: int
    num_prompt_tokens: int
    timings: RequestTimings
    num_cached_tokens: int = 0
    replica: int = -1  # where it was decoded
    prefill_replica: int | None = None  # where its prompt was computed, if elsewhere
    transfer_s: float = 0.0  # from the end of its prefill until its KV had arrived
    refusal: str | None = None  # why it could never run


@dataclass(frozen=True, slots=True)
class Simulation:
    """Everything that a run left. `served` is in the order of arrival."""

    served: tuple[Served, ...]
    steps: tuple[StepLog, ...]
    """Of each replica that decodes; with a pipeline of each of its `num_batches` engines."""
    prefill_steps: tuple[StepLog, ...]
    num_blocks: int  # of what a log of `steps` is of
    num_prefill_blocks: int = 0
    num_batches: int = 1  # that may be under way in a replica: as many logs belong together
    num_stages: int = 1
    computed_s: float = 0.0  # of all stages of all replicas that decode together
    prefill_computed_s: float = 0.0
    notes: tuple[str, ...] = ()
    tiers: tuple[TierUse, ...] = ()  # of each replica that has them

    @property
    def duration_s(self) -> float:
        """From the start to the last token."""
        return max((s.timings.finish_time or 0.0 for s in self.served), default=0.0)


def simulate(
    workload: Traffic,
    fleet: Fleet,
    *,
    fast: bool = True,
    on_arrival: Callable[[], None] = lambda: None,
) -> Simulation:
    """Run a workload to its end. `fast` runs stretches of next tokens at once, and changes no
    number; `on_arrival` is called after each arrival, for progress.

    A request that could never fit is refused and stands among the served.
    """
    if workload.reuse is not None:
        _check_reuse(fleet)
    run = _Run(workload, fleet, fast)
    for index in range(len(workload.arrivals)):
        run.arrive(index)
        on_arrival()
    run.finish()
    return run.result()


def _check_reuse(fleet: Fleet) -> None:
    """Raises ConfigError where nothing is known of what reuse would take."""
    if fleet.replica.num_stages > 1:
        raise ConfigError("--reuse with --pp: not simulated; leave one of them out")
    if fleet.disaggregation is not None:
        raise ConfigError("--reuse with --prefill-replicas: not simulated; leave one of them out")


class _Pool:
    """Replicas that are alike, and their router."""

    def __init__(
        self,
        spec: ReplicaSpec,
        num_replicas: int,
        router: RouterName,
        on_end: Callable[[int, RequestUpdate], None],
        on_step: Callable[[int, ScheduledBatch, float, float], None] | None = None,
        *,
        fast: bool,
    ) -> None:
        self._on_end = on_end
        self.replicas = [
            make_replica(
                spec,
                on_end=self._end_of(i),
                on_step=on_step and (lambda *step, i=i: on_step(i, *step)),
                fast=fast,
            )
            for i in range(num_replicas)
        ]
        self._router = SimulatedRouter(router, spec, num_replicas, self.run_until)

    def offer(self, request: Request, time: float) -> int:
        """Route a request that arrives at `time`, not before any earlier one; returns where to.

        Raises InvalidRequest if it can never fit.
        """
        return self._router.offer(request, time, self._take)

    @property
    def logs(self) -> tuple[StepLog, ...]:
        return tuple(log for each in self.replicas for log in each.logs)

    @property
    def computed_s(self) -> float:
        return sum(each.computed_s for each in self.replicas)

    def run_until(self, time: float) -> None:
        for each in self.replicas:
            each.run_until(time)

    def _take(self, chosen: int, request: Request, time: float) -> None:
        self.replicas[chosen].offer(request, time)

    def _end_of(self, index: int) -> OnEnd:
        def end(update: RequestUpdate) -> None:
            assert update.timings is not None  # it is the final update
            self._router.ended(update.request_id, index, update.timings.accounted_until)
            self._on_end(index, update)

        return end


@dataclass(slots=True)
class _Run:
    """One simulation under way."""

    workload: Traffic
    fleet: Fleet
    fast: bool
    served: list[Served] = field(default_factory=list)
    decode: _Pool = field(init=False)
    prefill: "_PrefillPool | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        fleet = self.fleet
        self.decode = _Pool(
            fleet.replica, fleet.num_replicas, fleet.router, self._decoded, fast=self.fast
        )
        if fleet.disaggregation is not None:
            self.prefill = _PrefillPool(fleet.disaggregation, fleet.router, self.workload)

    def arrive(self, index: int) -> None:
        arrival = self.workload.arrivals[index]
        request = self.workload.request(index)
        self.served.append(Served(index, request.num_prompt_tokens, request.timings))
        self._hand_over(arrival.arrival_s)
        try:
            self.fleet.replica.scheduler.check_fits(request)
            if self.prefill is not None and self.prefill.takes(request):
                self.prefill.offer(request)
            else:
                self.served[index].replica = self.decode.offer(request, arrival.arrival_s)
        except InvalidRequest as error:
            self.served[index].refusal = str(error)

    def finish(self) -> None:
        self._hand_over(inf)
        self.decode.run_until(inf)

    def result(self) -> Simulation:
        apart = self.fleet.disaggregation
        refused = sum(s.refusal is not None for s in self.served)
        notes = self.workload.notes
        if refused:
            notes += (f"{refused} of {len(self.served)} requests can never fit, and are refused",)
        return Simulation(
            tuple(self.served),
            self.decode.logs,
            () if self.prefill is None else self.prefill.pool.logs,
            self.fleet.replica.scheduler.num_blocks,
            0 if apart is None else apart.prefill.scheduler.num_blocks,
            self.fleet.replica.num_batches,
            self.fleet.replica.num_stages,
            self.decode.computed_s,
            0.0 if self.prefill is None else self.prefill.pool.computed_s,
            notes,
            tuple([each.tier_use for each in self.decode.replicas if each.tier_use is not None]),
        )

    def _hand_over(self, until: float) -> None:
        """Let those go on whose prompts were computed elsewhere and whose KV arrives by `until`."""
        if self.prefill is None:
            return
        self.prefill.run_until(until)
        for handover in self.prefill.handovers(until):
            served = self.served[handover.index]
            served.prefill_replica = handover.replica
            served.num_cached_tokens = handover.num_cached_tokens
            served.timings = handover.timings
            if handover.is_last_token:
                served.replica = handover.replica
                continue
            served.transfer_s = handover.time - handover.timings.accounted_until
            request = self._continued(handover)
            served.replica = self.decode.offer(request, handover.time)

    def _continued(self, handover: "_Handover") -> Request:
        """The request with its first token and the KV of its prompt, as the decoding side has it.

        The time until the KV was there counts as stalled.
        """
        request = self.workload.request(handover.index)
        request.num_imported_tokens = request.num_prompt_tokens
        request.token_ids.append(handover.first_token)
        handover.timings.finish_time = None
        handover.timings.account(Part.STALLED, handover.time)
        request.timings = handover.timings
        return request

    def _decoded(self, _replica: int, update: RequestUpdate) -> None:
        served = self.served[int(update.request_id)]
        if served.prefill_replica is None:
            served.num_cached_tokens = update.num_cached_tokens


@dataclass(frozen=True, slots=True)
class _Handover:
    """A request whose prompt has been computed, at the instant when its KV has arrived."""

    time: float
    index: int
    replica: int  # that computed it
    timings: RequestTimings
    num_cached_tokens: int
    first_token: int
    is_last_token: bool  # then there is nothing to go on with, and nothing was sent


class _PrefillPool:
    """Replicas that compute prompts and the first token, and send the KV on."""

    def __init__(self, apart: Disaggregation, router: RouterName, workload: Traffic) -> None:
        self._apart = apart
        self._workload = workload
        self.pool = _Pool(
            apart.prefill, apart.num_replicas, router, self._ended, self._stepped, fast=False
        )
        self._links = [LinkClock(apart.link) for _ in range(apart.num_replicas)]
        self._tables: dict[str, tuple[int, ...]] = {}  # of requests in the last step
        self._ready: list[tuple[float, int, _Handover]] = []  # a heap

    def takes(self, request: Request) -> bool:
        return self._apart.is_remote(request.num_prompt_tokens)

    def offer(self, request: Request) -> None:
        """Raises InvalidRequest if it can never fit here."""
        request.max_tokens = 1
        self.pool.offer(request, request.arrival_time)

    def run_until(self, time: float) -> None:
        self.pool.run_until(time)

    def handovers(self, until: float) -> list[_Handover]:
        """Those whose KV arrives by `until`, in order of time; each is given once."""
        due = []
        while self._ready and self._ready[0][0] <= until:
            due.append(heappop(self._ready)[2])
        return due

    def _stepped(self, replica: int, batch: ScheduledBatch, start: float, end: float) -> None:
        link = self._links[replica]
        self._tables = {}
        for item in batch.requests:
            if item.request_id not in link and item.num_computed_tokens:
                link.send_cached(item.request_id, item.num_computed_tokens, start)
            link.send_chunk(item.request_id, len(item.token_ids), start, end)
            self._tables[item.request_id] = item.block_table

    def _ended(self, replica: int, update: RequestUpdate) -> None:
        index, timings = int(update.request_id), update.timings
        assert timings is not None  # it is the final update
        is_last = self._workload.arrivals[index].num_output_tokens == 1
        arrived = self._links[replica].arrival(update.request_id)
        time = timings.accounted_until if is_last else arrived
        if not is_last:
            self.pool.replicas[replica].hold(
                update.request_id, self._tables[update.request_id], time
            )
        handover = _Handover(
            time,
            index,
            replica,
            timings,
            update.num_cached_tokens,
            update.tokens[-1].token_id,
            is_last,
        )
        heappush(self._ready, (time, index, handover))
