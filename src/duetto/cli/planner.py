"""`duetto planner`: watches a cluster, and says how many workers there should be, or acts."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Literal

import httpx2 as httpx
from cyclopts import Parameter

from duetto.cli.interrupt import first_interrupt
from duetto.cli.output import Flat, JsonFlag, open_console, print_json, say
from duetto.cli.server_client import ask_server, open_client
from duetto.cluster.child_workers import LocalWorkers, worker_command
from duetto.cluster.facts import WorkerRole
from duetto.cluster.ray_workers import RayWorkers
from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO, parse_slo
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.planner.actuator import Actuator
from duetto.planner.decision import Decision
from duetto.planner.forecast import FleetForecaster, RoleCounts
from duetto.planner.layout import Layout, with_weights
from duetto.planner.observed import MetricsError, Snapshot, read_snapshot, window_between
from duetto.planner.watch import Watcher
from duetto.planner.watch_options import WatchOptions
from duetto.pricing.find_hardware import find_hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class ActingOptions:
    """How decisions are carried out."""

    apply: Annotated[bool, Parameter(negative="")] = False
    """Start and stop workers as decided: all of them are this command's, and end with it."""
    workers: Literal["ray", "local"] = "ray"
    """Where: as actors of a Ray cluster (needs duetto[ray]), or as processes of this machine."""
    worker: str = ""
    """A worker's command line after duetto worker, like "MODEL --join tcp://10.0.0.1:9000"; --role
    is added: prefill, and decode for the others, or both with --no-disaggregate."""
    ray_address: str | None = None
    """The Ray cluster, as ray.init has it; by default the one that is found, or a new one."""
    ray_cpus: float = 1.0
    """CPUs that Ray sets apart for a worker."""
    ray_gpus: float = 0.0
    """GPUs that Ray sets apart for a worker."""


_ROLES = ("prefill", "decode", "both")
_LEAST_INTERVAL_S = 1.0
_START_S = 300.0  # for workers that were just started: models are loaded


def planner(
    urls: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    *,
    model: str,
    slo_ttft: str,
    slo_tpot: str,
    hardware: str = "host",
    interval: float = 30.0,
    num_windows: int | None = None,
    quantization: QuantizationName = "none",
    api_key: str | None = None,
    as_json: JsonFlag = False,
    acting: Annotated[ActingOptions | None, Flat] = None,
    options: Annotated[WatchOptions | None, Flat] = None,
    base: Annotated[Layout | None, Flat] = None,
) -> None:
    """Watch a running cluster, and say how many workers of which role it should have, and why.

    Parameters
    ----------
    urls
        A router, or servers; each may have its role before it, like prefill=10.0.0.2:8000. Of one
        address --replicas and --prefill-replicas say what is behind it.
    model
        What they serve: a checkpoint directory, a config.json, or a named shape.
    slo_ttft
        The limit of TTFT with its unit, like 500ms.
    slo_tpot
        The limit of TPOT with its unit, like 50ms.
    hardware
        What each worker runs on, like h100, or host after duetto calibrate.
    interval
        Seconds between two looks.
    num_windows
        End after so many; by default with Ctrl-C.
    quantization
        The engine's own word for --dtype int8 and int4.
    api_key
        The servers' key; DUETTO_API_KEY from the environment if left out.
    as_json
        One JSON document a line for each decision.
    """
    if not _LEAST_INTERVAL_S <= interval < float("inf"):
        raise ConfigError(f"--interval {interval:g}: must be at least {_LEAST_INTERVAL_S:g} s")
    if num_windows is not None and num_windows < 1:
        raise ConfigError(f"--num-windows {num_windows}: must be 1 or more")
    options, base = options or WatchOptions(), base or Layout()
    limits = SLO(ttft=_limit("ttft", slo_ttft), tpot=_limit("tpot", slo_tpot))
    config, spec = find_config(model), find_hardware(hardware)
    forecaster = FleetForecaster(
        program=build_program(config, base.max_model_len),
        hardware=spec,
        base=with_weights(base, config.dtype, quantization),
        limits=limits,
        horizon_s=max(60.0, 2 * interval),
    )
    with ExitStack() as stack:
        servers = [_server(text, api_key, stack) for text in urls]
        watching = Watching(
            servers,
            Watcher(options, limits, forecaster),
            _counts(servers, base),
            _actuator(acting or ActingOptions(), options, stack),
        )
        is_stopped = stack.enter_context(first_interrupt())
        for decision in watching.decisions(interval, num_windows, is_stopped):
            _show(decision, as_json=as_json)


def _limit(name: str, text: str) -> float:
    if "=" in text or ":" in text:
        raise ConfigError(f"--slo-{name} {text:.40}: must be a time with its unit, like 50ms")
    found = getattr(parse_slo((f"{name}={text}",)), name)
    assert isinstance(found, float)
    return found


