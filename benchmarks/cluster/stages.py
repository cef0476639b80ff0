"""How long do the stages of a pipeline wait, against the closed form?

    python benchmarks/cluster/stages.py
    python benchmarks/cluster/stages.py --stages 2 --rounds 3 --tokens 256

A random model of 134 million numbers is cut into stages (`--pp`), each a process with one thread on
a core of its own. m micro-batches of equal chunks of prompts are submitted at once, each over KV of
its own, and go through all stages. Between the first submission and the last result each stage has
computed for some seconds, which it tells; the rest it waited. For p equal stages the share of
waiting is (p - 1) / (m + p - 1). Then the same chunks go through one process with as many threads,
one after the other. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from shape import SHAPE

from duetto.backends.backend import StepArrays
from duetto.backends.parts.backend import PartsBackend
from duetto.core.engine_args import EngineArgs
from duetto.models.make_model import make_model
from duetto.models.programs import load_program
from duetto.runner.load import hold

MICRO_BATCHES = (1, 2, 4, 8)
BLOCK_SIZE = 32


def chunk_of(num_tokens: int) -> StepArrays:
    """A prompt's first tokens, and the logits of the last one."""
    places = np.arange(num_tokens, dtype=np.int32)
    tables = np.arange(-(-num_tokens // BLOCK_SIZE), dtype=np.int32)[None]
    return StepArrays(
        token_ids=(places * 7919) % 32000,
        positions=places,
        slots=places,
        query_starts=np.array([0, num_tokens], np.int32),
        context_lens=np.array([num_tokens], np.int32),
        block_tables=tables,
        logit_rows=np.array([num_tokens - 1], np.int32),
    )


def load(model_dir: Path, num_stages: int, num_threads: int) -> Any:
    args = EngineArgs(
        backend="cpu",
        dtype="bfloat16",
        pipeline_parallel_size=num_stages,
        threads=num_threads,
        packed_cache="off",
    )
    config, program = load_program(model_dir)
    return hold(config, program, args).loader.load(program, model_dir, None)


def together(backend: Any, step: StepArrays, arenas: list[Any]) -> float:
    """Seconds in which a step runs over each arena, all submitted at once."""
    with ThreadPoolExecutor(len(arenas)) as threads:
        start = time.perf_counter()
        list(threads.map(lambda kv: backend.run(step, kv), arenas))
        return time.perf_counter() - start


def one_after_another(backend: Any, step: StepArrays, kv: Any, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        backend.run(step, kv)
    return time.perf_counter() - start


def waits_of(backend: PartsBackend, step: StepArrays, arenas: list[Any]) -> dict[str, Any]:
    """One round."""
    before = backend.host.busy_s()
    wall = together(backend, step, arenas)
    busy = [now - then for now, then in zip(backend.host.busy_s(), before, strict=True)]
    return {"wall_s": wall, "busy_s": busy, "waits": 1 - sum(busy) / (len(busy) * wall)}


def measure(model_dir: Path, num_stages: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    step = chunk_of(num_tokens)
    num_blocks = step.block_tables.shape[1]
    stages = load(model_dir, num_stages, num_stages)
    one = load(model_dir, 1, num_stages)
    found = {}
    try:
        arenas = [
            stages.allocate_kv(num_blocks, BLOCK_SIZE, "float32") for _ in range(max(MICRO_BATCHES))
        ]
        alone = one.allocate_kv(num_blocks, BLOCK_SIZE, "float32")
        logits = [backend.run(step, kv) for backend, kv in ((stages, arenas[0]), (one, alone))]
        np.testing.assert_array_equal(*logits)  # warm, and the same bits
        for count in MICRO_BATCHES:
            own = [waits_of(stages, step, arenas[:count]) for _ in range(rounds)]
            threads_s = min(one_after_another(one, step, alone, count) for _ in range(rounds))
            best = min(own, key=lambda each: each["wall_s"])  # others may use the machine, too
            waits = best["waits"]
            closed = (num_stages - 1) / (count + num_stages - 1)
            found[count] = {
                "waits": waits,
                "closed_form": closed,
                "relative": waits / closed - 1,
                "wall_s": best["wall_s"],
                "busy_s": best["busy_s"],
                "one_process_s": threads_s,
            }
            say(count, found[count])
    finally:
        stages.close()
    return found


def say(count: int, row: dict[str, Any]) -> None:
    print(
        f"  {count} micro-batches: wait {row['waits']:6.1%}, closed form "
        f"{row['closed_form']:6.1%} ({row['relative']:+.1%}); {row['wall_s']:.3f} s, in one "
        f"process {row['one_process_s']:.3f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{given.stages} stages, chunks of {given.tokens} tokens, best of {given.rounds} rounds")
    with TemporaryDirectory() as name:
        model_dir = Path(name) / "model"
        make_model(SHAPE, model_dir, dtype="bfloat16", repeats=True)
        found = measure(model_dir, given.stages, given.tokens, given.rounds)
    about = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "stages": given.stages,
        "tokens": given.tokens,
        "rounds": given.rounds,
    }
    print(json.dumps(about | {"micro_batches": found}))


if __name__ == "__main__":
    main()
