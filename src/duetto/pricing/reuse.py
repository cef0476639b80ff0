"""What reuse takes beside computing tokens: KV brought to its place, and looks at what deviates.

A look that adds up attention takes what computing its tokens takes. Knows no requests and no clock.
"""

from dataclasses import dataclass, replace

from duetto.core.batch import ScheduledBatch
from duetto.core.shape import BatchShape, RequestShape, StepTime
from duetto.pricing.cost_model import CostModel
from duetto.program.program import Program
from duetto.program.shape import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusePrices:
    move_s: float = 0.0  # of one token's KV, all layers
    look_time: StepTime  # of a look at deviations, by the shape of its tokens

    def of(self, batch: ScheduledBatch, step_time: StepTime) -> float:
        """Seconds of a step: its moves, its looks at deviations, and the others' tokens, one after
        the other."""
        items = batch.requests
        move_s = self.move_s * sum([move.end - move.start for item in items for move in item.moves])
        return move_s + self.time_of(batch.shape, step_time)

    def time_of(self, shape: BatchShape, step_time: StepTime) -> float:
        """`step_time`, but of looks at deviations what they take: they run apart."""
        looks = tuple([request for request in shape.requests if request.is_short])
        if not looks:
            return step_time(shape)
        look_s = self.look_time(BatchShape(looks))
        others = tuple([request for request in shape.requests if not request.is_short])
        return look_s + (step_time(BatchShape(others)) if others else 0.0)


@dataclass(frozen=True, slots=True)
class LookShare:
    """What a token of a look at deviations takes, of what it takes in a whole step."""

    compute: float  # of all but attention
    context: float  # of attention


def look_share(program: Program) -> LookShare:
    """By arithmetic: of many tokens it is what takes the time, and looks are at whole texts."""
    one = BatchShape((RequestShape(1, 0, 0),))
    look, whole = (p.cost(one, Precision()).flops for p in (first_layers(program), program))
    return LookShare(look / whole, 1 / len(program.kv))


def with_looks(model: CostModel) -> StepTime:
    """What a step takes, its looks at deviations as what they are."""
    prices = reuse_prices(model)
    return lambda shape: prices.time_of(shape, model.step_time)


def reuse_prices(model: CostModel) -> ReusePrices:
    """Of the model that `model` prices, on its devices. Each rank moves its own heads' KV: it is
    read and written, as fast as a kernel that copies does either; that keys are turned on the way
    costs nothing beside."""
    deployment, hardware = model.deployment, model.hardware
    num_bytes = model.program.kv_bytes_per_token(deployment.precision.kv_bytes)
    reached = hardware.reached(deployment.arithmetic).of("copy").memory
    bytes_per_s = hardware.memory_bandwidth * reached * deployment.tensor_parallel
    unstaged = replace(deployment, pipeline_parallel=1, micro_batches=1)
    look = CostModel(first_layers(model.program), hardware, unstaged)
    return ReusePrices(move_s=2 * num_bytes / bytes_per_s, look_time=look.step_time)


def first_layers(program: Program) -> Program:
    """The program up to where layer 1 writes its KV: what a look at deviations goes through. Of a
    model with one layer: up to where that one does."""
    last = min(1, len(program.kv) - 1)
    writes = [
        place
        for place, op in enumerate(program.ops)
        if op.kv is not None and op.kv.writes and op.kv.layer == last
    ]
    return replace(program, ops=program.ops[: writes[-1] + 1], kv=program.kv[: last + 1])
