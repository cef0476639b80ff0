"""A worker and a door over sockets: the updates are the engine's own, and what goes wrong."""

import threading
from dataclasses import replace

import pytest
from cluster_world import (
    CONFIG,
    FACTS,
    GatedExecutor,
    Heard,
    address_of,
    decode,
    door,
    other_facts,
    pair,
    shadow_engine,
    until,
    worker_server,
)
from fakes import generate_alone, make_request

from duetto.core.cache_control import CachedText, LookUp, Pin
from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.request import FinishReason
from duetto.core.structured import Grammar
from duetto.engine.engine import Engine
from duetto.engine.thread import EngineThread
from duetto.scheduler.scheduler import Scheduler


def requests():
    return [
        make_request(f"r{i}", prompt=range(1 + i, 9 + 3 * i), max_tokens=3 + i, seed=i)
        for i in range(6)
    ]


def told(updates):
    """What updates say together; steps may have met the requests in another order."""
    final = updates[-1]
    tokens = [t.token_id for u in updates for t in u.tokens]
    text = "".join(u.text for u in updates)
    return tokens, text, final.finish_reason, final.stop_reason, final.error


@pytest.mark.parametrize("is_joining", [False, True], ids=["listens", "joins"])
def test_answers_are_those_of_the_engine_itself(tmp_path, is_joining):
    direct = Heard()
    thread = EngineThread(shadow_engine(), lambda report: direct.deliver(None, report))
    thread.start()
    for request in requests():
        thread.add(request)
    with pair(tmp_path, is_joining=is_joining) as (server, heard, worker):
        for request in requests():
            worker.add(request)
        for request in requests():
            final = heard.final(request.request_id)
            direct.final(request.request_id)
            updates = heard.updates(request.request_id)
            assert told(updates) == told(direct.updates(request.request_id))
            assert told(updates)[0] == generate_alone(request)
            assert final.timings.arrival_time == 0.0 and len(final.timings.token_times) > 2
        assert not worker.has_work and server.num_live == 0
        assert worker.facts == FACTS and worker.is_alive and not worker.has_failed
        assert any(report.record for report in heard.reports)
    assert thread.stop(5)


def test_a_refusal_of_the_engine_is_a_final_update(tmp_path):
    with pair(tmp_path) as (_, heard, worker):
        worker.add(make_request("long", prompt=[1] * 200))
        assert "128" in heard.final("long").error
        worker.add(make_request("alien", prompt=[1, 2**30]))
        assert "vocabulary" in heard.final("alien").error
        worker.add(make_request("alien", prompt=[1], bad_word_ids=[[-1]]))
        heard.wait(lambda: len(heard.finals("alien")) == 2)
        worker.add(make_request("good", max_tokens=1))
        assert heard.final("good").finish_reason is FinishReason.LENGTH


def gated_engine():
    executor = GatedExecutor()
    return Engine(Scheduler(CONFIG), executor, decode), executor


def test_an_abort_ends_a_request_there_once(tmp_path):
    engine, executor = gated_engine()
    executor.gate.clear()
    with pair(tmp_path, engine=engine) as (server, heard, worker):
        worker.add(make_request("a", max_tokens=100))
        with pytest.raises(ValueError, match="a is in use"):
            worker.add(make_request("a"))
        worker.abort("a")
        worker.abort("a")
        worker.abort("unknown")
        worker.add(make_request("b", max_tokens=2))
        # Until "b" is there, and so the aborts, which came before it; "a" may have ended by them.
        until(lambda: server.num_live + len(heard.finals("a")) == 2)
        executor.gate.set()
        assert heard.final("a").finish_reason is FinishReason.ABORT
        assert heard.final("b").finish_reason is FinishReason.LENGTH
        assert len(heard.finals("a")) == 1 and server.num_live == 0


def test_a_request_with_a_grammar_is_prepared_beside(tmp_path):
    """What may take long holds nobody up, and can be aborted meanwhile."""
    gate, entered = threading.Event(), threading.Event()

    def prepare(request):
        if request.grammar.text == "slow":
            entered.set()
            gate.wait(20)
        if request.grammar.text == "bad":
            raise InvalidRequest("structured_outputs", "is no grammar")
        return replace(request, grammar=None)

    with pair(tmp_path, prepare=prepare) as (server, heard, worker):
        worker.add(make_request("slow", grammar=Grammar("slow", "k")))
        worker.add(make_request("gone", grammar=Grammar("slow", "k")))
        assert entered.wait(20)
        worker.abort("gone")
        worker.add(make_request("plain", max_tokens=2))
        assert heard.final("plain").finish_reason is FinishReason.LENGTH
        gate.set()
        assert heard.final("slow").finish_reason is FinishReason.LENGTH
        assert heard.final("gone").finish_reason is FinishReason.ABORT
        worker.add(make_request("bad", grammar=Grammar("bad", "k")))
        assert "is no grammar" in heard.final("bad").error
        assert server.num_live == 0 and not worker.has_work


def test_control_messages_are_answered(tmp_path):
    with pair(tmp_path) as (_, heard, worker):
        worker.add(make_request("a", prompt=range(20), max_tokens=1))
        heard.final("a")
        assert worker.control(LookUp(CachedText(20, ()))).result(10).num_cached == 0
        with pytest.raises(InvalidRequest, match="fill no block"):
            worker.control(Pin(b"t", CachedText(3, ()))).result(10)
    with pytest.raises(EngineError):
        worker.control(LookUp(CachedText(20, ()))).result(10)


