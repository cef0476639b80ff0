"""What KV tiers would do for an hour of a real service: Mooncake's trace, simulated.

    python benchmarks/tiers_mooncake.py --trace mooncake_conversation.jsonl

The scheduler that ships runs the trace on hardware that is priced, with no tiers, with RAM of
several sizes, and with a disk beside it. Writes a page and a JSON document beside it; two
simulations run at a time. Needs no GPU, and no figure depends on this machine.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from in_process import machine, today
from tiers_mooncake_page import page

from duetto.measure.traces import MOONCAKE_BLOCK
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.pricing.find_hardware import find_hardware
from duetto.progress import show_progress
from duetto.simulation.report import Summary, sum_up
from duetto.simulation.simulation import simulate
from duetto.simulation.workload import Traffic, read_trace

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "tiers-mooncake.md"
TIB = 1024.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One replica, and how fast the trace comes to it."""

    name: str
    model: str
    hardware: str
    layout: Layout
    speed: float  # next to the recorded one: Mooncake's fleet had more devices
    cases: Sequence[tuple[float | None, float | None]]  # GiB of RAM and of a disk

    def with_tiers(self, ram_gib: float | None, disk_gib: float | None) -> Layout:
        return replace(self.layout, kv_offloading_size=ram_gib, kv_offloading_disk_size=disk_gib)


# Blocks of 512 tokens, as the trace tells what prompts share: smaller ones would find the same.
_LAYOUT = Layout(
    block_size=MOONCAKE_BLOCK, max_num_batched_tokens=2048, max_num_seqs=64, dtype="bfloat16"
)
SETTINGS = (
    Setting(
        "8B on an A100",
        "llama-3.1-8b",
        "a100",
        _LAYOUT,
        0.07,
        ((None, None), (128.0, None), (512.0, None), (2 * TIB, None), (128.0, 4 * TIB)),
    ),
    Setting(
        "70B on eight H100",
        "llama-3.1-70b",
        "h100",
        replace(_LAYOUT, tp=8),
        0.15,
        ((None, None), (512.0, None), (2 * TIB, None), (512.0, 8 * TIB)),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One simulation. Seconds, tokens and parts of one."""

    setting: str
    ram_gib: float | None
    disk_gib: float | None
    arena_tokens: int
    hit_rates: dict[str, float]  # of prompts' tokens, by tier
    computed_tokens: int  # of prompts
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    busy: float
    duration_s: float
    tiers: dict[str, Any] | None
    took_s: float  # this machine, to simulate it


def run_case(
    setting: Setting, case: tuple[float | None, float | None], trace: Path, count: int | None
) -> Result:
    traffic = read_trace(trace, num_requests=count).faster(setting.speed)
    layout = setting.with_tiers(*case)
    fleet = make_fleet(find_program(setting.model), find_hardware(setting.hardware), layout)
    start = perf_counter()
    summary = sum_up(simulate(traffic, fleet), fleet.num_devices, percentiles=(50.0, 99.0))
    config = fleet.replica.scheduler
    return result_of(
        setting, case, summary, config.num_blocks * config.block_size, perf_counter() - start
    )


def result_of(
    setting: Setting,
    case: tuple[float | None, float | None],
    summary: Summary,
    arena_tokens: int,
    took_s: float,
) -> Result:
    report, tiers = summary.report, summary.tiers
    assert not report.num_failed, "a request did not fit"
    rates = {"arena": report.num_cached_tokens / report.num_input_tokens}
    return Result(
        setting=setting.name,
        ram_gib=case[0],
        disk_gib=case[1],
        arena_tokens=arena_tokens,
        hit_rates=rates if tiers is None else tiers.hit_rates,
        computed_tokens=report.num_input_tokens - report.num_cached_tokens,
        ttft_p50=report.ttft.percentiles[50.0] or 0.0,
        ttft_p99=report.ttft.percentiles[99.0] or 0.0,
        tpot_p50=report.tpot.percentiles[50.0] or 0.0,
        busy=summary.pools["serve"].busy,
        duration_s=report.duration_s,
        tiers=None if tiers is None else tiers.as_json(),
        took_s=took_s,
    )


def ceiling(traffic: Traffic) -> float:
    """The part of prompts' tokens that came before at the same place behind the same: what a cache
    without end would find, in whole blocks, of which a prompt's last token is never one."""
    seen: set[int] = set()
    num_found = 0
    for arrival in traffic.arrivals:
        most = (arrival.num_prompt_tokens - 1) // MOONCAKE_BLOCK
        ids = arrival.hash_ids[:most]
        found = next((n for n, each in enumerate(ids) if each not in seen), len(ids))
        num_found += found * MOONCAKE_BLOCK
        seen.update(arrival.hash_ids[: arrival.num_prompt_tokens // MOONCAKE_BLOCK])
    return num_found / sum(arrival.num_prompt_tokens for arrival in traffic.arrivals)


def measure(options: Namespace) -> list[Result]:
    jobs = [(setting, case) for setting in SETTINGS for case in setting.cases]
    with (
        ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
        show_progress("simulations", total=len(jobs)) as bar,
    ):
        futures = [pool.submit(run_case, *job, options.trace, options.num_prompts) for job in jobs]
        results = []
        for future in futures:
            results.append(future.result())
            bar.advance()
    return results


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's JSON lines")
    parser.add_argument("--num-prompts", type=int, help="the first ones only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args()
    traffic = read_trace(options.trace, num_requests=options.num_prompts)
    about = {
        "date": today(),
        "machine": machine(),
        "num_requests": len(traffic.arrivals),
        "prompt_tokens": sum(a.num_prompt_tokens for a in traffic.arrivals),
        "trace_s": traffic.arrivals[-1].arrival_s,
        "ceiling": ceiling(traffic),
        "settings": {
            each.name: {
                "model": each.model,
                "hardware": each.hardware,
                "speed": each.speed,
                "layout": each.layout.on_devices(find_hardware(each.hardware)),
            }
            for each in SETTINGS
        },
    }
    found: dict[str, Any] = about | {"results": [asdict(each) for each in measure(options)]}
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.write_text(page(found), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
