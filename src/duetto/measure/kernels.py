"""What each native kernel reaches, beside what the machine gives in the same run.

Every kernel runs as an operation of a native plan, alone. What a decode step reads from memory is
read from memory here too: weights and KV stand in as many copies as no cache holds. Knows only
the widths of a model. Takes the native module as an argument, because it may not have been built.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duetto.program.ops import Attention, GatedAct, Linear
from duetto.program.program import Program

if TYPE_CHECKING:
    from duetto._native import KvFormat, Plan, Pool, WeightFormat

WORKING_SET = 1 << 30  # bytes: of 192 MiB, a shared last cache of 32 MiB still held a part
MAX_COPIES = 1024
BLOCK_SIZE = 16
CONTEXT = 1024  # tokens of each request whose attention is measured at decode
SECONDS = 0.25  # of each measurement; the best run of them counts
MIN_RUNS = 3
TILE = 64  # rows that are packed together
HEAD_ROWS = 32  # logits are wanted of few rows, even where many are computed

GROUPS: Mapping[str, int] = {"f32": 0, "bf16": 0, "bf12": 0, "int8": 128, "int4": 64}
MULTIPLIED_IN: Mapping[str, str] = {
    "f32": "f32",
    "bf16": "bf16",
    "bf12": "bf16",
    "int8": "int8",
    "int4": "int8",
}


@dataclass(frozen=True, slots=True)
class Widths:
    """Of a model, as far as kernels see it."""

    projections: Mapping[str, tuple[int, int]]  # name -> outputs, inputs
    head: tuple[int, int]  # vocabulary, hidden
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int  # columns of the gate, and of the up projection

    @classmethod
    def of(cls, program: Program) -> "Widths":
        """Of one layer of a program; of layers that differ, those of the first."""
        linears = [op for op in program.ops if isinstance(op, Linear)]
        attention = next(op for op in program.ops if isinstance(op, Attention))
        gated = next(op for op in program.ops if isinstance(op, GatedAct))
        projections: dict[str, tuple[int, int]] = {}
        for op in linears[:-1]:
            shape = (op.out.width, op.x.width)
            if shape not in projections.values():
                projections[op.weight.removesuffix(".weight").rpartition(".")[2]] = shape
        return cls(
            projections,
            (linears[-1].out.width, linears[-1].x.width),
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            gated.out.width,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to be had, by the native module's own probes."""

    isa: str
    num_threads: int
    read_bandwidth: float  # bytes per second
    peaks: Mapping[str, float]  # operations per second, by the format that is multiplied
    barrier_ns: float

    def best_of(self, other: "Machine") -> "Machine":
        """Neighbours can only take something away, so the better of two probes is nearer."""
        return Machine(
            self.isa,
            self.num_threads,
            max(self.read_bandwidth, other.read_bandwidth),
            {name: max(peak, other.peaks[name]) for name, peak in self.peaks.items()},
            min(self.barrier_ns, other.barrier_ns),
        )


@dataclass(frozen=True, slots=True)
class Measured:
    kernel: str
    shape: str
    format: str
    rows: int
    seconds: float  # of one call
    num_bytes: int  # that it must move
    num_ops: int
    arithmetic: str | None  # whose peak bounds it; None: all of it is in a cache

    def limit(self, machine: Machine) -> float | None:
        """Seconds that it would take at the machine's own speed (Williams et al., Roofline)."""
        if self.arithmetic is None:
            return None
        moving = self.num_bytes / machine.read_bandwidth
        return max(moving, self.num_ops / machine.peaks[self.arithmetic])

    def as_json(self, machine: Machine) -> dict[str, Any]:
        limit = self.limit(machine)
        return asdict(self) | {
            "bytes_per_s": self.num_bytes / self.seconds,
            "ops_per_s": self.num_ops / self.seconds,
            "of_machine": None if limit is None else limit / self.seconds,
        }


def most_bytes(widths: Widths, rows: int) -> int:
    """About what a measurement of so many rows takes beside the weights: the buffers that it reads
    and writes, and as much again outside the plan, of random numbers and of results."""
    attended = (widths.num_heads + widths.num_kv_heads) * widths.head_dim
    shapes = [*widths.projections.values(), (attended, attended), (2 * widths.inner, widths.inner)]
    if rows <= HEAD_ROWS:
        shapes.append(widths.head)
    return 2 * 4 * rows * max(read + written for read, written in shapes)


def probe(native: Any, pool: "Pool", isa: str) -> Machine:
    """Takes about a quarter of a second."""
    return Machine(
        isa,
        pool.num_threads,
        native.read_bandwidth(pool, WORKING_SET, 2),
        {
            "f32": native.fp32_peak(pool, isa),
            "bf16": native.bf16_peak(pool, isa),
            "int8": native.int8_peak(pool, isa),
        },
        min(pool.barrier_ns(1000) for _ in range(20)),
    )


