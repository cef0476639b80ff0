"""The page beside the peers: ratios are to the best peer of the precision, shares to the roof."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers.report import page  # noqa: PLC0415

    return page


def test_ratios_and_shares(page) -> None:
    medians = {
        "Duetto bf16": {"tg B=1": 12.0, "pp 512": 90.0},
        "llama.cpp bf16": {"tg B=1": 10.0, "pp 512": 100.0},
        "OpenVINO GenAI bf16": {"tg B=1": 8.0},
        "Duetto int8": {"tg B=1": 99.0},
    }
    cells = ("pp 512", "pp 2048", "tg B=1", "tg B=8", "tg B=32")
    result = {
        "date": "2026-01-01",
        "model": "some",
        "threads": 2,
        "all": {"Duetto bf16": {"tg B=1": [11.0, 12.0, 13.0], "pp 512": [90.0]}},
        "limits": {"GB/s read": 40.0},
        "medians": medians,
        "roofs": {p: dict.fromkeys(cells, 120.0) for p in ("bf16", "int8", "int4")},
    }
    assert "medians of 1 to 3 rounds" in page(result)
    lines = page(result).splitlines()
    ratios, shares = (
        [line for line in lines if line.startswith("| bf16 |")][i].split(" | ") for i in (0, 1)
    )
    assert ratios[1] == "0.90 (1.0)"  # below the target: not bold
    assert ratios[3] == "**1.20** (1.15)"  # by llama.cpp, the better peer
    assert ratios[2] == "– (1.0)"
    assert shares[1:4] == ["75% of 120", "–", "10% of 120"]
    assert next(line for line in lines if line.startswith("| int8 |")).split(" | ")[3] == "– (1.6)"


def test_what_stands_below_by_hand_stays(page, tmp_path) -> None:
    report = sys.modules[page.__module__]
    result = {
        **dict.fromkeys(("date", "model", "threads"), "x"),
        **{name: {} for name in ("limits", "medians", "roofs", "all")},
    }
    file = tmp_path / "deep" / "page.md"
    report.write_page(file, result)
    first = file.read_text()
    file.write_text(f"old\n{report.BY_HAND}\nwhat it means\n")
    report.write_page(file, result)
    assert file.read_text() == f"{first}\n{report.BY_HAND}\nwhat it means\n"
