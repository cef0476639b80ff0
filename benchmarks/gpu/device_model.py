"""A model of a named shape on the device, with weights drawn there, and steps for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.random_model import random_model
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.gpu import greedy, step_of
from duetto.measure.op_times import BLOCK_SIZE, num_slots
from duetto.models.programs import build_program
from duetto.program.ops import Attention, Linear
from duetto.program.program import Program
from gpu.bench import Bench

Launch = Callable[[], object]


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A backend over random weights and KV. Steps of next tokens are graphs on a GPU."""

    program: Program
    backend: CudaBackend
    kv: Any
    graphs_s: float  # that recording the graphs of steps of next tokens took

    @classmethod
    def open(
        cls,
        bench: Bench,
        name: str,
        shapes: Sequence[BatchShape],
        quantization: Any = None,
        num_layers: int | None = None,
        num_runs: int = 1,
    ) -> "DeviceModel":
        """Of a named shape, for steps of these shapes and of up to `num_runs` next tokens."""
        config = bench.config(name)
        program = build_program(replace(config, layers=config.layers[:num_layers]))
        num_blocks = -(-max(map(num_slots, shapes)) // BLOCK_SIZE)
        kv_dtype: Any = bench.dtype_name
        backend, kv, _ = random_model(
            program,
            quantization=quantization,
            dtype=bench.dtype_name,  # type: ignore[arg-type]
            kv_dtype=kv_dtype,
            device=str(bench.device),
            num_tokens=max(num_runs, *(shape.num_tokens for shape in shapes)),
            num_runs=max(num_runs, *(len(shape.requests) for shape in shapes)),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            records=True,
        )
        del kv
        start = perf_counter()  # all kernels are compiled now: what is left is to record
        kv = backend.allocate_kv(num_blocks, BLOCK_SIZE, kv_dtype)
        bench.wait()
        return cls(program, backend, kv, perf_counter() - start)

    def replay(self, batch: int, context: int) -> Launch:
        """The graph of a step whose requests each have `context` tokens with the next one, its
        inputs on the device. In a rehearsal the same step, launched kernel by kernel."""
        step, rows = step_of(decoding(batch, context)), greedy(batch)
        self.backend.start(step, self.kv, rows).tokens()
        graphs = self.backend._graphs
        if graphs is None:
            return lambda: self.backend.start(step, self.kv, rows)
        size = graphs.size_for(batch)
        assert size is not None
        return lambda: graphs.replay(size)

    def start(self, shape: BatchShape, *, samples: bool = True) -> Launch:
        """A step as it comes, sampled on the device."""
        step = step_of(shape)
        rows = greedy(len(step.logit_rows)) if samples else None
        return lambda: self.backend.start(step, self.kv, rows)

    def decode_bytes(self, batch: int, context: int) -> float:
        """That a step must read: projections once, and keys and values of all requests."""
        projections = dict.fromkeys(op.weight for op in self.program.ops if isinstance(op, Linear))
        held = self.backend._held.weights
        tensors = [t for name in projections for t in held.matrices[name][2:] if t is not None]
        layers = [op for op in self.program.ops if isinstance(op, Attention)]
        kv_numbers = sum(2 * op.num_kv_heads * op.head_dim for op in layers)
        kv_bytes = batch * context * kv_numbers * self.kv.layers[0].keys.element_size()
        return float(sum(t.nbytes for t in tensors) + kv_bytes)

    def prefill_flops(self, num_tokens: int) -> float:
        """Of a prompt whose last token's logits are wanted."""
        flops = 0.0
        for op in self.program.ops:
            if isinstance(op, Linear):
                rows = num_tokens if op.rows == "all" else 1
                flops += 2.0 * op.out.width * op.x.width * rows
            elif isinstance(op, Attention):
                flops += attention_flops(op, num_tokens)
        return flops


def attention_flops(op: Attention, num_tokens: int) -> float:
    pairs = num_tokens * (num_tokens + 1) / 2
    return 4.0 * op.num_heads * op.head_dim * pairs


def decoding(batch: int, context: int) -> BatchShape:
    return BatchShape((RequestShape(1, context - 1),) * batch)


def prompt(num_tokens: int, num_past: int = 0) -> BatchShape:
    return BatchShape((RequestShape(num_tokens, num_past),))
