"""The price of a step: a program's operations on a device, for a batch's shape, in seconds.

Each operation takes max(FLOPs / (peak · efficiency), bytes / (bandwidth · efficiency)) and a fixed
time for its call; a step is the sum over operations and collectives. All that a price needs of a
batch is a few sums (`StepTotals`), so identical layers are priced once and multiplied. Knows no
clock and no scheduler.
"""

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape
from duetto.pricing.hardware import HardwareSpec, Kind
from duetto.pricing.work import Work, work_of
from duetto.program.collectives import Send
from duetto.program.op import Op, Ref
from duetto.program.program import Program
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages
from duetto.program.shape import Precision, of_rows

Bound = Literal["compute", "memory", "interconnect", "overhead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How a program is laid over devices, and in which numbers it computes.

    A step's batch goes through the `pipeline_parallel` stages in `micro_batches` even parts: the
    step ends when the last part leaves the last stage. With one part each stage idles while the
    others compute (the bubble); with more of them each part reads the weights again.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    precision: Precision = field(default_factory=Precision)
    arithmetic: str = "bfloat16"  # which of the hardware's peaks matrix products run at
    micro_batches: int = 1
    graphs: bool = False  # steps are replayed as graphs and prepared ahead: no time of the host

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


class StepTotals(NamedTuple):
    """All that the price of a step depends on. Fractions are of parts of a batch."""

    tokens: float
    logit_rows: float
    requests: float
    spans: tuple[tuple[float, float], ...]  # for each of the model's windows: pairs, tokens read

    def part(self, of: int) -> "StepTotals":
        """One of `of` even parts."""
        spans = tuple((pairs / of, read / of) for pairs, read in self.spans)
        return StepTotals(self.tokens / of, self.logit_rows / of, self.requests / of, spans)


@dataclass(frozen=True, slots=True)
class OpPrice:
    """What one kind of operation costs in a step: all its `count` calls on one device together."""

    name: str
    kind: Kind | Literal["overhead"]
    count: float  # of calls; of the mean stage where there is a pipeline
    flops: float
    bytes_moved: float  # to and from memory; of a collective, sent over the link
    time_s: float
    bound: Bound

    @property
    def intensity(self) -> float:
        """FLOPs for each byte; 0 where none is moved."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0


class CostModel:
    """Prices of one program on one kind of device, as deployed.

    Raises ConfigError for a deployment that cannot be: degrees that do not divide the model, more
    devices than there are, arithmetic that the hardware lacks, ranks without a link.
    """

    def __init__(self, program: Program, hardware: HardwareSpec, deployment: Deployment) -> None:
        _check(hardware, deployment)
        cut = stages(shard(program, deployment.tensor_parallel), deployment.pipeline_parallel)
        ops = [op for stage in cut for op in stage.ops]
        accesses = [op.kv for op in ops if op.kv is not None and not op.kv.writes]
        self._windows = tuple(dict.fromkeys(access.window for access in accesses))
        precision = deployment.precision
        self._counts = [
            Counter(_Task.of(op, stage, precision) for op in stage.ops) for stage in cut
        ]
        self.program, self.deployment = program, deployment
        width = max(sum(ref.width for ref in stage.outputs) for stage in cut)
        self._send_task = _Task.of(Send(Ref("stream", 0, width)), program, precision)
        self._set(hardware)

    def on(self, hardware: HardwareSpec) -> "CostModel":
        """The same program, laid over other hardware in the same way."""
        _check(hardware, self.deployment)
        other = copy(self)
        other._set(hardware)
        return other

    def _set(self, hardware: HardwareSpec) -> None:
        # what a step reads whatever its batch is
        weight_bytes = max(
            sum(count * task.work.bytes_fixed for task, count in tasks.items())
            for tasks in self._counts
        )
        self.hardware = hardware = hardware.for_weights(weight_bytes)
        host = hardware.reached(self.deployment.arithmetic)
        if self.deployment.graphs:
            host = replace(host, launch_s=0.0, chunk_launch_s=0.0, step_s=0.0, logit_row_s=0.0)
        self._reached = host
        launch_s = host.launch_s / hardware.host_speed
        chunk_launch_s = (host.launch_s + host.chunk_launch_s) / hardware.host_speed
        self._stages = [
            _Stage(
                [self._call(task, count) for task, count in tasks.items()], launch_s, chunk_launch_s
            )
            for tasks in self._counts
        ]
        self._send = self._call(self._send_task, 1)

    def totals(self, shape: BatchShape) -> StepTotals:
        requests = shape.requests
        return StepTotals(
            sum([r.num_new for r in requests]),
            sum([r.num_logit_rows for r in requests]),
            len(requests),
            tuple(
                [
                    (
                        sum([r.attended_pairs(window) for r in requests]),
                        sum([r.read_tokens(window) for r in requests]),
                    )
                    for window in self._windows
                ]
            ),
        )

    def step_time(self, shape: BatchShape) -> float:
        """Seconds from the start of a step to its end."""
        return self.time_of(self.totals(shape))

    def time_of(self, totals: StepTotals) -> float:
        """As step_time, of sums that are there already."""
        parts = self.deployment.micro_batches
        part = totals if parts == 1 else totals.part(parts)
        times = [stage.time_s(part) for stage in self._stages]
        time_s = sum(times) + (parts - 1) * max(times)
        return time_s + (len(times) - 1) * self.send_time(part) + self._host_s(totals)

    def stage_times(self, totals: StepTotals) -> tuple[float, ...]:
        """Seconds of each pipeline stage for a batch, not cut into parts. What the host adds
        belongs to the first one, whose process is the driver's."""
        first, *others = [stage.time_s(totals) for stage in self._stages]
        return (first + self._host_s(totals), *others)

    def interval_of(self, totals: StepTotals) -> float:
        """Seconds from a step to the next of the same size where the stages never run dry: a part
        comes again when it has left the last stage, and when the slowest stage has had the others.
        """
        parts = self.deployment.micro_batches
        part = totals if parts == 1 else totals.part(parts)
        times = [stage.time_s(part) for stage in self._stages]
        alone_s = sum(times) + (len(times) - 1) * self.send_time(part)
        return max(parts * max(times), alone_s) + self._host_s(totals)

    def send_time(self, totals: StepTotals) -> float:
        """Seconds that a batch takes from one pipeline stage to the next."""
        return self._send.time_s(totals) if len(self._stages) > 1 else 0.0

    def stage_time(self, shape: BatchShape) -> float:
        """Seconds after which the slowest pipeline stage can take the next batch of this shape."""
        return max(self.stage_times(self.totals(shape)))

    def price(self, shape: BatchShape) -> tuple[OpPrice, ...]:
        """What each kind of operation takes of a step on one device. The times add up to step_time.

        What the host adds is a row ("launches" where the device waits for them, and "host"). With a
        pipeline the rows are those of the mean stage, and so is a row for the time in which it
        waits for the others ("bubble").
        """
        return self.price_of(self.totals(shape))

    def price_of(self, totals: StepTotals) -> tuple[OpPrice, ...]:
        """As price, of sums that are there already."""
        parts, num_stages = self.deployment.micro_batches, len(self._stages)
        part = totals.part(parts)
        rows: dict[str, OpPrice] = {}
        for stage in self._stages:
            for call in stage.calls:
                _add(rows, call.price(part, parts * call.count / num_stages))
        if num_stages > 1:
            _add(rows, self._send.price(part, parts * (num_stages - 1) / num_stages))
        launch_s = sum(stage.waiting_s(part) for stage in self._stages) * parts / num_stages
        host_s = self._host_s(totals)
        found = [row for row in rows.values() if row.count]
        found += [_overhead("launches", launch_s), _overhead("host", host_s)]
        if num_stages > 1:
            busy_s = sum(row.time_s for row in found)
            found.append(_overhead("bubble", self.time_of(totals) - busy_s))
        return tuple(found)

    def price_op(self, op: Op, shape: BatchShape) -> OpPrice:
        """What one call of an operation takes."""
        task = _Task.of(op, self.program, self.deployment.precision)
        return self._call(task, 1).price(self.totals(shape), 1)

    def _host_s(self, totals: StepTotals) -> float:
        """What the host adds to a step."""
        host = self._reached
        return (host.step_s + totals.logit_rows * host.logit_row_s) / self.hardware.host_speed

    def _call(self, task: "_Task", count: int) -> "_Call":
        """A task in seconds on this hardware."""
        hardware, work = self.hardware, task.work
        reached = self._reached.of(task.kind)
        peak = hardware.peak_of(task.kind, self.deployment.arithmetic)
        bandwidth = hardware.memory_bandwidth
        if task.kind == "collective":
            bandwidth = hardware.link_bandwidth or float("inf")
        peak, bandwidth = peak * reached.compute, bandwidth * reached.memory
        return _Call(
            task=task,
            is_selected=of_rows(work.rows, False, True),
            span=self._windows.index(task.window) if task.attends else None,
            compute_fixed_s=work.flops_row * reached.half_rows / peak,
            compute_row_s=work.flops_row / peak,
            compute_pair_s=work.flops_pair / peak,
            memory_fixed_s=work.bytes_fixed / bandwidth,
            memory_row_s=work.bytes_row / bandwidth,
            memory_read_s=work.bytes_read / bandwidth,
            row_s=reached.row_s,
            call_s=reached.call_s + task.hops * hardware.link_latency_s,
            count=count,
        )


class _Task(NamedTuple):
    """An operation without what differs between layers, so that equal ones can be counted."""

    name: str
    kind: Kind
    work: Work
    attends: bool  # it reads KV, in this window
    window: int | None
    hops: int

    @classmethod
    def of(cls, op: Op, program: Program, precision: Precision) -> "_Task":
        kv = op.kv
        return cls(
            op.label(program),
            op.kind,
            work_of(op, precision),
            kv is not None and not kv.writes,
            None if kv is None else kv.window,
            op.hops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One operation on one device, with what it takes for each unit of a step's sums."""

    task: _Task
    is_selected: bool  # its rows are those whose logits are wanted
    span: int | None  # which of the totals' spans attention sees
    compute_fixed_s: float
    compute_row_s: float
    compute_pair_s: float
    memory_fixed_s: float
    memory_row_s: float
    memory_read_s: float
    call_s: float
    row_s: float  # besides, for each row
    count: int  # of such calls

    def time_s(self, totals: StepTotals) -> float:
        """Of one call; none where it has no rows."""
        compute_s, memory_s, fixed_s = self.times(totals)
        return max(compute_s, memory_s) + fixed_s

    def times(self, totals: StepTotals) -> tuple[float, float, float]:
        """Seconds of arithmetic, of traffic, and of what is added to the longer one."""
        rows = totals.logit_rows if self.is_selected else totals.tokens
        if not rows:
            return 0.0, 0.0, 0.0
        pairs, read = (0.0, 0.0) if self.span is None else totals.spans[self.span]
        return (
            self.compute_fixed_s + self.compute_row_s * rows + self.compute_pair_s * pairs,
            self.memory_fixed_s + self.memory_row_s * rows + self.memory_read_s * read,
            self.call_s + self.row_s * rows,
        )

    def price(self, totals: StepTotals, count: float) -> OpPrice:
        rows = totals.logit_rows if self.is_selected else totals.tokens
        pairs, read = (0.0, 0.0) if self.span is None else totals.spans[self.span]
        compute_s, memory_s, fixed_s = self.times(totals)
        if fixed_s > max(compute_s, memory_s):
            bound: Bound = "overhead"
        elif compute_s > memory_s:
            bound = "compute"
        else:
            bound = "interconnect" if self.task.kind == "collective" else "memory"
        count = count if rows else 0.0
        return OpPrice(
            name=self.task.name,
            kind=self.task.kind,
            count=count,
            flops=self.task.work.flops(rows, pairs) * count,
            bytes_moved=self.task.work.bytes_moved(rows, read) * count,
            time_s=(max(compute_s, memory_s) + fixed_s) * count,
            bound=bound,
        )


class _Stage:
    """The operations of one device, in the order of its first layer."""

    def __init__(self, calls: list[_Call], launch_s: float, chunk_launch_s: float) -> None:
        self.calls = calls
        self._launch_s, self._chunk_launch_s = launch_s, chunk_launch_s
        # Plain tuples, as this is in the middle of a simulation's loop.
        self._by_tokens = [_flat(call) for call in calls if _is_by_tokens(call)]
        self._others = [call for call in calls if not _is_by_tokens(call)]

    def time_s(self, totals: StepTotals) -> float:
        """The device's sum, or the host's launches if they take longer."""
        device_s, num_calls = self._device(totals)
        has_chunk = totals.tokens > totals.requests
        launch_s = num_calls * (self._chunk_launch_s if has_chunk else self._launch_s)
        return launch_s if launch_s > device_s else device_s

    def waiting_s(self, totals: StepTotals) -> float:
        """For how long the device waits for launches."""
        return self.time_s(totals) - self._device(totals)[0]

    def _device(self, totals: StepTotals) -> tuple[float, int]:
        rows = totals.tokens
        if not rows:
            return 0.0, 0
        device_s, num_calls = 0.0, 0
        for count, compute_fixed, compute_row, memory_fixed, memory_row, call in self._by_tokens:
            compute_s = compute_fixed + compute_row * rows
            memory_s = memory_fixed + memory_row * rows
            device_s += count * ((compute_s if compute_s > memory_s else memory_s) + call)
            num_calls += count
        for other in self._others:
            device_s += other.count * other.time_s(totals)
            if totals.logit_rows or not other.is_selected:
                num_calls += other.count
        return device_s, num_calls


def _is_by_tokens(call: _Call) -> bool:
    return call.span is None and not call.is_selected and not call.row_s


def _flat(call: _Call) -> tuple[int, float, float, float, float, float]:
    return (
        call.count,
        call.compute_fixed_s,
        call.compute_row_s,
        call.memory_fixed_s,
        call.memory_row_s,
        call.call_s,
    )


def _overhead(name: str, time_s: float) -> OpPrice:
    return OpPrice(name, "overhead", 1.0, 0.0, 0.0, time_s, "overhead")


def _add(rows: dict[str, OpPrice], row: OpPrice) -> None:
    """Operations of the same name are one row; what binds the longest is what binds it."""
    found = rows.get(row.name)
    if found is None:
        rows[row.name] = row
        return
    rows[row.name] = replace(
        max(found, row, key=lambda one: one.time_s),
        count=found.count + row.count,
        flops=found.flops + row.flops,
        bytes_moved=found.bytes_moved + row.bytes_moved,
        time_s=found.time_s + row.time_s,
    )


def _check(hardware: HardwareSpec, deployment: Deployment) -> None:
    for flag, degree in (
        ("--tp", deployment.tensor_parallel),
        ("--pp", deployment.pipeline_parallel),
        ("--micro-batches", deployment.micro_batches),
    ):
        if degree < 1:
            raise ConfigError(f"{flag}: must be 1 or more, not {degree}")
    check_devices(hardware, deployment)
    if deployment.arithmetic not in hardware.peaks:
        raise ConfigError(
            f"{hardware.name}: no peak for {deployment.arithmetic} is known; "
            f"accepted: {', '.join(hardware.peaks)}"
        )


def check_devices(hardware: HardwareSpec, deployment: Deployment) -> None:
    """Raises ConfigError for more devices than there are, and for several without a link."""
    devices = deployment.num_devices
    if hardware.num_devices is not None and devices > hardware.num_devices:
        raise ConfigError(
            f"--tp times --pp is {devices} devices, and there are {hardware.num_devices}"
        )
    if devices > 1 and not hardware.link_bandwidth:
        raise ConfigError(
            f"{hardware.name}: no link to other devices is known (link_bandwidth); "
            "accepted: --tp 1 --pp 1"
        )
