"""Where ITL and TPOT disagree, from recorded runs; writes the table into docs/metrics.md.

    python benchmarks/metrics_disagree.py

Each scenario is a workload of a few requests on a tiny model, run several times; the table holds
medians over the repetitions. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from in_process import loaded_model, machine, markdown_table, new_engine, run_workload, today
from numpy.random import default_rng

from duetto.build import Built
from duetto.core.engine_args import EngineArgs
from duetto.measure.metrics import distribution
from duetto.measure.records import RequestRecord
from duetto.measure.workload import Workload, WorkloadRequest

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

COLUMNS = {
    "ttft_p50": "TTFT p50",
    "itl_p50": "ITL p50",
    "itl_p99": "ITL p99",
    "itl_max": "ITL max",
    "itl_mean": "ITL mean",
    "tpot_p50": "TPOT p50",
    "tpot_mean": "TPOT mean",
    "e2e_per_token": "E2E/n",
}


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    workload: Workload
    args: EngineArgs
    first: int = 0  # the requests that are measured: from this one ...
    last: int | None = None  # ... to before this one


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(default_rng(seed).integers(256, size=length).tolist())


def asked(
    length: int, num_output_tokens: int, seed: int, arrival_s: float = 0.0
) -> WorkloadRequest:
    return WorkloadRequest(
        prompt_token_ids=prompt(length, seed),
        num_output_tokens=num_output_tokens,
        arrival_s=arrival_s,
    )


def scenarios() -> list[Scenario]:
    args = EngineArgs(max_num_seqs=16)
    whole = replace(args, enable_chunked_prefill=False)
    four = [asked(32, 96, seed) for seed in range(4)]
    late = [asked(1200, 2, 9, arrival_s=0.1)]
    eight = [asked(64, 48, seed) for seed in range(8)]
    long_and_short = [asked(32, 192, 0), *(asked(32, 8, seed) for seed in range(1, 8))]
    return [
        Scenario("steady: one request alone", Workload((asked(32, 96, 0),)), args),
        Scenario(
            "uneven speed: four run, a prompt of 1200 arrives, whole",
            Workload((*four, *late)),
            whole,
            last=4,
        ),
        Scenario("the same, in chunks of 512", Workload((*four, *late)), args, last=4),
        Scenario("late first token: eight, all run", Workload(tuple(eight)), args),
        Scenario("the same, two may run", Workload(tuple(eight)), replace(args, max_num_seqs=2)),
        Scenario("batch: one of 192 tokens, seven of 8", Workload(tuple(long_and_short)), args),
        Scenario("long sequence: one of 600 tokens", Workload((asked(32, 600, 0),)), args),
        Scenario("cache: a prompt of 1024, first time", Workload((asked(1024, 32, 1),)), args),
        Scenario(
            "the same prompt again",
            Workload((asked(1024, 32, 1), asked(1024, 32, 1, arrival_s=1.0))),
            args,
            first=1,
        ),
    ]


def numbers_of(records: Sequence[RequestRecord]) -> dict[str, float]:
    """The columns, in seconds."""
    itl = distribution([gap for r in records for gap in r.itl_s])
    tpot = distribution([r.tpot_s for r in records if r.tpot_s is not None])
    ttft = distribution([r.ttft_s for r in records if r.ttft_s is not None])
    found = {
        "ttft_p50": ttft.median,
        "itl_p50": itl.median,
        "itl_p99": itl.percentiles[99.0],
        "itl_max": itl.max,
        "itl_mean": itl.mean,
        "tpot_p50": tpot.median,
        "tpot_mean": tpot.mean,
        "e2e_per_token": statistics.mean(r.e2e_s / r.num_output_tokens for r in records),
    }
    return {name: value for name, value in found.items() if value is not None}


def measure(built: Built, repetitions: int) -> dict[str, dict[str, float]]:
    """Medians over repetitions; scenarios take turns within each."""
    chosen = scenarios()
    found: dict[str, list[dict[str, float]]] = {scenario.name: [] for scenario in chosen}
    run_workload(new_engine(built, chosen[0].args), chosen[0].workload)  # warm-up
    for _ in range(repetitions):
        for scenario in chosen:
            run = run_workload(new_engine(built, scenario.args), scenario.workload)
            found[scenario.name].append(numbers_of(run.in_order()[scenario.first : scenario.last]))
    return {
        name: {key: statistics.median(each[key] for each in runs) for key in COLUMNS}
        for name, runs in found.items()
    }


def section(results: dict[str, dict[str, float]], repetitions: int, where: str) -> str:
    rows = [
        [name, *(f"{numbers[key] * 1000:.2f}" for key in COLUMNS)]
        for name, numbers in results.items()
    ]
    return f"""{BEGIN}
Written by `benchmarks/metrics_disagree.py` on {today()}, medians of {repetitions} runs, in
milliseconds. A tiny random model on the reference backend.
Machine: {where}.

{markdown_table(["scenario", *COLUMNS.values()], rows)}
{END}"""


def with_section(page: str, new: str) -> str:
    """The page with what stands between the markers replaced. Raises ValueError without them."""
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return before + new + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--page", type=Path, default=PAGE)
    options, where = parser.parse_args(), machine()
    with loaded_model(None, EngineArgs()) as built:
        results = measure(built, options.repetitions)
    page = options.page.read_text(encoding="utf-8")
    new = with_section(page, section(results, options.repetitions, where))
    options.page.write_text(new, encoding="utf-8")
    print(f"wrote {options.page.name}")
    print(json.dumps({"benchmark": "metrics_disagree", "date": today(), "results": results}))


if __name__ == "__main__":
    main()