class KernelBench:
    """Measures one machine's kernels; every method yields one result at a time.

    `machine` is the best that was probed so far: before each weight and each KV format, because
    what neighbours leave of a machine changes while it is measured.
    """

    def __init__(self, native: Any, pool: "Pool", isa: str, widths: Widths) -> None:
        self._native = native
        self._pool = pool
        self._isa = isa
        self._widths = widths
        self._random = np.random.default_rng(0)
        self.machine = probe(native, pool, isa)

    def _probe(self) -> None:
        self.machine = self.machine.best_of(probe(self._native, self._pool, self._isa))

    def linears(self, formats: Sequence["WeightFormat"], rows: Sequence[int]) -> Iterator[Measured]:
        """Every projection in every format, at every number of rows."""
        shapes = {**self._widths.projections, "head": self._widths.head}
        for name, (n, k) in shapes.items():
            for format in formats:
                self._probe()
                weights, num_bytes = self._weights(format, n, k)
                for m in rows:
                    if name != "head" or m <= HEAD_ROWS:
                        seconds = self._time_linear(weights, n, k, m)
                        shape, ops = f"{name} {n} x {k}", 2 * m * n * k
                        kind = MULTIPLIED_IN[format]
                        yield Measured("linear", shape, format, m, seconds, num_bytes, ops, kind)

    def _weights(self, format: "WeightFormat", n: int, k: int) -> tuple[list[Any], int]:
        """Copies of one weight of random numbers, packed as they are drawn."""
        data_bytes, scale_bytes = self._native.packed_bytes(format, GROUPS[format], n, k)
        num_bytes = data_bytes + scale_bytes
        copies = max(1, min(MAX_COPIES, WORKING_SET // num_bytes))
        arena = self._native.Arena(copies * num_bytes).array
        one = arena[:num_bytes]
        one[:data_bytes] = (
            self._coded(n, k) if format == "bf12" else self._numbers(format, data_bytes)
        )
        one[data_bytes:].view(np.uint16)[:] = 0x3C00  # 2^-7
        weights = []
        for start in range(0, copies * num_bytes, num_bytes):
            part = arena[start : start + num_bytes]
            if start:
                part[:] = one
            scales = part[data_bytes:] if scale_bytes else None
            group = GROUPS[format]
            weights.append(self._native.Weight(format, group, n, k, part[:data_bytes], scales))
        return weights, num_bytes

    def _coded(self, n: int, k: int) -> NDArray[np.uint8]:
        """A packed weight whose tiles are all the same one of normal numbers."""
        tile = self._native.Arena(self._native.packed_bytes("bf12", 0, TILE, k)[0]).array
        numbers = self._random.standard_normal((TILE, k), np.float32) / 128
        self._native.pack("bf12", 0, [numbers], tile, None, self._pool)
        return np.tile(tile, -(-n // TILE))

    def _numbers(self, format: "WeightFormat", num_bytes: int) -> NDArray[np.uint8]:
        """Bytes of a packed weight; floats are near 2^-7, as no NaN or subnormal may slow it."""
        drawn = self._random.integers(0, 256, num_bytes, np.uint8)
        if format == "int8":
            drawn[drawn == 128] = 0  # -128 is no weight
        elif format == "bf16":
            drawn[1::2] = 0x3C | (drawn[1::2] & 0x80)
        elif format == "f32":
            drawn[3::4] = 0x3C | (drawn[3::4] & 0x80)
        return drawn

    def _time_linear(self, weights: Sequence[Any], n: int, k: int, rows: int) -> float:
        # Many rows take long, and their weights are read once per call whatever the cache holds.
        used = weights if rows <= HEAD_ROWS else weights[:2]
        plan = self._plan()
        x, out = (plan.buffer(k), 0, k), (plan.buffer(n), 0, n)
        plan.write(x, self._floats(rows, k))
        for weight in used:
            plan.linear(x, out, weight)
        return self._best(plan, tokens(rows), out) / len(used)

    def attention(self, formats: Sequence["KvFormat"], rows: Sequence[int]) -> Iterator[Measured]:
        """Decode: as many requests as rows, of CONTEXT tokens. Prefill: one prompt of them."""
        w = self._widths
        shape = f"{w.num_heads}/{w.num_kv_heads} heads of {w.head_dim}"
        for format in formats:
            self._probe()
            for m in rows:
                is_prompt = m > HEAD_ROWS
                step = tokens(m) if is_prompt else decoding(m)
                pairs = m * (m + 1) // 2 if is_prompt else m * CONTEXT
                held = m if is_prompt else m * CONTEXT
                block_bytes = self._native.kv_block_bytes(
                    format, BLOCK_SIZE, w.num_kv_heads, w.head_dim, self._isa
                )
                num_bytes = block_bytes * held // BLOCK_SIZE
                seconds = self._time_attention(format, step, num_bytes, is_prompt)
                kernel = "attention, prefill" if is_prompt else f"attention, decode at {CONTEXT}"
                ops = 4 * pairs * w.num_heads * w.head_dim
                yield Measured(kernel, shape, format, m, seconds, num_bytes, ops, "bf16")

    def _time_attention(
        self,
        format: "KvFormat",
        step: Mapping[str, NDArray[np.int32]],
        num_bytes: int,
        is_prompt: bool,
    ) -> float:
        w = self._widths
        copies = 1 if is_prompt else max(1, min(MAX_COPIES, WORKING_SET // num_bytes))
        blocks = int(step["block_tables"].max()) + 1
        layers = [(w.num_kv_heads, w.head_dim)] * copies
        kv = self._native.KvArena(blocks, BLOCK_SIZE, layers, format, self._isa)
        for layer in range(copies):
            kv.blocks(layer)[:] = 0x3C  # small numbers in every format, and memory of its own
        plan = self._plan()
        width = w.num_heads * w.head_dim
        q, out = (plan.buffer(width), 0, width), (plan.buffer(width), 0, width)
        plan.write(q, self._floats(len(step["token_ids"]), width))
        for layer in range(copies):
            heads = (w.num_heads, w.num_kv_heads, w.head_dim)
            plan.attention(q, out, layer, *heads, w.head_dim**-0.5)
        return self._best(plan, step, out, kv) / copies

    def by_rows(self, rows: Sequence[int]) -> Iterator[Measured]:
        """What lies between the projections; its rows come from a cache and stay in one."""
        w = self._widths
        hidden = w.head[1]
        ones, frequencies = np.ones(hidden, np.float32), np.ones(w.head_dim // 2, np.float32)
        heads = (w.num_heads + w.num_kv_heads) * w.head_dim
        adders: dict[str, tuple[int, int, Callable[[Plan, Any, Any], int]]] = {
            "rms_norm": (hidden, hidden, lambda p, x, y: p.rms_norm(x, y, ones, 1e-6, hidden)),
            "gated_act": (2 * w.inner, w.inner, lambda p, x, y: p.gated_act(x, y, "silu")),
            "rope": (heads, heads, lambda p, x, _: p.rope(x, w.head_dim, p.rope_spec(frequencies))),
            "add": (hidden, hidden, lambda p, x, y: p.add(x, x, y)),
        }
        for kernel, (read, written, add) in adders.items():
            for m in rows:
                plan = self._plan()
                x, out = (plan.buffer(read), 0, read), (plan.buffer(written), 0, written)
                plan.write(x, self._floats(m, read))
                plan.write(out, self._floats(m, written))
                add(plan, x, out)
                seconds = self._best(plan, tokens(m), out)
                num_bytes = 4 * m * (read + written)
                yield Measured(kernel, f"{read} columns", "f32", m, seconds, num_bytes, 0, None)

    def _plan(self) -> "Plan":
        plan: Plan = self._native.Plan(self._pool, self._isa)
        return plan

    def _floats(self, rows: int, width: int) -> NDArray[np.float32]:
        return self._random.standard_normal((rows, width), np.float32)

    def _best(
        self,
        plan: "Plan",
        step: Mapping[str, Any],
        result: tuple[int, int, int],
        kv: Any = None,
    ) -> float:
        """Seconds of all operations, in the best run."""
        best, end, runs = float("inf"), time.perf_counter() + SECONDS, 0
        while runs < MIN_RUNS or time.perf_counter() < end:
            plan.run(**step, kv=kv, logits=result)
            best = min(best, sum(plan.times()[:-1]))
            runs += 1
        return best


def _ints(values: Any) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32)


def tokens(count: int) -> dict[str, NDArray[np.int32]]:
    """A step of one request's first tokens."""
    places = np.arange(count)
    return _step(places, [0, count], [count], [np.arange(-(-count // BLOCK_SIZE))])


def decoding(num_requests: int) -> dict[str, NDArray[np.int32]]:
    """A step of one token each of requests that have CONTEXT tokens; blocks lie apart."""
    per_request = CONTEXT // BLOCK_SIZE
    tables = np.arange(num_requests * per_request).reshape(per_request, num_requests).T
    positions = np.full(num_requests, CONTEXT - 1)
    return _step(positions, range(num_requests + 1), [CONTEXT] * num_requests, tables)


def _step(positions: Any, starts: Any, lengths: Any, tables: Any) -> dict[str, NDArray[np.int32]]:
    count = len(positions)
    return {
        "token_ids": np.zeros(count, np.int32),
        "positions": _ints(positions),
        "slots": np.arange(count, dtype=np.int32),
        "query_starts": _ints(starts),
        "context_lens": _ints(lengths),
        "block_tables": _ints(tables),
        "logit_rows": np.arange(count, dtype=np.int32),
    }
