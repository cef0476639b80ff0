"""The engine's thread: one final update per request, whatever happens, and proof of progress."""

import re
import threading
import time

import pytest
from fakes import ByteCodec, FunctionExecutor, make_request

from duetto.core.config import SchedulerConfig
from duetto.core.errors import DeviceLost, EngineError
from duetto.core.request import FinishReason
from duetto.engine.engine import STEP_FAILED, Engine, StepReport
from duetto.engine.thread import FAILED, STOPPED, EngineThread
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=64, max_model_len=128, block_size=4, max_num_batched_tokens=32)
CODEC = ByteCodec()


class Collector:
    """Keeps every report, and says when a request has ended."""

    def __init__(self):
        self.reports = []
        self.changed = threading.Condition()

    def __call__(self, report):
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()

    def updates(self, request_id):
        return [u for r in self.reports for u in r.updates if u.request_id == request_id]

    def finals(self, request_id):
        return [u for u in self.updates(request_id) if u.finish_reason is not None]

    def wait_final(self, request_id):
        with self.changed:
            assert self.changed.wait_for(lambda: self.finals(request_id), 5), "no final update"
        return self.finals(request_id)[0]


class GatedExecutor:
    """Says the letter 'a'; a step waits for the gate and fails if told to."""

    def __init__(self):
        self.inner = FunctionExecutor(lambda *_: ord("a"))
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fails = False
        self.pause_s = 0.0

    def submit(self, batch):
        self.entered.set()
        self.gate.wait(5)
        time.sleep(self.pause_s)
        if self.fails:
            self.fails = False
            raise RuntimeError("planted failure")
        return self.inner.submit(batch)


@pytest.fixture
def executor():
    return GatedExecutor()


@pytest.fixture(params=[0, 1, 2], ids=lambda depth: f"{depth} in flight")
def engine(executor, request):
    decode = lambda ids, skip: CODEC.decode(ids, skip_special_tokens=skip)  # noqa: E731
    return Engine(Scheduler(CONFIG), executor, decode, depth=request.param)


@pytest.fixture
def heard():
    return Collector()


@pytest.fixture
def thread(engine, heard, executor):
    made = EngineThread(engine, heard)
    made.start()
    yield made
    executor.gate.set()
    assert made.stop(5)


def all_blocks_free(engine):
    return engine.scheduler.pool.num_free == CONFIG.num_blocks


def test_runs_a_request_to_its_end_and_reports_every_step(thread, heard):
    thread.add(make_request("a", max_tokens=3))
    final = heard.wait_final("a")
    assert final.finish_reason is FinishReason.LENGTH
    assert "".join(u.text for u in heard.updates("a")) == "aaa"
    assert sum(r.record is not None for r in heard.reports) == 3
    assert not thread.has_work and thread.computing is None


def test_a_refusal_is_a_final_update_and_not_an_exception(thread, heard):
    thread.add(make_request("long", prompt=[1] * 200))
    final = heard.wait_final("long")
    assert final.finish_reason is FinishReason.ERROR
    assert "128" in final.error
    thread.add(make_request("next", max_tokens=1))
    assert heard.wait_final("next").finish_reason is FinishReason.LENGTH


def test_abort_ends_in_any_state_once(thread, heard, engine, executor):
    executor.gate.clear()  # a step takes as long as the aborts need to be sent
    thread.add(make_request("a", max_tokens=100))
    assert executor.entered.wait(5)
    for _ in range(3):
        thread.abort("a")
    thread.abort("never heard of")
    executor.gate.set()
    assert heard.wait_final("a").finish_reason is FinishReason.ABORT
    thread.call(lambda: None).result(5)  # all messages before it have been read
    assert len(heard.finals("a")) == 1
    assert thread.call(lambda: all_blocks_free(engine)).result(5)


def test_abort_of_one_that_was_added_in_the_same_breath(thread, heard, executor):
    executor.gate.clear()
    thread.add(make_request("running", max_tokens=1))
    assert executor.entered.wait(5)
    thread.add(make_request("queued", max_tokens=1))
    thread.abort("queued")
    executor.gate.set()
    assert heard.wait_final("queued").finish_reason is FinishReason.ABORT
    assert heard.wait_final("running").finish_reason is FinishReason.LENGTH


def test_a_failing_step_ends_its_requests_and_not_the_thread(thread, heard, executor):
    executor.fails = True
    thread.add(make_request("a"))
    final = heard.wait_final("a")
    assert final.finish_reason is FinishReason.ERROR and final.error == STEP_FAILED
    thread.add(make_request("b", max_tokens=1))
    assert heard.wait_final("b").finish_reason is FinishReason.LENGTH
    assert thread.is_alive


