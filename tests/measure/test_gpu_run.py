"""Who runs the parts of `make gpu`: what is done stays done, and no part can end the others."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

WORKER = """
import json, sys, time
print(json.dumps({"about": {"name": NAME}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    part = asked["part"]
    if part == "raises":
        print(json.dumps({"error": "Traceback\\nLookupError: no such thing"}), flush=True)
    elif part == "hangs":
        time.sleep(60)
    elif part == "dies":
        print("illegal memory access", file=sys.stderr, flush=True)
        sys.exit(3)
    else:
        print(json.dumps({"found": {"saw": sorted(asked["found"])}}), flush=True)
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import run  # noqa: PLC0415

    return run


def run_parts(gpu, folder: Path, parts, *, seconds: float = 30.0, name: str = "H100") -> int:
    """Returns how many workers were started."""
    script = folder.parent / "worker.py"
    script.write_text(WORKER.replace("NAME", repr(name)))
    results, started = gpu.Results(folder), []

    def start():
        started.append(gpu.Worker(folder / gpu.LOG, rehearse=False, script=script))
        return started[-1]

    gpu.Runner(results, seconds, start).run([gpu.Part(*part) for part in parts])
    return len(started)


def outcomes(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())["parts"]


def test_a_part_that_fails_does_not_end_the_others(gpu, tmp_path) -> None:
    parts = [
        *(("first", "", 20.0), ("raises", "", 20.0), ("dies", "", 20.0)),
        *(("hangs", "", 0.5), ("last", "", 20.0)),
    ]
    assert run_parts(gpu, tmp_path / "out", parts) == 3
    found = outcomes(tmp_path / "out")
    assert [one["state"] for one in found.values()] == ["done", *["failed"] * 3, "done"]
    assert found["raises"]["error"].endswith("LookupError: no such thing")
    assert "ended with 3" in found["dies"]["error"]
    assert "illegal memory access" in found["dies"]["error"]
    assert found["hangs"]["error"] == "took longer than 0.5 s"
    assert found["last"]["found"] == {"saw": ["first"]}


def test_what_is_done_is_left_out_and_what_failed_comes_last(gpu, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    run_parts(gpu, folder, [("first", "", 20.0), ("raises", "", 20.0)])
    capsys.readouterr()
    run_parts(gpu, folder, [("first", "", 20.0), ("raises", "", 20.0), ("later", "", 20.0)])
    begun = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert begun[:2] == ["later", "raises"]
    assert outcomes(folder)["later"]["found"] == {"saw": ["first"]}


def test_without_time_nothing_begins(gpu, tmp_path, capsys) -> None:
    run_parts(gpu, tmp_path / "out", [("first", "", 20.0)], seconds=0.0)
    assert "first: not begun" in capsys.readouterr().out
    assert outcomes(tmp_path / "out") == {}


def test_another_device_begins_anew(gpu, tmp_path) -> None:
    folder = tmp_path / "out"
    run_parts(gpu, folder, [("first", "", 20.0)])
    run_parts(gpu, folder, [("second", "", 20.0)], name="H200")
    assert list(outcomes(folder)) == ["second"]
    aside = json.loads((folder / "gpu-H100.json").read_text())
    assert list(aside["parts"]) == ["first"]


def test_without_a_device_there_is_one_line(gpu, tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('no NVIDIA GPU was found')")
    with pytest.raises(gpu.WorkerEnded) as raised:
        gpu.Worker(tmp_path / "log", rehearse=False, script=script)
    assert str(raised.value).splitlines()[-1] == "no NVIDIA GPU was found"


def test_a_damaged_file_is_named(gpu, tmp_path) -> None:
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gpu\.json: is no file of results"):
        gpu.Results(tmp_path)


def test_parts_have_names_and_limits(gpu) -> None:
    assert len(set(gpu.NAMES)) == len(gpu.NAMES)
    assert all((BENCHMARKS / f"{part.home.replace('.', '/')}.py").is_file() for part in gpu.PARTS)
