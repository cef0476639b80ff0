"""benchmarks/tiers_mooncake.py on a small trace: what it finds, and that it makes a page."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tiers_mooncake import SETTINGS, ceiling, run_case
from tiers_mooncake_page import page

from duetto.simulation.workload import read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Six conversations, in any order, of blocks that nobody else has."""
    rng, lines = Random(1), []
    said: list[list[int]] = [[] for _ in range(6)]
    for number in range(40):
        own = rng.choice(said)
        own += range(20 * number, 20 * number + rng.randint(2, 12))
        length = 512 * len(own) - rng.randint(1, 500)
        row = {"timestamp": 3000 * number, "input_length": length, "output_length": 4}
        lines.append(json.dumps(row | {"hash_ids": own}))
        own[:] = own[:-1] if len(own) < 60 else []  # the last one is not whole
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_enough_ram_finds_all_that_came_before(trace: Path) -> None:
    small = replace(SETTINGS[0].layout, kv_cache_memory_bytes=6 * 2**30)
    setting = replace(SETTINGS[0], layout=small, speed=1.0)
    results = [run_case(setting, case, trace, None) for case in ((None, None), (2048.0, None))]
    traffic = read_trace(trace)
    none, enough = (sum(each.hit_rates.values()) for each in results)
    assert none < enough == pytest.approx(ceiling(traffic))
    assert results[1].computed_tokens < results[0].computed_tokens
    about = {"model": "m", "hardware": "h", "speed": 1.0, "layout": "one"}
    found = {
        "date": "today",
        "machine": "any",
        "num_requests": 40,
        "prompt_tokens": sum(a.num_prompt_tokens for a in traffic.arrivals),
        "trace_s": 117.0,
        "ceiling": ceiling(traffic),
        "settings": {setting.name: about},
        "results": [asdict(each) for each in results],
    }
    text = page(found)
    assert f"{enough:.1%}" in text and "| 2048 |" in text