def test_call_runs_on_the_thread_and_brings_exceptions_back(thread):
    assert thread.call(threading.current_thread).result(5).name == "duetto-engine"
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0).result(5)
    assert thread.is_alive


class Panic(BaseException):
    """What a native library raises when it panics is not an Exception."""


LOST = DeviceLost("bug-1", "an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("bug", "told"), [(RuntimeError("bug"), FAILED), (Panic("bug"), FAILED), (LOST, str(LOST))]
)
def test_a_bug_ends_everything_loudly_and_nothing_silently(
    heard, engine, executor, bug, told, caplog
):
    def step():
        raise bug

    executor.gate.clear()
    thread = EngineThread(engine, heard)
    thread.start()
    thread.add(make_request("a", max_tokens=100))
    thread.add(make_request("b", max_tokens=100))
    assert executor.entered.wait(5)
    engine.step = step
    executor.gate.set()
    for request_id in "ab":
        final = heard.wait_final(request_id)
        assert (final.finish_reason, final.error) == (FinishReason.ERROR, told)
    assert not thread.is_alive
    thread.add(make_request("late"))
    assert heard.wait_final("late").error == told
    with pytest.raises(EngineError, match=re.escape(told)):
        thread.call(lambda: 1).result(5)
    assert "bug" in caplog.text
    assert thread.stop(5)
    assert [len(heard.finals(i)) for i in ("a", "b", "late")] == [1, 1, 1]


def test_a_listener_that_raises_marks_the_thread_dead(engine, caplog):
    def deliver(report):
        raise RuntimeError("the loop is closed")

    thread = EngineThread(engine, deliver)
    thread.start()
    thread.add(make_request("a"))
    assert thread.stop(5) and not thread.is_alive
    assert "the loop is closed" in caplog.text


def test_stop_aborts_what_runs_and_what_waits(heard, engine, executor):
    executor.pause_s = 0.05  # or all may have ended before they are stopped
    thread = EngineThread(engine, heard)
    thread.start()
    ids = [f"r{i}" for i in range(5)]
    for request_id in ids:
        thread.add(make_request(request_id, max_tokens=100))
    assert thread.stop(5)
    assert not thread.is_alive and all_blocks_free(engine)
    for request_id in ids:
        assert [u.finish_reason for u in heard.finals(request_id)] == [FinishReason.ABORT]
    thread.add(make_request("late"))
    assert [u.error for u in heard.finals("late")] == [STOPPED]
    assert thread.stop(5)  # a second time changes nothing


def test_stop_does_not_wait_for_ever_and_what_comes_too_late_is_not_delivered(
    heard, engine, executor
):
    executor.gate.clear()
    thread = EngineThread(engine, heard)
    thread.start()
    thread.add(make_request("a", max_tokens=1))
    assert executor.entered.wait(5)
    assert not thread.stop(0.05)
    assert [u.finish_reason for u in heard.finals("a")] == [FinishReason.ABORT]
    executor.gate.set()
    assert thread.stop(5)
    assert len(heard.updates("a")) == 1


def test_requests_from_many_threads_each_get_one_final_update(thread, heard):
    def client(name):
        for index in range(20):
            thread.add(make_request(f"{name}-{index}", max_tokens=3))
            if index % 3 == 0:
                thread.abort(f"{name}-{index}")

    clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    for name in range(4):
        for index in range(20):
            heard.wait_final(f"{name}-{index}")
            assert len(heard.finals(f"{name}-{index}")) == 1


def test_health_can_be_told_from_progress(heard, engine, executor):
    now = [100.0]
    thread = EngineThread(engine, heard, clock=lambda: now[0])
    assert not thread.is_alive  # not started
    executor.gate.clear()
    thread.start()
    now[0] = 500.0
    assert not thread.has_work
    thread.add(make_request("a", max_tokens=2))
    assert executor.entered.wait(5)
    now[0] = 560.0
    assert thread.last_progress_time == 500.0 and thread.computing and thread.is_alive
    executor.gate.set()
    heard.wait_final("a")
    assert thread.last_progress_time == 560.0 and thread.computing is None
    assert thread.stop(5)


def test_an_idle_thread_uses_no_processor_time(heard):
    class CountingEngine:
        num_asked = 0

        @property
        def has_work(self):
            self.num_asked += 1
            return False

        def step(self):
            return StepReport(())

    engine = CountingEngine()
    thread = EngineThread(engine, heard)
    thread.start()
    time.sleep(0.05)
    assert engine.num_asked == 1  # it asked once and went to sleep
    assert thread.stop(5)
    assert engine.num_asked <= 3


def test_one_id_is_not_accepted_twice(thread, executor):
    executor.gate.clear()
    thread.add(make_request("a"))
    with pytest.raises(ValueError, match="in use"):
        thread.add(make_request("a"))
