"""What `duetto calibrate` prints."""

from dataclasses import replace
from pathlib import Path

import pytest

from duetto.cli.calibrate import _print
from duetto.planner.find_hardware import find_hardware
from duetto.planner.hardware import CachedWeights, Efficiencies, KernelPoint


def point(requests: int, rows: int, fraction: float) -> KernelPoint:
    return KernelPoint(
        kind="linear",
        arithmetic="float32",
        requests=requests,
        rows=rows,
        context=1024,
        time_s=1e-3,
        fraction=fraction,
    )


def test_each_size_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    points = (point(16, 16, 0.73), point(1, 16, 0.74), point(4, 1024, 0.75))
    _print(replace(find_hardware("a100"), kernels=points), Path("there.json"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["16", "1", "1024", "73"], ["1", "16", "1024", "74"], ["4", "256", "1024", "75"]):
        assert row in rows


def test_what_caches_keep_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(
        find_hardware("a100"),
        read_bandwidths=((2**23, 9e12), (2**30, 2e12)),
        cached=CachedWeights(most_bytes=2**25, efficiencies=Efficiencies(step_s=54e-6)),
    )
    _print(spec, Path("there.json"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 MiB, read again and again: 9000 GB/s" in shown
    assert "of up to 32 MiB stay in the caches, and there the engine takes 54 us a step" in shown
