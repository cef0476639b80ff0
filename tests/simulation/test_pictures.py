"""Traces that Perfetto loads, and Gantt pictures."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cli.in_process import duetto
from pricing.prices import A100, program
from simulation.loads import fleet, mixed_load, replica

from duetto.core.errors import ConfigError
from duetto.core.timings import Part
from duetto.pricing import pyplot
from duetto.pricing.cost_model import Deployment
from duetto.pricing.picture import draw_roofline
from duetto.pricing.roofline import roofline
from duetto.simulation import gantt
from duetto.simulation.disaggregation import Disaggregation, KVLink
from duetto.simulation.perfetto import write_trace
from duetto.simulation.simulation import Simulation, simulate
from duetto.simulation.workload import Arrival, Traffic


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


LONG_NAME = "a-model-with-$signs$-and-a-very-long-name/" * 8


@pytest.mark.parametrize("num_requests", [1, 3, 300])
def test_a_gantt_is_drawn_of_any_load_and_has_its_title(num_requests: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load = mixed_load(1, num_requests=num_requests)
    gantt.draw_gantt(simulate(load, fleet(12)), tmp_path / "a.svg", title=LONG_NAME)
    text = (tmp_path / "a.svg").read_text()
    assert f"the first {min(60, num_requests)} of {num_requests} requests" in text
    assert "a-model-with-$signs$" in text
    assert "(8 of 12 are shown)" in text


def test_streams_beside_prompts_are_told_from_those_alone() -> None:
    """A request that streams alone, and then beside a long prompt of another."""
    load = Traffic((Arrival(0.0, 10, 60), Arrival(0.2, 400, 2)))
    run = simulate(load, fleet())
    first, second = (gantt._spans(served, run) for served in run.served)
    assert [name for name, _, _ in first if name != "prompt"] == ["decode", "shared", "decode"]
    assert all(a[2] == pytest.approx(b[1]) for a, b in pairwise(first))
    parts = run.served[0].timings.parts
    for name, part in (("decode", Part.DECODE), ("shared", Part.SHARED)):
        drawn = sum(end - start for its_name, start, end in first if its_name == name)
        assert drawn == pytest.approx(parts[part])
    assert "shared" not in [name for name, _, _ in second]


def test_every_mark_of_a_roofline_is_in_its_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for batch in (1, 256):
        found = roofline(program("llama-3-8b"), A100, Deployment(), batch=batch, context=900)
        draw_roofline(found, "bfloat16", tmp_path / "a.svg", title=LONG_NAME)
        text = (tmp_path / "a.svg").read_text()
        words = ("matrix products", "attention", "norms", "rope", "activations", "prefill: ")
        for each in (*words, "decode: ", "mixed: ", "balance, ", "a-model-with-$signs$"):
            assert each in text, each


def test_a_folder_that_is_not_there_is_refused_before_the_work(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "a.png"
    with pytest.raises(ConfigError, match=r"--gantt .*: there is no folder .*missing"):
        pyplot.pyplot_for("--gantt", missing)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ConfigError, match=r"--picture .*: is a folder"):
        pyplot.pyplot_for("--picture", tmp_path / "b.png")
    many = ("--num-prompts", "100000000")
    for words in (
        ("simulate", "tiny", "--hardware", "h100", *many, "--trace-out"),
        ("bench", "serve", "--base-url", "127.0.0.1:1", *many, "--result-filename"),
        ("explain", "--url", "127.0.0.1:1", "--trace"),
        ("calibrate", "--out"),
    ):
        for file, why in ((tmp_path, "is a folder"), (missing, "there is no folder")):
            if (words[0], file) == ("calibrate", missing):
                continue  # it makes the folder that it keeps its file in
            done = duetto(*words, file)
            assert done.returncode != 0 and f"{words[-1]} {file}: {why}" in done.stderr, words
