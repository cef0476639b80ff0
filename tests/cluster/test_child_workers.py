"""Workers as child processes and as actors: started, drained, restarted, and never left behind."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from duetto.cluster.child_workers import LocalWorkers, WorkerChild, worker_command
from duetto.cluster.facts import WorkerRole
from duetto.cluster.ray_workers import RayError, RayWorkers, import_ray

# What a worker is to those that start it: it says that it runs, and ends some time after SIGTERM.
WORKER = """
import os, signal, sys, time
folder, role, drain_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
name = f"{folder}/{role}-{os.getpid()}"
def end(*_):
    time.sleep(drain_s)
    os.rename(name, name + ".drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open(name, "w").close()
while True:
    time.sleep(0.02)
"""


def command(folder: Path, drain_s: float = 0.0) -> Callable[[WorkerRole], tuple[str, ...]]:
    return lambda role: (sys.executable, "-c", WORKER, str(folder), role, str(drain_s))


def pids(folder: Path, role: str = "*") -> set[int]:
    """Workers that run and were not drained."""
    return {int(path.name.split("-")[1]) for path in folder.glob(f"{role}-*") if not path.suffix}


def until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalWorkers]:
    workers = LocalWorkers(command(tmp_path), replica_role="decode")
    yield workers
    workers.stop()


def test_more_and_fewer_workers_of_both_roles(local: LocalWorkers, tmp_path: Path) -> None:
    local.scale(2, 1)
    until(lambda: len(pids(tmp_path)) == 3)
    assert local.live() == (2, 1)
    assert len(pids(tmp_path, "prefill")) == 1 and len(pids(tmp_path, "decode")) == 2
    local.scale(1, 0)
    assert local.live() == (1, 0) and len(pids(tmp_path)) == 1
    assert len([*tmp_path.glob("*.drained")]) == 2  # it was waited for


def test_one_that_died_is_started_again(local: LocalWorkers, tmp_path: Path) -> None:
    local.scale(1, 0)
    until(lambda: len(pids(tmp_path)) == 1)
    (first,) = pids(tmp_path)
    os.kill(first, signal.SIGKILL)
    until(lambda: local.live() == (0, 0))
    local.scale(1, 0)
    until(lambda: len(pids(tmp_path)) == 2)
    assert local.live() == (1, 0)


def test_one_that_does_not_drain_in_time_is_killed(tmp_path: Path) -> None:
    worker = WorkerChild(command(tmp_path, drain_s=600)("both"))
    until(lambda: len(pids(tmp_path)) == 1)
    worker.ask_to_end()
    assert not worker.end(0.2)
    assert not worker.is_alive and pids(tmp_path) == {worker.pid}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_worker_ends_with_what_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from duetto.cluster.child_workers import WorkerChild\n"
        "worker = WorkerChild(sys.argv[1:]); print(worker.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *command(tmp_path)("both")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: pids(tmp_path) == {pid})
    finally:
        parent.kill()  # it can do nothing about its child
        parent.communicate()
    until(lambda: not is_running(pid))


def test_a_workers_command_line() -> None:
    assert worker_command(["model", "--join", "tcp://h:1"])("prefill") == (
        *(sys.executable, "-m", "duetto", "worker", "model", "--join", "tcp://h:1"),
        *("--role", "prefill"),
    )


has_ray = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(has_ray, reason="Ray is installed")
def test_without_ray_it_is_named() -> None:
    with pytest.raises(RayError, match=r"pip install 'duetto\[ray\]'"):
        import_ray()


@pytest.mark.oracle  # Ray takes ten seconds to start
@pytest.mark.skipif(not has_ray, reason="needs duetto[ray]")
@pytest.mark.filterwarnings("ignore")
def test_ray_places_restarts_and_drains_workers(tmp_path: Path) -> None:
    ray = import_ray()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        workers = RayWorkers(command(tmp_path, drain_s=0.2))
        workers.scale(2, 1)
        until(lambda: len(pids(tmp_path)) == 3)
        assert workers.live() == (2, 1) and len(pids(tmp_path, "prefill")) == 1
        killed = min(pids(tmp_path, "both"))
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(pids(tmp_path, "both")) == 3)  # the file of the dead one stays
        until(lambda: workers.live() == (2, 1))
        workers.scale(1, 0)
        assert len([*tmp_path.glob("*.drained")]) == 2
        left = [pid for pid in pids(tmp_path) if is_running(pid)]
        assert len(left) == 1 and workers.live() == (1, 0)
        workers.stop()
        until(lambda: not is_running(left[0]))
    finally:
        ray.shutdown()


@pytest.mark.oracle
@pytest.mark.skipif(not has_ray, reason="needs duetto[ray]")
@pytest.mark.filterwarnings("ignore")
def test_ray_without_a_place_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duetto.cluster.ray_workers.START_S", 15.0)
    ray = import_ray()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        workers = RayWorkers(command(tmp_path))
        with pytest.raises(RayError, match="1 of 2 new workers found no place"):
            workers.scale(2, 0)
        assert workers.live() == (1, 0)
        workers.stop()
    finally:
        ray.shutdown()
