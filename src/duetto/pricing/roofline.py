"""What a model's steps take on some hardware, operation by operation, and how to check it by hand.

Loads no weights; prints nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.pricing.cost_model import CostModel, Deployment, OpPrice, StepTotals
from duetto.pricing.gpus import notes_on_host
from duetto.pricing.hardware import HardwareSpec
from duetto.program.program import Program
from duetto.program.shape import Cost

WEIGHT_BYTES: Mapping[str, float] = {  # of one number; scales of int4 are those of groups of 32
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": 0.5625,
}
_MOST_REQUESTS = 1 << 16  # a batch in which decode is still not bound by arithmetic never will be
_MOST = 10**9  # requests, or tokens: no step has as many


class Equals(NamedTuple):
    """Requests of a step that are alike; counted, since there may be a million."""

    how_many: int
    request: RequestShape


@dataclass(frozen=True, slots=True)
class StepPrice:
    """One step: its operations on one device, whose times add up to `time_s`."""

    requests: tuple[Equals, ...]
    operations: tuple[OpPrice, ...]
    time_s: float
    datasheet_time_s: float  # with every efficiency 1 and no overhead
    cost: Cost  # of the whole step on all devices, collectives left out
    parameters: int
    interval_s: float  # between such steps of a pipeline that never runs dry; else `time_s`

    @property
    def bubble(self) -> float:
        """The part of the step in which the mean pipeline stage waits for others."""
        waits = sum(op.time_s for op in self.operations if op.name == "bubble")
        return waits / self.time_s if self.time_s else 0.0

    @property
    def num_tokens(self) -> int:
        return sum(count * request.num_new for count, request in self.requests)

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
            "interval_s": self.interval_s,
            "bubble": self.bubble,
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
    balance_flops_per_byte: float  # of the hardware, by its datasheet
    datasheet_decode_turns_compute_bound_at: int | None  # requests; None: never ...
    decode_turns_compute_bound_at: int | None  # ... and with what is reached of both roofs


@dataclass(frozen=True, slots=True)
class Roofline:
    prefill: StepPrice  # every request's whole context
    decode: StepPrice  # one more token for every request
    mixed: StepPrice  # as decode, and a chunk of one more request's prompt
    sanity: Sanity
    notes: tuple[str, ...]
    hardware: HardwareSpec  # as it is for this model's weights

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

    Raises ConfigError for numbers below 1, for more parts than requests, and as CostModel does.
    """
    for flag, value in (("--batch", batch), ("--context", context), ("--chunk", chunk)):
        if not 1 <= value <= _MOST:
            raise ConfigError(f"{flag}: must be from 1 to {_MOST}, not {str(value)[:20]}")
    model = CostModel(program, hardware, deployment)
    if deployment.micro_batches > batch:
        raise ConfigError(
            f"--micro-batches {deployment.micro_batches}: a batch of {batch} has at most {batch} "
            "parts (--batch)"
        )
    chunk = min(chunk, context)
    streams = Equals(batch, RequestShape(1, context))
    # A chunk that does not end its prompt gives no token; in the middle it sees half of the rest.
    piece = Equals(1, RequestShape(chunk, (context - chunk) // 2, 0))
    return Roofline(
        prefill=_price(model, Equals(batch, RequestShape(context, 0))),
        decode=_price(model, streams),
        mixed=_price(model, streams, piece),
        sanity=_sanity(model),
        notes=_notes(model, hardware, context),
        hardware=model.hardware,
    )


def _price(model: CostModel, *requests: Equals) -> StepPrice:
    totals = _totals(model, *requests)
    return StepPrice(
        requests,
        model.price_of(totals),
        model.time_of(totals),
        model.on(model.hardware.ideal()).time_of(totals),
        _cost(model, *requests),
        model.program.num_parameters,
        model.interval_of(totals),
    )


def _totals(model: CostModel, *requests: Equals) -> StepTotals:
    """As model.totals of all of them."""
    counts = [count for count, _ in requests]
    each = [model.totals(BatchShape((request,))) for _, request in requests]

    def total(numbers: list[float]) -> float:
        return sum(count * number for count, number in zip(counts, numbers, strict=True))

    windows = zip(*(one.spans for one in each), strict=True)
    return StepTotals(
        total([one.tokens for one in each]),
        total([one.logit_rows for one in each]),
        total([one.requests for one in each]),
        tuple((total([a for a, _ in w]), total([b for _, b in w])) for w in windows),
    )


def _cost(model: CostModel, *requests: Equals) -> Cost:
    """As program.cost of all of them: what one more of a kind adds, so many times."""

    def of(*shapes: RequestShape) -> Cost:
        return model.program.cost(BatchShape(shapes), model.deployment.precision)

    once = [request for _, request in requests]
    found = first = of(*once)
    for count, request in requests:
        more = of(*once, request)
        found += Cost(
            (count - 1) * (more.flops - first.flops),
            (count - 1) * (more.bytes_read - first.bytes_read),
            (count - 1) * (more.bytes_written - first.bytes_written),
        )
    return found


def _sanity(model: CostModel) -> Sanity:
    program, precision = model.program, model.deployment.precision
    parameters = program.num_parameters
    return Sanity(
        parameters=parameters,
        matrix_parameters=sum(
            prod(program.weights[op.weights[0]].shape) for op in program.ops if op.kind == "linear"
        ),
        flops_per_token=2 * parameters,
        kv_bytes_per_token=program.kv_bytes_per_token(precision.kv_bytes),
        weight_bytes={name: int(parameters * size) for name, size in WEIGHT_BYTES.items()},
        balance_flops_per_byte=model.hardware.balance(model.deployment.arithmetic),
        datasheet_decode_turns_compute_bound_at=turning_batch(model.on(model.hardware.ideal())),
        decode_turns_compute_bound_at=turning_batch(model),
    )


def turning_batch(model: CostModel) -> int | None:
    """The fewest requests with which a decode step's matrix products are bound by arithmetic.

    For most of their time, that is. Weights are read once for all requests; KV is read once for
    each, so attention stays bound by memory however many there are. None: no number does it.
    """

    def is_bound_by_compute(batch: int) -> bool:
        times = {"compute": 0.0, "memory": 0.0}
        for op in model.price_of(_totals(model, Equals(batch, RequestShape(1, 0)))):
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


def _notes(model: CostModel, hardware: HardwareSpec, context: int) -> tuple[str, ...]:
    found, program = [], model.program
    cached, memory = model.hardware.memory_bandwidth, hardware.memory_bandwidth
    if cached > 1.05 * memory:
        found.append(
            f"caches keep some of these weights from step to step: {cached / 1e9:.4g} GB/s, where "
            f"memory gives {memory / 1e9:.4g}"
        )
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
    host = notes_on_host(hardware, model.deployment.arithmetic, model.deployment.graphs)
    return (*found, *host)
