"""Ways to schedule one load: static, continuous, chunked, and prefill and decode apart.

Each as options of an engine and as a fleet to simulate, so that both are the same. Knows no load.
"""

from dataclasses import dataclass, replace

from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.shape import StepTime
from duetto.measure.workload import Workload
from duetto.simulation.disaggregation import Disaggregation, KVLink
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet
from duetto.simulation.workload import Arrival, Traffic


@dataclass(frozen=True, slots=True)
class SchedulerKind:
    """One way. `num_engines` share what one engine has alone: its cores, or its devices."""

    name: str
    num_engines: int = 1
    is_apart: bool = False  # one of two engines computes prompts, the other the rest


STATIC = SchedulerKind("static")
CONTINUOUS = SchedulerKind("continuous")
CHUNKED = SchedulerKind("chunked")
REPLICAS = SchedulerKind("chunked, 2 replicas", 2)
APART = SchedulerKind("disaggregated", 2, is_apart=True)
KINDS = (STATIC, CONTINUOUS, CHUNKED, REPLICAS, APART)


def engine_args_of(kind: SchedulerKind, args: EngineArgs) -> EngineArgs:
    """What each engine is built with; `args` are those of the chunked one. Static and continuous
    batching compute a prompt whole, as they did before chunks."""
    whole = replace(args, enable_chunked_prefill=False, max_num_batched_tokens=None)
    if kind is STATIC:
        return replace(whole, scheduling_policy="static")
    return whole if kind is CONTINUOUS else args


@dataclass(frozen=True, slots=True)
class PricedEngine:
    """An engine as the simulator sees it."""

    config: SchedulerConfig
    step_time: StepTime

    @property
    def spec(self) -> ReplicaSpec:
        return ReplicaSpec(scheduler=self.config, step_time=self.step_time)


def fleet_of(
    kind: SchedulerKind, engine: PricedEngine, link: KVLink, max_local_prefill: int = 0
) -> Fleet:
    """What is simulated beside the real engines of this kind; each of those is like `engine`."""
    if not kind.is_apart:
        return Fleet(replica=engine.spec, num_replicas=kind.num_engines)
    endless = replace(engine.spec, scheduler=replace(engine.config, target_itl_s=None))
    apart = Disaggregation(
        prefill=endless, num_replicas=1, link=link, max_local_prefill=max_local_prefill
    )
    return Fleet(replica=engine.spec, disaggregation=apart)


def traffic_of(workload: Workload) -> Traffic:
    """The same requests at the same times, for the simulator. Prompts share nothing."""
    arrivals = [
        Arrival(request.arrival_s, len(request.prompt_token_ids or ()), request.num_output_tokens)
        for request in workload.requests
    ]
    return Traffic(tuple(sorted(arrivals, key=lambda each: each.arrival_s)))
