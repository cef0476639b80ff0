"""What a model's steps take on some hardware, operation by operation, and how to check it by hand.

Loads no weights; prints nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.planner.cost_model import CostModel, Deployment, OpPrice
from duetto.planner.hardware import HardwareSpec
from duetto.program.ops import Linear
from duetto.program.program import Program
from duetto.program.shape import Cost

WEIGHT_BYTES: Mapping[str, float] = {  # of one number; scales of int4 are those of groups of 32
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": 0.5625,
}
_MOST_REQUESTS = 1 << 16  # a batch in which decode is still not bound by arithmetic never will be


@dataclass(frozen=True, slots=True)
class StepPrice:
    """One step: its operations on one device, whose times add up to `time_s`."""

    requests: tuple[RequestShape, ...]
    operations: tuple[OpPrice, ...]
    time_s: float
    datasheet_time_s: float  # with every efficiency 1 and no overhead
    cost: Cost  # of the whole step on all devices, collectives left out
    parameters: int

    @property
    def num_tokens(self) -> int:
        return BatchShape(self.requests).num_tokens

    @property
    def flops_by_rule_of_thumb(self) -> int:
        """2 · n · parameters: attention left out, and a product for each row of the embedding."""
        return 2 * self.num_tokens * self.parameters

    def as_json(self) -> dict[str, Any]:
        operations = [
            {
                **asdict(op),
                "intensity": op.intensity,
                "share": op.time_s / self.time_s if self.time_s else 0.0,
            }
            for op in self.operations
        ]
        cost = self.cost
        return {
            "time_s": self.time_s,
            "datasheet_time_s": self.datasheet_time_s,
            "tokens_per_s": self.num_tokens / self.time_s if self.time_s else 0.0,
            "operations": operations,
            "totals": {
                "num_tokens": self.num_tokens,
                "flops": cost.flops,
                "flops_by_rule_of_thumb": self.flops_by_rule_of_thumb,
                "bytes_read": cost.bytes_read,
                "bytes_written": cost.bytes_written,
                "intensity": cost.flops / cost.bytes_moved,
            },
        }


@dataclass(frozen=True, slots=True)
class Sanity:
    """Figures that a reader can check by hand."""

    parameters: int
    matrix_parameters: int  # in matrices that every token passes, the LM head included
    flops_per_token: int  # 2 · parameters: the rule of thumb, attention left out
    kv_bytes_per_token: int
    weight_bytes: Mapping[str, int]  # by precision
    balance_flops_per_byte: float  # of the hardware
    decode_turns_compute_bound_at: int | None  # requests; None: never


@dataclass(frozen=True, slots=True)
class Roofline:
    prefill: StepPrice  # every request's whole context
    decode: StepPrice  # one more token for every request
    mixed: StepPrice  # as decode, and a chunk of one more request's prompt
    sanity: Sanity
    notes: tuple[str, ...]

    @property
    def steps(self) -> dict[str, StepPrice]:
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}

    def as_json(self) -> dict[str, Any]:
        return {
            "prefill_time_s": self.prefill.time_s,
            "decode_step_time_s": self.decode.time_s,
            "mixed_step_time_s": self.mixed.time_s,
            **{name: step.as_json() for name, step in self.steps.items()},
            "sanity": asdict(self.sanity),
            "notes": list(self.notes),
        }


def roofline(
    program: Program,
    hardware: HardwareSpec,
    deployment: Deployment,
    *,
    batch: int,
    context: int,
    chunk: int = 512,
) -> Roofline:
    """Prices of prefill (`batch` prompts of `context` tokens), of decode (`batch` requests with
    `context` tokens in the cache) and of a decode with a chunk of a prompt of `context` tokens.

    Raises ConfigError for numbers below 1 and as CostModel does.
    """
    for flag, value in (("--batch", batch), ("--context", context), ("--chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{flag}: must be 1 or more, not {value}")
    model = CostModel(program, hardware, deployment)
    chunk = min(chunk, context)
    streams = (RequestShape(1, context),) * batch
    # A chunk that does not end its prompt gives no token; in the middle it sees half of the rest.
    piece = RequestShape(chunk, (context - chunk) // 2, 0)
    return Roofline(
        prefill=_price(model, (RequestShape(context, 0),) * batch),
        decode=_price(model, streams),
        mixed=_price(model, (*streams, piece)),
        sanity=_sanity(model),
        notes=_notes(model, context),
    )


def _price(model: CostModel, requests: tuple[RequestShape, ...]) -> StepPrice:
    shape = BatchShape(requests)
    return StepPrice(
        requests,
        model.price(shape),
        model.step_time(shape),
        model.on(model.hardware.ideal()).step_time(shape),
        model.program.cost(shape, model.deployment.precision),
        model.program.num_parameters,
    )


def _sanity(model: CostModel) -> Sanity:
    program, precision = model.program, model.deployment.precision
    parameters = program.num_parameters
    return Sanity(
        parameters=parameters,
        matrix_parameters=sum(
            op.x.width * op.out.width for op in program.ops if isinstance(op, Linear)
        ),
        flops_per_token=2 * parameters,
        kv_bytes_per_token=program.kv_bytes_per_token(precision.kv_bytes),
        weight_bytes={name: int(parameters * size) for name, size in WEIGHT_BYTES.items()},
        balance_flops_per_byte=model.hardware.balance(model.deployment.arithmetic),
        decode_turns_compute_bound_at=turning_batch(model),
    )


def turning_batch(model: CostModel) -> int | None:
    """The fewest requests with which a decode step's matrix products are bound by arithmetic.

    For most of their time, that is. Weights are read once for all requests; KV is read once for
    each, so attention stays bound by memory however many there are. None: no number does it.
    """

    def is_bound_by_compute(batch: int) -> bool:
        times = {"compute": 0.0, "memory": 0.0}
        for op in model.price(BatchShape((RequestShape(1, 0),) * batch)):
            if op.kind == "linear" and op.bound in times:
                times[op.bound] += op.time_s
        return times["compute"] > times["memory"]

    most = 1
    while not is_bound_by_compute(most):
        most *= 2
        if most > _MOST_REQUESTS:
            return None
    least = most // 2  # is not
    while most - least > 1:
        middle = (least + most) // 2
        if is_bound_by_compute(middle):
            most = middle
        else:
            least = middle
    return most


def _notes(model: CostModel, context: int) -> tuple[str, ...]:
    found, program, hardware = [], model.program, model.hardware
    if context > program.max_model_len:
        found.append(
            f"a context of {context} is beyond the model's own {program.max_model_len}; "
            "priced all the same"
        )
    weights = program.num_parameters * model.deployment.precision.weight_bytes
    share = weights / model.deployment.num_devices
    if share > hardware.memory_bytes:
        found.append(
            f"{share / 2**30:.1f} GiB of weights per device do not fit into the "
            f"{hardware.memory_bytes / 2**30:.1f} GiB of {hardware.name}; duetto fit says what does"
        )
    host = hardware.notes_on_host(model.deployment.arithmetic, model.deployment.graphs)
    return (*found, *host)