# --- servers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    client: httpx.Client
    role: str | None  # None: nobody said

    def look(self) -> Snapshot | None:
        """Its metrics now; None if it does not answer in time. Raises MetricsError for an answer
        that cannot be read."""
        try:
            text = ask_server(self.client, "/metrics").text
        except ConfigError:
            return None
        return read_snapshot(text, self.role or "both")


def _server(text: str, api_key: str | None, stack: ExitStack) -> _Server:
    role, equals, url = text.partition("=")
    if not equals or role not in _ROLES:
        role, url = "", text
    return _Server(stack.enter_context(open_client(url, api_key)), role or None)


def _counts(servers: Sequence[_Server], base: Layout) -> RoleCounts:
    """How many workers there are now, as the command line says."""
    if len(servers) == 1 and servers[0].role is None:
        return RoleCounts(base.replicas, base.prefill_replicas)
    if (base.replicas, base.prefill_replicas) != (1, 0):
        raise ConfigError(
            "--replicas and --prefill-replicas: are of one address; several say by themselves how "
            "many there are"
        )
    num_prefill = sum(server.role == "prefill" for server in servers)
    if num_prefill == len(servers):
        raise ConfigError("prefill=...: without a worker of another role nobody answers")
    return RoleCounts(len(servers) - num_prefill, num_prefill)


def _actuator(options: ActingOptions, watch: WatchOptions, stack: ExitStack) -> Actuator | None:
    """What it starts ends with it."""
    if not options.apply:
        if options != ActingOptions():
            raise ConfigError("--workers, --worker and --ray-*: need --apply")
        return None
    try:
        arguments = shlex.split(options.worker)
    except ValueError as error:
        raise ConfigError(f"--worker: {error}") from None
    if "--join" not in arguments:
        raise ConfigError(
            "--apply: needs --worker with a worker's command line that joins the router, like "
            '--worker "MODEL --join tcp://10.0.0.1:9000"'
        )
    command = worker_command(arguments)
    role: WorkerRole = "decode" if watch.disaggregate else "both"
    actuator: Actuator
    if options.workers == "local":
        actuator = LocalWorkers(command, replica_role=role)
    else:
        actuator = RayWorkers(
            command,
            replica_role=role,
            address=options.ray_address,
            num_cpus=options.ray_cpus,
            num_gpus=options.ray_gpus,
        )
    stack.callback(actuator.stop)
    return actuator


# --- the loop ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Watching:
    """Looks at servers again and again, and decides after each look but the first."""

    servers: Sequence[_Server]
    watcher: Watcher
    counts: RoleCounts
    actuator: Actuator | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _before: list[Snapshot | None] = field(default_factory=list)
    _looked_s: float = 0.0

    def decisions(
        self, interval_s: float, num_windows: int | None, is_stopped: Callable[[], bool]
    ) -> Iterator[Decision]:
        """Raises MetricsError if no server answers at first, or one answers with nonsense; later a
        window without an answer is left out."""
        if self.actuator is not None:
            self.actuator.scale(self.counts.replicas, self.counts.prefill)
        if not self._begins(is_stopped):
            return
        done = 0
        while num_windows is None or done < num_windows:
            if not self._wait(interval_s, is_stopped):
                return
            decision = self._next()
            if decision is not None:
                yield decision
            done += 1

    def _begins(self, is_stopped: Callable[[], bool]) -> bool:
        """The first look; False if it is stopped before. A router answers once a worker has joined,
        so those that were just started are waited for."""
        until = self.clock() + (0.0 if self.actuator is None else _START_S)
        while True:
            self._look()
            if any(self._before):
                return True
            if self.clock() >= until:
                raise MetricsError(f"{self.servers[0].client.base_url}: no server answers there")
            if not self._wait(1.0, is_stopped):
                return False

    def _look(self) -> None:
        self._before = [server.look() for server in self.servers]
        self._looked_s = self.clock()

    def _wait(self, interval_s: float, is_stopped: Callable[[], bool]) -> bool:
        until = self._looked_s + interval_s
        while (left := until - self.clock()) > 0:
            if is_stopped():
                return False
            self.sleep(min(left, 0.2))
        return not is_stopped()

    def _next(self) -> Decision | None:
        before, start_s = self._before, self._looked_s
        self._look()
        if not any(self._before):
            return None
        window = window_between(
            before, self._before, end_s=self._looked_s, duration_s=self._looked_s - start_s
        )
        decision = self.watcher.decide(window, self.counts, live=self._live())
        if self.actuator is not None:  # also where nothing changes: what has died is started again
            self.actuator.scale(decision.target.replicas, decision.target.prefill)
            self.counts = decision.target
        return decision

    def _live(self) -> int | None:
        """How many workers answer; unknown behind a router."""
        if self.actuator is not None:
            return sum(self.actuator.live())
        if len(self.servers) == 1:
            return None
        return sum(snapshot is not None for snapshot in self._before)


def _show(decision: Decision, *, as_json: bool) -> None:
    if as_json:
        print_json(decision.as_json())
        return
    console = open_console()
    for line in decision.words:
        say(console, line)