def test_a_worker_that_ends_ends_its_requests_and_others_may_have_them(tmp_path):
    """It says so: begun ones end with an error, others are the dispatcher's."""
    engine, executor = gated_engine()
    heard = Heard(rescues=True)
    with pair(tmp_path, heard, engine=engine) as (server, _, worker):
        executor.closes_after = 1
        worker.add(make_request("begun", max_tokens=100))
        heard.wait(lambda: heard.tokens("begun"))
        worker.add(make_request("unbegun"))
        worker.add(make_request("aborted"))
        worker.abort("aborted")
        server.wire.stop()  # as if its process were killed
        assert heard.final("begun").finish_reason is FinishReason.ERROR
        assert "the worker fake/w1 (process 0)" in heard.final("begun").error
        assert heard.final("aborted").finish_reason is FinishReason.ABORT
        heard.wait(lambda: heard.gone)
        assert [r.request_id for r in heard.rescued] == ["unbegun"]
        assert not heard.finals("unbegun") and not worker.has_work
        assert worker.has_failed and not worker.is_alive
        worker.add(make_request("late"))
        assert [r.request_id for r in heard.rescued] == ["unbegun", "late"]
        executor.gate.set()


def test_without_a_rescue_all_end_with_an_error(tmp_path):
    engine, executor = gated_engine()
    executor.gate.clear()
    with pair(tmp_path, engine=engine) as (server, heard, worker):
        for name in ("a", "b"):
            worker.add(make_request(name))
        server.wire.stop()
        for name in ("a", "b"):
            final = heard.final(name)
            assert final.finish_reason is FinishReason.ERROR and "was lost" in final.error
        worker.add(make_request("late"))
        assert heard.final("late").finish_reason is FinishReason.ERROR
        executor.gate.set()
    assert all(len(heard.finals(name)) == 1 for name in ("a", "b", "late"))


def test_a_worker_that_leaves_lets_requests_end_and_takes_no_more(tmp_path):
    engine, executor = gated_engine()
    heard = Heard(rescues=True)
    with pair(tmp_path, heard, engine=engine) as (server, _, worker):
        executor.gate.clear()
        worker.add(make_request("a", max_tokens=3))
        until(lambda: server.num_live)
        leaving = threading.Thread(target=server.leave, args=(10.0,))
        leaving.start()
        heard.wait(lambda: heard.left)
        assert worker.state == "leaving" and worker.is_alive
        worker.add(make_request("late"))
        assert [r.request_id for r in heard.rescued] == ["late"]
        executor.gate.set()
        assert heard.final("a").finish_reason is FinishReason.LENGTH
        heard.wait(lambda: heard.gone)
        leaving.join(10)
        assert "the worker has ended" in heard.gone[0][1]


def test_a_door_that_goes_has_its_requests_aborted(tmp_path):
    engine, executor = gated_engine()
    other = Heard()
    with pair(tmp_path, engine=engine) as (server, _, _):
        executor.gate.clear()
        with door(other) as doorway:
            doorway.call(address_of(f"ipc://{tmp_path}/s"))
            other.worker().add(make_request("theirs", max_tokens=100))
            until(lambda: server.num_live)
        assert other.final("theirs").finish_reason is FinishReason.ABORT
        executor.gate.set()
        until(lambda: not engine.has_work and not server.num_live)
        assert engine.scheduler.pool.num_free == CONFIG.num_blocks


def test_two_doors_get_their_own_updates(tmp_path):
    others = Heard()
    with pair(tmp_path) as (_, heard, worker), door(others) as doorway:
        doorway.call(address_of(f"ipc://{tmp_path}/s"))
        other = others.worker()
        for i in range(4):
            worker.add(make_request(f"a{i}", seed=i, max_tokens=8))
            other.add(make_request(f"b{i}", seed=i, max_tokens=8))
        for i in range(4):
            assert heard.final(f"a{i}") and others.final(f"b{i}")
            alone = generate_alone(make_request(seed=i, max_tokens=8))
            assert heard.tokens(f"a{i}") == others.tokens(f"b{i}") == alone
        assert not any(heard.updates(f"b{i}") or others.updates(f"a{i}") for i in range(4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "g"}, "another model: 'g', and here it is 'f'"),
        ({"numerics": "int8"}, "another numerics (backend, dtypes): 'int8', and here it is 'n'"),
        ({"scheduler": {"block_size": 8}}, "another --block-size: 8, and here it is 4"),
        ({"version": "2"}, "another version of Duetto: 2, and here it is 1"),
        ({"protocol": 9}, "another protocol: 9, and here it is 1"),
    ],
)
@pytest.mark.parametrize("is_joining", [False, True], ids=["listens", "joins"])
def test_a_worker_that_does_not_fit_is_refused_with_both_values(
    tmp_path, changes, words, is_joining
):
    heard, refusals = Heard(ours=FACTS), []
    told = threading.Event()

    def note(*said):
        refusals.append(said)
        told.set()

    facts = other_facts(**changes)
    with worker_server(facts=facts) as server, door(heard) as doorway:
        address = address_of(f"ipc://{tmp_path}/s")
        if is_joining:
            server.on_refused = note
            doorway.listen(doorway.wire.bind(address, "--listen"))
            server.join(address)
            assert told.wait(20)
            assert words in refusals[0][0]
        else:
            doorway._on_unanswered = note
            server.listen(server.wire.bind(address, "--listen"))
            doorway.call(address)
            assert told.wait(20)
            _, reason, is_refused = refusals[0]
            if "version" in changes:  # the worker judges the door's first
                words = "another version of Duetto: 1, and here it is 2"
            assert is_refused and words in reason
    assert not heard.workers
