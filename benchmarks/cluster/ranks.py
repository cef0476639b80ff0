"""What do two ranks cost that meet in shared memory, against two threads of one process?

    python benchmarks/cluster/ranks.py
    python benchmarks/cluster/ranks.py --rounds 3 --quantization int8

A random model of 134 million numbers runs in two ways on the same two cores: in one process with
two threads, and as two ranks (`--tp 2`), each a process with one thread on a core of its own.
They take turns, round by round. A step is a decode of 1 or 8 requests behind 256 tokens, or a
prefill of 512 tokens. Of ranks it is told how long the first one spent in collectives (copying,
waiting for the other, adding up), and how long the sums alone take, one behind the other, where
nobody waits for work. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from shape import SHAPE

from duetto.backends.backend import StepArrays
from duetto.backends.cpu.native import native
from duetto.models.make_model import make_model
from duetto.models.programs import load_program
from duetto.program.rewrites.shard import shard
from duetto.runner.loaders import CpuLoader

BLOCK_SIZE, NUM_BLOCKS, BEHIND = 32, 8 * 16, 256
STEPS = {"decode 1": (1, 1, 40), "decode 8": (8, 1, 20), "prefill 512": (1, 512, 3)}  # times
WHOLE = -1


def ints(numbers: Any) -> Any:
    return np.asarray(numbers, np.int32)


def step_of(num_requests: int, num_tokens: int) -> StepArrays:
    """Each request's next tokens, behind BEHIND others if it is a decode."""
    past = BEHIND if num_tokens == 1 else 0
    positions = np.tile(np.arange(past, past + num_tokens), num_requests)
    tables = np.arange(num_requests * 16).reshape(num_requests, 16)
    requests = np.repeat(np.arange(num_requests), num_tokens)
    slots = tables[requests, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    ends = np.arange(1, num_requests + 1) * num_tokens
    return StepArrays(
        token_ids=ints(positions * 7 % SHAPE["vocab_size"]),
        positions=ints(positions),
        slots=ints(slots),
        query_starts=ints([0, *ends]),
        context_lens=ints([past + num_tokens] * num_requests),
        block_tables=ints(tables),
        logit_rows=ints(ends - 1),
    )


def sums_alone(pool: Any, member: Any, step: StepArrays) -> float:
    """Seconds of one sum of as many numbers as a layer's, of many behind each other."""
    plan, width, count = (
        native.Plan(pool, native.choose_isa(None), member),
        SHAPE["hidden_size"],
        40,
    )
    x = (plan.buffer(width), 0, width)
    plan.write(x, np.zeros((len(step.token_ids), width), np.float32))
    for _ in range(count):
        plan.all_reduce(x)
    plan.run(*step, None, x)
    plan.run(*step, None, x)
    return statistics.median(plan.times()[:count])


# -- one process -----------------------------------------------------------------------------------


def serve(model_dir: Path, rank: int, descriptor: int, cores: Sequence[int], how: Any) -> None:
    """Runs what the lines of stdin name, and says how long each step took."""
    os.sched_setaffinity(0, cores)
    _, whole = load_program(model_dir)
    own, member = whole, None
    if rank != WHOLE:
        group = native.Group.open(descriptor)
        own, member = shard(whole, group.ranks, rank), native.Member(group, rank)
    loader = CpuLoader(
        own,
        "bfloat16",
        how,
        (),
        threads=len(cores),
        cache_dir=None,
        whole=None if rank == WHOLE else whole,
        member=member,
    )
    backend = loader.load(own, model_dir, None)
    kv = backend.allocate_kv(NUM_BLOCKS, BLOCK_SIZE, "bfloat16")
    collectives = [i for i, op in enumerate(backend.steps) if op.kind == "collective"]
    print("ready", flush=True)
    for line in sys.stdin:
        *sizes, times = STEPS[line.strip()]
        step, told = step_of(*sizes), []
        for _ in range(times):
            start = time.perf_counter()
            backend.run(step, kv)
            spent = time.perf_counter() - start
            seconds = backend.times()
            told.append((spent, sum(seconds[i] for i in collectives)))
        alone = 0.0 if member is None else sums_alone(native.Pool(len(cores)), member, step)
        print(
            json.dumps({"steps": told, "collectives": len(collectives), "alone": alone}), flush=True
        )


class Child:
    def __init__(self, model_dir: Path, rank: int, group: Any, cores: list[int], how: str) -> None:
        part = [str(rank), str(group.descriptor), ",".join(map(str, cores))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--quantization", how, "--part", str(model_dir), *part],
            pass_fds=[group.descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a part has ended")
        return line

    def start(self, what: str) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


# -- both ways -------------------------------------------------------------------------------------


def measure(model_dir: Path, rounds: int, how: str) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    group = native.Group(2)
    one = [Child(model_dir, WHOLE, group, cores, how)]
    two = [Child(model_dir, rank, group, [core], how) for rank, core in enumerate(cores)]
    told: dict[str, dict[str, list[Any]]] = {"threads": {}, "ranks": {}}
    num_collectives, alone = 0, {what: [] for what in STEPS}
    try:
        for child in one + two:
            child.wait()
        for _ in range(rounds):
            for what in STEPS:
                for way, children in (("threads", one), ("ranks", two)):
                    for child in children:
                        child.start(what)
                    found, *_ = [json.loads(child.wait()) for child in children]
                    told[way].setdefault(what, []).extend(found["steps"])
                    num_collectives = found["collectives"]
                alone[what].append(found["alone"])  # the ranks'
    finally:
        for child in one + two:
            child.end()
    return {
        what: figures(told["threads"][what], told["ranks"][what], num_collectives)
        | {"us_of_a_sum_alone": round(1e6 * statistics.median(alone[what]), 1)}
        for what in STEPS
    }


def figures(threads: list[Any], ranks: list[Any], num_collectives: int) -> dict[str, Any]:
    """Of the median step; and of the best, which others on the machine have disturbed least."""
    found: dict[str, Any] = {"collectives": num_collectives}
    for name, place in (("median", len(ranks) // 2), ("best", 0)):
        one, (two, meeting) = sorted(threads)[place][0], sorted(ranks)[place]
        found[name] = {
            "threads_ms": round(1000 * one, 3),
            "ranks_ms": round(1000 * two, 3),
            "ranks_over_threads": round(two / one, 3),
            "in_collectives_ms": round(1000 * meeting, 3),
            "in_collectives": round(meeting / two, 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", choices=["none", "int8", "int4"], default="none")
    parser.add_argument("--model", type=Path, help="a checkpoint of the shape, kept")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    how = None if args.quantization == "none" else args.quantization
    if args.part:
        model_dir, rank, descriptor, cores = args.part
        serve(Path(model_dir), int(rank), int(descriptor), [*map(int, cores.split(","))], how)
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two ranks need two cores; this process may use one")
    with TemporaryDirectory() as name:
        model_dir = args.model or Path(name) / "model"
        if not (model_dir / "config.json").exists():
            print(f"making a random model in {model_dir}", file=sys.stderr)
            make_model(SHAPE, model_dir, dtype="bfloat16", repeats=True)
        found = measure(model_dir, args.rounds, args.quantization)
    for what, each in found.items():
        for name in ("median", "best"):
            own = each[name]
            print(
                f"{what:12} {name:7} {own['threads_ms']:8.2f} ms with 2 threads, "
                f"{own['ranks_ms']:8.2f} ms with 2 ranks ({own['ranks_over_threads']:.2f} x), "
                f"{own['in_collectives_ms']:.2f} ms of it in {each['collectives']} collectives"
            )
        print(f"{what:12} a sum alone takes {each['us_of_a_sum_alone']} us")
    machine = {"machine": platform.machine(), "isa": native.choose_isa(None)}
    print(json.dumps({"quantization": args.quantization, **machine, "steps": found}))


if __name__ == "__main__":
    main()
