"""Traces that Perfetto loads, and Gantt pictures."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planner.loads import fleet, mixed_load, replica

from duetto.core.errors import ConfigError
from duetto.planner import gantt, pyplot
from duetto.planner.disaggregation import Disaggregation, KVLink
from duetto.planner.perfetto import write_trace
from duetto.planner.simulation import Simulation, simulate


@pytest.fixture(scope="module")
def run() -> Simulation:
    link = KVLink(num_layers=2, bytes_per_token=100, bytes_per_s=1e6)
    apart = Disaggregation(prefill=replica(), num_replicas=1, link=link, max_local_prefill=50)
    return simulate(mixed_load(2), replace(fleet(2), disaggregation=apart))


def events_of(run: Simulation, folder: Path) -> list[dict[str, Any]]:
    write_trace(run, folder / "trace.json")
    document = json.loads((folder / "trace.json").read_text())
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def test_every_step_and_every_request_is_there(run: Simulation, tmp_path: Path) -> None:
    events = events_of(run, tmp_path)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["decode 0", "decode 1", "prefill 0", "requests"]
    slices = [e for e in events if e["ph"] == "X"]
    steps = [e for e in slices if names[e["pid"]] != "requests"]
    assert len(steps) == sum(len(log) for log in (*run.steps, *run.prefill_steps))
    requests = [e for e in slices if e["name"].startswith("request ")]
    assert [e["args"]["output_tokens"] for e in requests] == [
        len(s.timings.token_times) for s in run.served
    ]
    assert any(e["name"] == "KV transfer" for e in slices)


def test_slices_of_a_track_nest(run: Simulation, tmp_path: Path) -> None:
    """Perfetto drops slices that overlap without one holding the other."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for e in events_of(run, tmp_path):
        if e["ph"] == "X":
            tracks[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    assert len(tracks) > 3
    for spans in tracks.values():
        open_ends: list[float] = []
        for start, end in sorted(spans, key=lambda s: (s[0], -s[1])):
            while open_ends and open_ends[-1] <= start + 1e-3:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 2e-3
            open_ends.append(end)


def test_a_gantt_picture(run: Simulation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "c.png"):
        gantt.draw_gantt(run, tmp_path / name, num_requests=20)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    for colour in gantt.COLOURS.values():
        assert colour in text


def test_what_never_happens_is_not_in_the_legend(run: Simulation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gantt.draw_gantt(simulate(mixed_load(2), fleet(2)), tmp_path / "a.svg")
    assert gantt.COLOURS["KV transfer"] not in (tmp_path / "a.svg").read_text()


def test_pictures_of_other_kinds_are_refused(run: Simulation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accepted: a name that ends in \.png or \.svg"):
        gantt.draw_gantt(run, tmp_path / "picture.bmp")


def test_matplotlib_may_be_missing(
    run: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(pyplot, "import_module", missing)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        gantt.draw_gantt(run, tmp_path / "a.svg")
