"""Workers as children of a server: their processors, their restarts, their end."""

import os
import signal
import sys

import pytest
from cluster_world import DEADLINE_S, until

from duetto.cli.app import app
from duetto.cli.serve_workers import engine_flags
from duetto.cluster import replicas as module
from duetto.cluster.replicas import ReplicaPlan, Replicas, shares_of_cpus
from duetto.core.engine_args import EngineArgs

SLEEPS = (sys.executable, "-S", "-c", "import time; time.sleep(600)")


@pytest.fixture
def started():
    made = []

    def start(*plans):
        made.append(Replicas(plans))
        made[-1].start()
        return made[-1]

    yield start
    for replicas in made:
        replicas.stop(DEADLINE_S)
        for pid in replicas.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_who_ends_is_started_again_and_all_end_in_the_end(started, monkeypatch):
    monkeypatch.setattr(module, "FIRST_RESTART_S", 0.01)
    replicas = started(ReplicaPlan(SLEEPS, "both"), ReplicaPlan(SLEEPS, "both"))
    assert replicas.why_not() is None
    first, second = replicas.pids
    replicas.keep()
    os.kill(first, signal.SIGKILL)
    until(lambda: len(replicas.pids) == 2 and first not in replicas.pids)
    assert second in replicas.pids


def test_who_never_lives_is_given_up_and_others_stay(started, monkeypatch, caplog):
    monkeypatch.setattr(module, "FIRST_RESTART_S", 0.01)
    monkeypatch.setattr(module, "LAST_RESTART_S", 0.02)
    monkeypatch.setattr(module, "MAX_FAILURES", 2)
    fails = (sys.executable, "-S", "-c", "raise SystemExit(3)")
    replicas = started(ReplicaPlan(fails, "both"), ReplicaPlan(SLEEPS, "both"))
    until(lambda: replicas.why_not() is not None)
    assert replicas.why_not() == "worker 0 of 2 has ended with exit code 3"
    replicas.keep()
    until(lambda: "is given up" in caplog.text)
    assert caplog.text.count("started again in") == 2
    assert len(replicas.pids) == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin")
def test_a_worker_has_its_processors_and_its_starter_keeps_its_own(started):
    before = os.sched_getaffinity(0)
    share = frozenset([min(before)])
    replicas = started(ReplicaPlan(SLEEPS, "both", share))
    assert os.sched_getaffinity(replicas.pids[0]) == share
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin")
def test_shares_are_disjoint_and_all_of_it_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 2, 4, 6, 8})
    assert shares_of_cpus(2) == [{0, 2}, {4, 6, 8}]
    assert shares_of_cpus(5) == [{0}, {2}, {4}, {6}, {8}]
    assert shares_of_cpus(7) == [{0}, {2}, {4}, {6}, {8}, {0}, {2}]
    assert shares_of_cpus(1) == [{0, 2, 4, 6, 8}]


def test_a_workers_flags_mean_the_same_arguments():
    """All flags, as the command line of `duetto worker` reads them."""
    args = EngineArgs(
        dtype="float32",
        quantization="int8",
        quantization_skip=("a*", "b*"),
        max_model_len=64,
        target_itl=20.0,
        enable_prefix_caching=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=128,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
        seed=-3,
        threads=1,
    )
    assert engine_flags(EngineArgs()) == []
    flags = engine_flags(args)
    _, bound, _ = app.parse_args(["worker", "m", "--listen=ipc:///x", *flags])
    read = bound.arguments["args"]
    for name in EngineArgs.__dataclass_fields__:
        if name != "speculative_config":
            assert getattr(read, name) == getattr(args, name), name
    assert "ngram" in str(read.speculative_config)
    parts = EngineArgs(tensor_parallel_size=2, enable_prefix_caching=False)
    _, bound, _ = app.parse_args(["worker", "m", "--listen=ipc:///x", *engine_flags(parts)])
    assert bound.arguments["args"] == parts
