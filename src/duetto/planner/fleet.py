"""A model on devices, as a fleet that can be simulated; or why it cannot be.

Knows prices and memory; simulates nothing.
"""

from dataclasses import replace

from duetto.core.config import SchedulerConfig, scheduler_config
from duetto.core.errors import ConfigError
from duetto.core.options import GPU_MEMORY_UTILIZATION, batched_tokens
from duetto.planner.layout import Layout, PrecisionName, draft_layout
from duetto.planner.offloading import simulated_tiers
from duetto.planner.speculation import DraftModel, beside, simulated_drafts
from duetto.pricing.cost_model import CostModel, StepTotals
from duetto.pricing.find_hardware import HOST
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.memory import MemoryFit, fit_device
from duetto.pricing.reuse import reuse_prices
from duetto.program.kv_size import default_kv_blocks
from duetto.program.program import Program
from duetto.program.rewrites.shard import possible_degrees
from duetto.simulation.disaggregation import Disaggregation, KVLink
from duetto.simulation.executor import next_token_prices, next_token_times
from duetto.simulation.pipeline import Passage, PipelineSpec
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet


def make_fleet(
    program: Program,
    hardware: HardwareSpec,
    layout: Layout,
    draft: Program | None = None,
) -> Fleet:
    """The fleet of a layout; `draft` is the draft model, where it has one.

    Raises ConfigError for what cannot be, with the reason and the nearest that could: degrees that
    do not divide the model, more devices than there are, a model that does not fit.
    """
    if hardware.num_devices is not None and layout.num_devices > hardware.num_devices:
        most = hardware.num_devices // layout.devices_per_replica - layout.prefill_replicas
        raise ConfigError(
            f"{layout.describe()}: needs {layout.num_devices} devices, and there are "
            f"{hardware.num_devices}; "
            + (f"--replicas {most} would do" if most > 0 else "take fewer, or lower degrees")
        )
    model = CostModel(program, hardware, layout.on(hardware, program))
    guesser = None if draft is None else DraftModel(draft, draft_layout(layout).on(hardware, draft))
    num_blocks = _blocks_of_batch(num_kv_blocks(program, hardware, layout, draft), layout)
    scheduler = _scheduler(program, layout, num_blocks)
    longest = scheduler.num_blocks_for(scheduler.max_model_len)
    replica = ReplicaSpec(
        drafts=simulated_drafts(layout, hardware, guesser),
        scheduler=scheduler,
        step_time=model.step_time,
        next_token_times=next_token_times(model),
        num_devices=layout.devices_per_replica,
        pipeline=_pipeline(model, layout),
        reuse=reuse_prices(model),
        tiers=simulated_tiers(model, layout, num_blocks, longest),
    )
    fleet = Fleet(replica=replica, num_replicas=layout.replicas, router=layout.router)
    if not layout.prefill_replicas:
        return fleet
    # A step without streams needs no limit: nobody waits for a next token.
    endless = replace(layout, target_itl="off")
    prefill = replace(replica, scheduler=_scheduler(program, endless, num_blocks), drafts=None)
    apart = Disaggregation(
        prefill=prefill,
        num_replicas=layout.prefill_replicas,
        link=_link(program, hardware, layout),
        max_local_prefill=layout.max_local_prefill,
    )
    return replace(fleet, disaggregation=apart)


def _pipeline(model: CostModel, layout: Layout) -> PipelineSpec | None:
    if layout.pp == 1:
        return None

    def passage(totals: StepTotals) -> Passage:
        return Passage(model.stage_times(totals), model.send_time(totals))

    return PipelineSpec(
        num_stages=layout.pp,
        num_batches=layout.num_batches,
        passage=lambda shape: passage(model.totals(shape)),
        next_passages=next_token_prices(model, passage),
    )


