"""Static and continuous batching, chunked prefill and not, prefix cache on and off: one workload.

    make bench            (or: python benchmarks/scheduling.py --help)

Each configuration runs the same seeded workload twice: once with all requests at once, which gives
its throughput, and once at a fixed rate of arrivals, which gives its latencies. The rate is a part
of the throughput that the default configuration has on this machine. Configurations take turns
within each repetition, so that a slow minute of the machine hits all of them; the table holds
medians over repetitions. Writes a page of Markdown; the last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from in_process import (
    KVUse,
    Run,
    check_same_answers,
    loaded_model,
    machine,
    markdown_table,
    new_engine,
    run_workload,
    today,
)

from duetto.build import Built
from duetto.core.engine_args import EngineArgs
from duetto.measure.arrivals import at_rate
from duetto.measure.metrics import summarize
from duetto.measure.workload import Lengths, SharedPrefixes, Workload, random_workload
from duetto.progress import show_progress

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "scheduling.md"
DEFAULT = "continuous, chunked, cache"


@dataclass(frozen=True, slots=True)
class Result:
    """One configuration in one repetition. Seconds and tokens."""

    output_tokens_per_s: float  # all requests at once
    requests_per_s: float
    ttft_p50: float  # at the fixed rate, from here on
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    worst_gap: float
    tpot_p50: float
    cached_fraction: float  # of prompt tokens
    steps: float


@dataclass(frozen=True, slots=True)
class Measured:
    results: Mapping[str, Result]  # medians, by configuration
    kv: Sequence[KVUse]  # of the default configuration, all at once, every step
    rate: float  # requests per second


def configurations(args: EngineArgs) -> dict[str, EngineArgs]:
    static = replace(args, scheduling_policy="static")
    whole = replace(args, enable_chunked_prefill=False, max_num_batched_tokens=None)
    cold = replace(args, enable_prefix_caching=False)
    return {
        DEFAULT: args,
        "static batching": static,
        "whole prompts": whole,
        "no prefix cache": cold,
        "none of the three": replace(
            whole, scheduling_policy="static", enable_prefix_caching=False
        ),
    }


def make_workload(options: argparse.Namespace) -> Workload:
    return random_workload(
        options.num_requests,
        input_lengths=Lengths(160, "lognormal", 1.0, maximum=1200),
        output_lengths=Lengths(48, "lognormal", 0.8, maximum=256),
        prefixes=SharedPrefixes(length=256, count=4),
        vocab_size=256,
        seed=options.seed,
    )


def measure(built: Built, args: EngineArgs, options: argparse.Namespace) -> Measured:
    workload, configs = make_workload(options), configurations(args)
    run_workload(new_engine(built, args), workload)  # warm-up: imports, caches, page faults
    first = run_workload(new_engine(built, args), workload)
    rate = options.load * len(workload.requests) / first.duration_s
    timed = at_rate(workload, rate, seed=options.seed)
    found: dict[str, list[Result]] = {name: [] for name in configs}
    num_runs = options.repetitions * len(configs)
    with show_progress("runs", total=num_runs) as bar:
        for repetition in range(options.repetitions):
            names = list(configs) if repetition % 2 == 0 else list(reversed(configs))
            for name in names:
                at_once = run_workload(new_engine(built, configs[name]), workload)
                in_time = run_workload(new_engine(built, configs[name]), timed)
                check_same_answers([first, at_once, in_time])
                found[name].append(result_of(at_once, in_time))
                bar.advance()
    medians = {name: median_result(results) for name, results in found.items()}
    return Measured(medians, first.kv, rate)


def result_of(at_once: Run, in_time: Run) -> Result:
    fast = summarize(at_once.in_order(), at_once.duration_s)
    user = summarize(in_time.in_order(), in_time.duration_s)
    return Result(
        output_tokens_per_s=fast.per_second(fast.num_output_tokens),
        requests_per_s=fast.per_second(fast.num_ok),
        ttft_p50=user.ttft.percentiles[50.0] or 0.0,
        ttft_p99=user.ttft.percentiles[99.0] or 0.0,
        itl_p50=user.itl.percentiles[50.0] or 0.0,
        itl_p99=user.itl.percentiles[99.0] or 0.0,
        worst_gap=user.itl.max or 0.0,
        tpot_p50=user.tpot.percentiles[50.0] or 0.0,
        cached_fraction=user.num_cached_tokens / user.num_input_tokens,
        steps=float(len(in_time.steps)),
    )


def median_result(results: Sequence[Result]) -> Result:
    columns = zip(*(asdict(result).values() for result in results), strict=True)
    return Result(*(statistics.median(column) for column in columns))


def speed_table(results: Mapping[str, Result]) -> str:
    header = ["configuration", "output tok/s", "req/s", "TTFT p50", "TTFT p99", "ITL p50"]
    header += ["ITL p99", "worst gap", "TPOT p50", "cached"]
    rows = []
    for name, r in results.items():
        times = (r.ttft_p50, r.ttft_p99, r.itl_p50, r.itl_p99, r.worst_gap, r.tpot_p50)
        rates = [f"{r.output_tokens_per_s:.0f}", f"{r.requests_per_s:.1f}"]
        milliseconds = [f"{time * 1000:.1f}" for time in times]
        rows.append([name, *rates, *milliseconds, f"{r.cached_fraction:.0%}"])
    return markdown_table(header, rows)


def ratio_table(results: Mapping[str, Result]) -> str:
    names = ["output_tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "worst_gap"]
    base = asdict(results[DEFAULT])
    rows = [
        [name, *(f"{asdict(result)[key] / base[key]:.2f}" for key in names)]
        for name, result in results.items()
    ]
    header = ["÷ default", "output tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"]
    return markdown_table([*header, "worst gap"], rows)


def kv_numbers(kv: Sequence[KVUse]) -> dict[str, float]:
    """Means over the steps after which anything ran, and the highest of each."""
    busy = [use for use in kv if use.num_running]
    numbers: dict[str, float] = {}
    for name in ("reserved_model", "reserved_request", "in_tables", "held"):
        values = [getattr(use, name) for use in busy]
        numbers[f"mean_{name}"] = statistics.mean(values)
        numbers[f"max_{name}"] = max(values)
    tables = sum(use.in_tables for use in busy)
    numbers["unused_fraction"] = sum(use.unused for use in busy) / tables
    return numbers


def kv_table(kv: Mapping[str, float]) -> str:
    labels = {
        "reserved_model": "reserve max_model_len for each request",
        "reserved_request": "reserve its prompt and max_tokens for each",
        "in_tables": "blocks as tokens come, nothing shared",
        "held": "blocks as tokens come, prefixes shared (Duetto)",
    }
    rows = [
        [
            label,
            f"{kv[f'mean_{name}']:.0f}",
            f"{kv[f'max_{name}']:.0f}",
            f"{kv[f'mean_{name}'] / kv['mean_reserved_model']:.1%}",
        ]
        for name, label in labels.items()
    ]
    return markdown_table(["KV memory, in tokens", "mean", "highest", "of the first"], rows)


def page(measured: Measured, built: Built, options: argparse.Namespace, where: str) -> str:
    kv = kv_numbers(measured.kv)
    config = built.scheduler_config
    bytes_per_token = built.model.kv_memory_bytes // (config.num_blocks * config.block_size)
    return f"""# Scheduling, measured

