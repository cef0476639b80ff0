"""Where the time of a decode step goes, in parts that add up to it.

    python benchmarks/step_breakdown.py MODEL [--quantization int8] [--batch 1] [--steps 100]

Runs requests on the cpu backend in this process until all of them decode, then times `--steps`
steps of the engine. Native time is the plan's own clock, operation by operation; the others are
functions of the engine, timed from outside. "rest" is what no part claims, so that the parts
add up to the wall time of a step. As many steps run before without those clocks, which cost time
too: "not native" is told of both. Means are over the faster half of the steps: what
else runs on the machine is not the subject. The last line of stdout is one JSON document.
"""

import argparse
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from in_process import machine, markdown_table, today

from duetto.backends.cpu.backend import CpuBackend
from duetto.build import Built, build
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import Engine
from duetto.program.op import Op
from duetto.program.ops import GatedAct, Linear, RmsNorm
from duetto.program.rewrites.fuse import FusedLinear
from duetto.runner import model_runner, verify

WARM_UP = 5  # steps
PARTS = ("schedule", "predict", "arrays", "call", "sample", "execute", "update", "detokenize")
PARTS = (*PARTS, "record", "learn", "rest")


class Clock:
    """Seconds by part. A part that runs within another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of each part under way, what parts within it took

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = perf_counter() - start
                self.seconds[part] += whole - self._inner.pop()
                self._inner[-1] += whole

        return call


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--packed-cache", default="auto")
    options = parser.parse_args(words)
    args = EngineArgs(
        backend="cpu",
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        threads=options.threads,
        packed_cache=options.packed_cache,
        max_num_seqs=options.batch,
        max_model_len=options.prompt + 2 * options.steps + WARM_UP + 3,
        enable_prefix_caching=False,
    )
    where, built = machine(), build(options.model, args)
    bare, steps = measure(built, options.batch, options.prompt, options.steps)
    parts = mean_of_faster_half(steps)
    total = sum(parts.values())
    native = sum(seconds for part, seconds in parts.items() if part.startswith("native: "))
    outside = share_of(mean_of_faster_half(bare), "not native")
    rows = [
        (part, f"{1e6 * seconds:.1f}", f"{seconds / total:.2%}") for part, seconds in parts.items()
    ]
    rows.append(("a step", f"{1e6 * total:.1f}", "100.00%"))
    print(markdown_table(("part", "us a step", "share"), rows))
    print(f"not native: {outside:.2%} (with the clocks of this table {1 - native / total:.2%})")
    print(f"{options.model.name}, {options.quantization}, B={options.batch}; {where}; {today()}")
    shares = {part: seconds / total for part, seconds in parts.items()}
    print(json.dumps({"step_s": total, "not_native": outside, "shares": shares}))


def mean_of_faster_half(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    faster = sorted(steps, key=lambda parts: sum(parts.values()))[: (len(steps) + 1) // 2]
    return {part: sum(parts[part] for parts in faster) / len(faster) for part in faster[0]}


def share_of(parts: dict[str, float], part: str) -> float:
    return parts[part] / sum(parts.values())


def measure(
    built: Built, batch: int, prompt: int, num_steps: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Seconds of `num_steps` steps, native and not, and by part of as many after them."""
    engine, clock = built.engine, Clock()
    backend = built.model.runner.backend
    assert isinstance(backend, CpuBackend)
    _add_requests(engine, built, batch, prompt, 2 * num_steps)
    while any(r.num_uncomputed_tokens > 1 for r in _requests(engine)) or engine.scheduler.waiting:
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    gc.collect()
    gc.freeze()  # as `duetto serve` does once it has loaded

    bare = []
    for _ in range(num_steps):
        start = perf_counter()
        engine.step()
        whole_s, native_s = perf_counter() - start, sum(backend.times())
        bare.append({"native": native_s, "not native": whole_s - native_s})

    _instrument(engine, backend, clock)
    step = clock.timed("rest", engine.step)
    found = []
    for _ in range(num_steps):
        clock.seconds.clear()
        step()
        *times, outside = backend.times()
        native: dict[str, float] = defaultdict(float)
        for operation, seconds in zip(backend.steps, times, strict=True):
            native[f"native: {_name(operation)}"] += seconds
        native["native: between operations"] = outside
        clock.seconds["call"] -= sum(native.values())
        found.append({part: clock.seconds[part] for part in PARTS} | native)
    return bare, found


def _instrument(engine: Engine, backend: CpuBackend, clock: Clock) -> None:
    """Replace functions by timed ones, in this process only."""
    scheduler: Any = engine.scheduler
    scheduler.schedule = clock.timed("schedule", scheduler.schedule)
    scheduler.update = clock.timed("update", scheduler.update)
    anything: Any = engine
    anything._with_text = clock.timed("detokenize", anything._with_text)
    anything._record = clock.timed("record", anything._record)
    times: Any = anything._step_times
    times.step_time = clock.timed("predict", times.step_time)
    times.observe = clock.timed("learn", times.observe)
    executor: Any = anything._computer._executor
    executor.submit = clock.timed("execute", executor.submit)
    modules: Any = model_runner
    modules.build_step_arrays = clock.timed("arrays", modules.build_step_arrays)
    modules = verify
    modules.sample_token = clock.timed("sample", modules.sample_token)
    anything = backend
    anything.run = clock.timed("call", backend.run)


def _name(step: Op) -> str:
    """A kind of operation; a projection with what it makes of its input."""
    if isinstance(step, FusedLinear):
        before = {RmsNorm: "norm, ", GatedAct: "activation, "}[type(step.before)]
        return f"{before}linear" + (", +=" if step.linear.accumulate else "")
    if isinstance(step, Linear):
        return "linear" + (", +=" if step.accumulate else "")
    return type(step).__name__


def _add_requests(engine: Engine, built: Built, batch: int, prompt: int, num_steps: int) -> None:
    random = np.random.default_rng(0)
    num_output = num_steps + WARM_UP + 2
    for index in range(batch):
        engine.add(
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(random.integers(0, built.codec.vocab_size, prompt).tolist()),
                sampling=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
                max_tokens=num_output,
                seed=0,
                arrival_time=0.0,
            )
        )


def _requests(engine: Engine) -> list[Request]:
    return list(engine.scheduler.running.values())


if __name__ == "__main__":
    main()
