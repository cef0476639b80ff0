"""Workers that are processes: a real model's answers, and what happens to one that is killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from cluster_world import (
    CONFIG,
    GatedExecutor,
    Heard,
    address_of,
    decode,
    door,
    other_facts,
    until,
    worker_server,
)
from fakes import make_request

from duetto import __version__
from duetto.build import build
from duetto.cluster.secret import ClusterSecret
from duetto.cluster.worker_process import FAILED_WORKER_EXIT_CODE, WorkerProcess
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.request import FinishReason
from duetto.core.structured import Grammar, StructuredOutputsParams
from duetto.demo import demo_model_dir
from duetto.engine.engine import Engine
from duetto.engine.thread import EngineThread
from duetto.scheduler.scheduler import Scheduler
from duetto.worker_facts import facts_of, with_own_grammar

SECRET = "a secret of this test alone"
ENGINE = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**24))
ARGS = EngineArgs(max_model_len=1024, kv_cache_memory_bytes=2**24)


@contextmanager
def worker_process(*words):
    """`duetto worker`, which is ended in the end; with what it says on stderr."""
    command = [sys.executable, "-m", "duetto", "worker", *words, *ENGINE]
    variables = os.environ | {"DUETTO_CLUSTER_SECRET": SECRET}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            yield process
        finally:
            process.kill()


def listening_at(process):
    """Where it listens: the first thing that it says."""
    for line in process.stderr:
        if found := re.search(r"listens at (\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # never full
            return address_of(found[1])
    raise AssertionError("it ended without listening")


def requests(grammar=None, ends=()):
    """Sampled, greedy, scored, and one whose answer has a form."""
    made = [
        make_request(f"r{i}", prompt=range(3 + i, 40 + 5 * i), max_tokens=12, seed=i, top_k=20)
        for i in range(2)
    ]
    made.append(make_request("greedy", prompt=range(9, 50), max_tokens=9, temperature=0.0))
    scored = {"logprobs": 2, "prompt_logprobs": 1}
    made.append(make_request("scored", prompt=range(9, 30), max_tokens=4, **scored))
    formed = {"grammar": grammar, "stop_token_ids": ends}
    made.append(make_request("formed", prompt=range(5, 30), max_tokens=30, **formed))
    return made


@pytest.fixture(scope="module")
def built():
    return build(demo_model_dir(), ARGS)


@pytest.fixture(scope="module")
def grammar(built):
    asked = StructuredOutputsParams(choice=["one answer", "another one"])
    return built.grammars.make(asked, b"some tenant")


def answers_here(built, grammar):
    heard = Heard()
    thread = EngineThread(built.engine, lambda report: heard.deliver(None, report))
    thread.start()
    for request in requests(grammar, sorted(built.codec.eos_token_ids)):
        thread.add(request)
    for request in requests():
        heard.final(request.request_id)
    assert thread.stop(10)
    return heard


def said(heard, request):
    updates = heard.updates(request.request_id)
    tokens = [token for update in updates for token in update.tokens]
    scores = [score for update in updates for score in update.prompt_logprobs]
    return tokens, scores, "".join(u.text for u in updates), updates[-1].finish_reason


def test_a_process_answers_bit_for_bit_and_its_end_is_seen(built, grammar):
    """One process for all of it, as each costs seconds: its answers, a stop, a kill."""
    here = answers_here(built, grammar)
    facts = facts_of(built, __version__)
    heard = Heard(ours=facts, rescues=True)
    with (
        worker_process("--listen", "tcp://127.0.0.1:*") as process,
        door(heard, ClusterSecret(SECRET.encode()), 1.5, version=__version__) as doorway,
    ):
        doorway.call(listening_at(process))
        worker = heard.worker()
        theirs = worker.facts
        assert theirs.worker_id != facts.worker_id and theirs.process == process.pid
        assert (theirs.kv_layout, theirs.block_bytes) == (facts.kv_layout, facts.block_bytes)
        for request in requests(grammar, sorted(built.codec.eos_token_ids)):
            worker.add(request)
        for request in requests():
            assert heard.final(request.request_id).finish_reason is not FinishReason.ERROR
            assert said(heard, request) == said(here, request)
        assert said(heard, make_request("formed"))[2] in ("one answer", "another one")
        os.kill(process.pid, signal.SIGSTOP)
        worker.add(make_request("stopped", max_tokens=200))
        heard.wait(lambda: heard.gone)
        assert "silent for" in heard.gone[0][1]
        assert [request.request_id for request in heard.rescued] == ["stopped"]
        os.kill(process.pid, signal.SIGCONT)
        again = heard.worker(1)
        assert again.facts == theirs  # the same start of it: another connection
        again.add(make_request("begun", max_tokens=900))
        heard.wait(lambda: heard.tokens("begun"))
        process.kill()
        final = heard.final("begun")
        assert final.finish_reason is FinishReason.ERROR and "was lost" in final.error
        assert str(process.pid) in final.error
        assert len(heard.finals("begun")) == 1


@pytest.mark.oracle  # takes long: its parts are below
def test_a_process_that_joins_ends_in_order(built, tmp_path):
    heard = Heard(ours=facts_of(built, __version__))
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    with door(heard, ClusterSecret(SECRET.encode()), version=__version__) as doorway:
        bound = doorway.wire.bind(address_of("tcp://127.0.0.1:*"), "--listen")
        doorway.listen(bound)
        words = ("--join", str(bound.address), "--cluster-secret-file", str(secret))
        with worker_process(*words, "--role", "decode") as process:
            worker = heard.worker()
            assert worker.facts.role == "decode"
            worker.add(make_request("a", max_tokens=5))
            heard.wait(lambda: heard.updates("a"))
            process.send_signal(signal.SIGTERM)
            assert heard.final("a").finish_reason is FinishReason.LENGTH
            assert process.wait(30) == 0
            heard.wait(lambda: heard.gone)
            assert "the worker has ended" in heard.gone[0][1]


def test_facts_tell_models_apart_and_not_their_copies(built):
    facts = facts_of(built, __version__)
    assert facts.name == "duetto-demo" and re.fullmatch("[0-9a-f]{32}", facts.model)
    assert facts.block_bytes > 0 and b'"peaks"' in facts.hardware
    assert f"blocks of {facts.scheduler.block_size}" in facts.kv_layout
    assert facts_of(built, __version__).worker_id != facts.worker_id


def test_a_grammar_of_another_process_is_kept_under_a_name_of_ours(built, grammar):
    request = make_request(grammar=grammar, tenant=b"us")
    own = with_own_grammar(request, built.grammars).grammar
    assert own.text == grammar.text and own.key != grammar.key
    assert with_own_grammar(make_request(), built.grammars).grammar is None
    request = make_request(grammar=Grammar("start: (", "key"))
    with pytest.raises(InvalidRequest):
        with_own_grammar(request, built.grammars)


# --- the process's main thread, in this process


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def process_of(server, **options):
    return WorkerProcess(server, shutdown_timeout_s=20.0, **{"join_timeout_s": None} | options)


def test_who_is_refused_ends_with_both_values(tmp_path, signals):
    heard = Heard(ours=other_facts(model="theirs"))
    address = address_of(f"ipc://{tmp_path}/d")
    with worker_server() as server, door(heard) as doorway:
        doorway.listen(doorway.wire.bind(address, "--listen"))
        process = process_of(server)
        server.join(address)
        with pytest.raises(ConfigError, match="refuses this worker: another model: 'f', and here"):
            process.run()


def test_who_finds_no_door_in_time_says_why(tmp_path, signals):
    with worker_server() as server:
        process = process_of(server, join_timeout_s=0.3)
        server.join(address_of(f"ipc://{tmp_path}/none"))
        with pytest.raises(ConfigError, match="does not answer: nobody listens there"):
            process.run()


def test_a_door_may_end_a_worker(tmp_path, signals):
    heard = Heard()
    address = address_of(f"ipc://{tmp_path}/s")
    with worker_server() as server, door(heard) as doorway:
        server.listen(server.wire.bind(address, "--listen"))
        doorway.call(address)
        process = process_of(server)
        heard.worker().stop_worker()
        process.run()
        heard.wait(lambda: heard.gone)


def test_a_second_signal_does_not_wait(tmp_path, signals):
    executor = GatedExecutor()
    heard = Heard()
    address = address_of(f"ipc://{tmp_path}/s")
    engine = Engine(Scheduler(CONFIG), executor, decode)
    with worker_server(engine=engine) as server, door(heard) as doorway:
        server.listen(server.wire.bind(address, "--listen"))
        doorway.call(address)
        executor.gate.clear()
        heard.worker().add(make_request("a", max_tokens=100))
        until(lambda: server.num_live)
        process = process_of(server)

        def told_twice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                heard.wait(lambda: heard.left)
            until(lambda: server._handle._ending)  # the engine is told to stop
            executor.gate.set()

        threading.Timer(0.2, told_twice).start()
        process.run()
        assert heard.final("a").finish_reason is FinishReason.ABORT


def test_an_engine_that_hangs_ends_the_process(tmp_path, monkeypatch):
    """The watchdog tells doors, and the exit code whoever supervises it."""
    executor, ended = GatedExecutor(), []
    executor.gate.clear()
    monkeypatch.setattr(os, "_exit", ended.append)
    heard = Heard()
    address = address_of(f"ipc://{tmp_path}/s")
    engine = Engine(Scheduler(CONFIG), executor, decode)
    with worker_server(engine=engine, step_timeout_s=0.3) as server, door(heard) as doorway:
        process_of(server)
        server.listen(server.wire.bind(address, "--listen"))
        doorway.call(address)
        heard.worker().add(make_request("a"))
        final = heard.final("a")
        assert final.finish_reason is FinishReason.ERROR and "hangs" in final.error
        until(lambda: ended)
        assert ended == [FAILED_WORKER_EXIT_CODE] == [70]
        executor.gate.set()