Written by `benchmarks/scheduling.py` on {today()}; do not edit.
Machine: {where}.
Model: {built.name}, {built.model.program.num_parameters:,} parameters, {built.model.dtype},
{built.model.backend} backend.

One workload in every configuration: {options.num_requests} requests (seed {options.seed}). Prompts
are one of 4 shared prefixes of 256 tokens and then 160 on average (lognormal, sigma 1, at most
1200); answers are 48 on average (lognormal, sigma 0.8, at most 256), greedy. At most
{config.max_num_seqs} requests run at a time, {config.max_num_batched_tokens} tokens a step (whole
prompts: {config.max_model_len}, as the longest must fit), blocks of {config.block_size} tokens.
The answers of all runs were compared: every token is the same.

Medians of {options.repetitions} repetitions in which the configurations take turns. Throughput:
all requests at once. Latencies: Poisson arrivals at {measured.rate:.1f} requests/s, which is
{options.load:.0%} of the default's throughput; in milliseconds, from the scheduled arrival, as
[metrics.md](../metrics.md) defines them. Each line differs from the first in what it names; the
last one in all three.

{speed_table(measured.results)}

{ratio_table(measured.results)}

How to read it. The rate of arrivals is the same for all, so a configuration whose throughput lies
below it builds a queue, and its TTFT then tells the length of the run more than the quality of the
policy. Static batching starts nobody before the longest answer of a batch has ended: its TTFT is
mostly waiting, and its gaps can be smaller because no new prompt joins a batch that runs. Whole
prompts are computed in one step each, which every running answer waits for: look at the worst gap.
The reference backend computes row by row, so a step costs nearly in proportion to its tokens and a
large batch gains less than on hardware that is bound by memory: these are ratios of scheduling on
this backend, not of a GPU. Nor is a fraction of the roofline given: the time of numpy's steps is
Python's, not the machine's.

## The memory that paging saves

Default configuration, all requests at once, after each of {len(measured.kv)} steps. A token of
this model has {bytes_per_token} bytes of KV ({built.model.kv_dtype}).

{kv_table(kv)}

Within the blocks of a request, {kv["unused_fraction"]:.1%} of the slots lie beyond its tokens: the
unfilled end of its last block, which is all that a block table wastes.

## Again

```sh
make bench
python benchmarks/scheduling.py --model path/to/checkpoint --num-requests 16 --repetitions 1
```
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny random one")
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.7, help="of the default's throughput")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def main() -> None:
    options, where = parse_options(), machine()
    args = EngineArgs(max_num_seqs=options.max_num_seqs, target_itl="off")
    with loaded_model(options.model, args) as built:
        measured = measure(built, args, options)
        options.output.write_text(page(measured, built, options, where), encoding="utf-8")
    document = {
        "benchmark": "scheduling",
        "date": today(),
        "machine": where,
        "requests_per_s": measured.rate,
        "results": {name: asdict(result) for name, result in measured.results.items()},
        "kv_tokens": kv_numbers(measured.kv),
    }
    print(f"wrote {options.output.name}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
