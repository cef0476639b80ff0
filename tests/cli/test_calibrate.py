"""What `duetto calibrate` prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duetto.cli.calibrate import _print, calibrate
from duetto.core.errors import ConfigError
from duetto.pricing.find_hardware import find_hardware, write_hardware
from duetto.pricing.hardware import CachedWeights, Efficiencies, KernelPoint
from duetto.progress import show_progress


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


def test_more_than_all_of_a_roof_is_explained_under_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for fraction, is_explained in ((0.99, False), (1.4, True)):
        spec = replace(find_hardware("a100"), kernels=(point(1, 16, fraction),))
        _print(spec, Path("there.json"))
        shown = " ".join(capsys.readouterr().out.split())
        assert ("above 100: what it reads was in a cache" in shown) == is_explained


def test_what_is_kept_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hardware.json"
    with pytest.raises(ConfigError, match=r"nothing is kept.*run: duetto calibrate"):
        calibrate(show=True, out=file)
    busy = ("before it began 9.0 processes ran",)
    write_hardware(replace(find_hardware("a100"), busy=busy), file)
    calibrate(show=True, out=file)
    shown = capsys.readouterr().out
    assert "read bandwidth: 2039 GB/s" in shown
    assert "warning: before it began 9.0 processes ran" in shown
    assert "run duetto calibrate again" in shown
    calibrate(show=True, out=file, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "a100-80g"
    with pytest.raises(ConfigError, match="--show with --backend or --threads"):
        calibrate(show=True, out=file, threads=2)


def test_without_a_terminal_a_line_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("measuring", lines_every_s=1000) as bar:
        for done in range(1, 9):
            bar.reach(done, 8)
    assert capsys.readouterr().err.splitlines() == ["measuring: 1 of 8", "measuring: 8 of 8"]
    with show_progress("measuring") as bar:
        bar.reach(1, 8)
    assert not capsys.readouterr().err