def _blocks_of_batch(num_blocks: int, layout: Layout) -> int:
    """KV blocks for the requests of each batch that may be under way; raises ConfigError if one of
    the length that was asked for has no room."""
    own = num_blocks // layout.num_batches
    least = -(-_least_tokens(layout) // layout.block_size)
    if own >= least:
        return own
    raise ConfigError(
        f"{layout.describe()}: {num_blocks * layout.block_size} tokens of KV are shared by "
        f"{layout.num_batches} batches under way, {own * layout.block_size} for each, and a "
        f"request may have {_least_tokens(layout)}; --micro-batches {num_blocks // least} would do"
    )


def _scheduler(program: Program, layout: Layout, num_blocks: int) -> SchedulerConfig:
    """Of each batch that may be under way."""
    longest = layout.max_model_len or min(program.max_model_len, num_blocks * layout.block_size)
    return scheduler_config(layout, num_blocks=num_blocks, max_model_len=longest)


def _link(program: Program, hardware: HardwareSpec, layout: Layout) -> KVLink:
    """Every rank sends its own heads, so links add up."""
    own = hardware.link_bandwidth * layout.tp
    bandwidth = own if layout.kv_bandwidth is None else layout.kv_bandwidth * 1e9
    if not bandwidth > 0:
        raise ConfigError(
            f"--prefill-replicas: {hardware.name} has no links that KV could take; say how fast "
            f"one is with --kv-bandwidth GB/S"
        )
    return KVLink(
        num_layers=len(program.kv),
        bytes_per_token=program.kv_bytes_per_token(layout.deployment(program).precision.kv_bytes),
        bytes_per_s=bandwidth,
        latency_s=hardware.link_latency_s,
    )


def num_kv_blocks(
    program: Program, hardware: HardwareSpec, layout: Layout, draft: Program | None = None
) -> int:
    """KV blocks of one replica.

    Raises ConfigError if the model, or a request of the length that was asked for, does not fit,
    naming the nearest layout with which it would.
    """
    alone = fit_layout(program, hardware, layout)
    found = alone if draft is None else fit_layout(program, hardware, layout, draft)
    if found.num_tokens >= _least_tokens(layout):
        return found.num_blocks
    if alone.num_tokens >= _least_tokens(layout):
        raise ConfigError(
            f"{layout.describe()}: the model fits on each {hardware.name} alone; with the draft "
            f"model there are {_gib(found.weight_bytes)} of weights in {_gib(found.usable_bytes)}, "
            f"and {found.num_tokens} tokens of KV are left for both"
        )
    raise ConfigError(
        f"{layout.describe()}: on each {hardware.name}, {_gib(found.weight_bytes)} of weights and "
        f"{_gib(found.activation_bytes)} of activations leave {found.num_tokens} tokens of KV in "
        f"{_gib(found.usable_bytes)}; {_nearest(program, hardware, layout)}"
    )


def fit_layout(
    program: Program, hardware: HardwareSpec, layout: Layout, draft: Program | None = None
) -> MemoryFit:
    """On the device with the least room for KV. A host, whose memory is not only the model's, gives
    KV as much as `duetto serve` takes there."""
    found = _fit_all(program, hardware, layout)
    if draft is not None:
        found = beside(found, _fit_all(draft, hardware, draft_layout(layout)))
    if not found.num_blocks:
        return found
    if layout.kv_cache_memory_bytes is not None:
        return _with_kv(found, layout.kv_cache_memory_bytes, hardware)
    if hardware.name != HOST:
        return found
    num_blocks = default_kv_blocks(
        program,
        block_size=layout.block_size,
        block_bytes=found.block_bytes,
        max_num_seqs=layout.max_num_seqs,
        available_bytes=hardware.memory_bytes - found.weight_bytes,
        may_shorten=layout.max_model_len is None,
    )
    return replace(found, num_blocks=min(num_blocks, found.num_blocks))


def _with_kv(found: MemoryFit, memory_bytes: int, hardware: HardwareSpec) -> MemoryFit:
    """With as much KV as was asked for. Raises ConfigError if there is less room."""
    if memory_bytes > found.kv_bytes + max(0, found.left_bytes):
        room = found.usable_bytes - found.weight_bytes - found.activation_bytes
        raise ConfigError(
            f"--kv-cache-memory-bytes {memory_bytes}: weights and activations leave {room} bytes "
            f"of those that may be used on each {hardware.name}"
        )
    return replace(found, num_blocks=memory_bytes // found.block_bytes)


def _fit_all(program: Program, hardware: HardwareSpec, layout: Layout) -> MemoryFit:
    """With KV in all the memory that may be used."""
    return fit_device(
        program,
        hardware,
        layout.on(hardware, program),
        block_size=layout.block_size,
        max_num_batched_tokens=batched_tokens(layout, program.max_model_len),
        max_num_seqs=layout.max_num_seqs,
        utilization=layout.gpu_memory_utilization or GPU_MEMORY_UTILIZATION,
    )


def _least_tokens(layout: Layout) -> int:
    return layout.max_model_len or layout.block_size


def _nearest(program: Program, hardware: HardwareSpec, layout: Layout) -> str:
    """What to change so that it fits, in words."""
    most = hardware.num_devices or 64
    ways = [
        (f"it fits with --tp {degree}", replace(layout, tp=degree))
        for degree in possible_degrees(program)
        if layout.tp < degree <= most // layout.pp
    ]
    names: tuple[PrecisionName, ...] = ("float8", "int8", "int4")
    ways += [(f"it fits with --dtype {name}", replace(layout, dtype=name)) for name in names]
    for words, other in ways:
        if other.dtype == "float8" and "float8" not in hardware.peaks:
            continue
        if fit_layout(program, hardware, other).num_tokens >= _least_tokens(other):
            return words
    if hardware.num_devices is None:
        return "no number of them up to 64 would do"
    more = _nearest(program, replace(hardware, num_devices=None), layout)
    return f"nothing that this machine offers would do, but with more devices: {more}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
