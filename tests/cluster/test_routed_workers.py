"""A router whose workers are elsewhere: over sockets, with workers that end, leave and come."""

from contextlib import ExitStack, contextmanager

from cluster_world import (
    CONFIG,
    FACTS,
    GatedExecutor,
    address_of,
    decode,
    other_facts,
    replace_struct,
    until,
    worker_server,
)
from fakes import generate_alone, make_request
from routed_world import Collected, step_time

from duetto.cluster.doorway import Doorway
from duetto.cluster.members import RemoteMembers
from duetto.cluster.router import RoutedEngine
from duetto.cluster.wire import Wire
from duetto.core.request import FinishReason
from duetto.engine.engine import Engine
from duetto.routing.policies import make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.scheduler.scheduler import Scheduler


@contextmanager
def routing_door(tmp_path, policy="round-robin"):
    """A router that workers may join at `ipc://tmp_path/door`."""
    heard, wire = Collected(), Wire(None, 5.0)
    router = RoutedEngine(make_policy(policy, WaitPrices(step_time, CONFIG)), heard)
    members = RemoteMembers(lambda _facts: router)
    doorway = Doorway(wire, members, "1", "test")
    wire.start()
    doorway.listen(wire.bind(address_of(f"ipc://{tmp_path}/door"), "--listen"))
    try:
        yield router, members, heard
        assert not heard.wrong
    finally:
        doorway.stop()
        router.stop(1.0)
        assert wire.stop()


@contextmanager
def joined_worker(tmp_path, name, engine=None, **changes):
    facts = replace_struct(FACTS, worker_id=name, **changes)
    with worker_server(engine, facts) as server:
        server.join(address_of(f"ipc://{tmp_path}/door"))
        yield server


def gated_engine():
    executor = GatedExecutor()
    return Engine(Scheduler(CONFIG), executor, decode), executor


def names(router):
    return [worker.name for worker in router.workers]


def requests(count):
    return [
        make_request(f"r{i}", range(1 + i % 5, 9 + 3 * (i % 7)), max_tokens=3 + i % 6, seed=i)
        for i in range(count)
    ]


def test_answers_of_workers_are_those_of_one_engine(tmp_path):
    with routing_door(tmp_path, "predicted") as (router, members, heard), ExitStack() as stack:
        for name in ("a", "b"):
            stack.enter_context(joined_worker(tmp_path, name))
        assert members.wait(lambda: len(router.workers) == 2, 20)
        for request in requests(20):
            router.add(request)
        for request in requests(20):
            assert heard.final(request.request_id).error is None
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert tokens == generate_alone(request)
        until(lambda: {record.engine for record in heard.records()} == {0, 1})


def test_a_worker_that_ends_in_the_midst_of_work(tmp_path):
    """What it had not begun is computed elsewhere, what it had begun ends with its name."""
    engine, executor = gated_engine()
    with routing_door(tmp_path) as (router, members, heard), ExitStack() as stack:
        first = stack.enter_context(joined_worker(tmp_path, "first", engine))
        assert members.wait(lambda: names(router) == ["first"], 20)
        router.add(make_request("begun", max_tokens=100))
        heard.wait(lambda: heard.tokens("begun"))
        executor.gate.clear()
        waiting = requests(8)
        for request in waiting:
            router.add(request)
        stack.enter_context(joined_worker(tmp_path, "second"))
        assert members.wait(lambda: names(router) == ["first", "second"], 20)
        first.close("gone")
        assert members.wait(lambda: names(router) == ["second"], 20)
        final = heard.final("begun")
        assert final.finish_reason is FinishReason.ERROR
        assert "the worker fake/first" in final.error
        assert "may be sent again" in final.error
        for request in waiting:
            assert heard.final(request.request_id).error is None
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert tokens == generate_alone(request)
        executor.gate.set()


def test_a_worker_that_leaves_ends_what_it_has_and_gets_no_more(tmp_path):
    engine, executor = gated_engine()
    with routing_door(tmp_path) as (router, members, heard), ExitStack() as stack:
        first = stack.enter_context(joined_worker(tmp_path, "first", engine))
        assert members.wait(lambda: names(router) == ["first"], 20)
        executor.gate.clear()
        router.add(make_request("begun", max_tokens=5))
        stack.enter_context(joined_worker(tmp_path, "second"))
        assert members.wait(lambda: len(router.workers) == 2, 20)
        with first._changed:  # as `leave` begins
            first._is_leaving = True
        for request in requests(6):  # those that first gets come back, and go to second
            router.add(request)
        for request in requests(6):
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert heard.final(request.request_id).error is None
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert tokens == generate_alone(request)
        executor.gate.set()
        assert heard.final("begun").error is None
        first.leave(10.0)
        assert members.wait(lambda: names(router) == ["second"], 20)


def test_workers_that_do_not_agree_are_refused(tmp_path):
    reasons = []
    with routing_door(tmp_path) as (router, members, _heard), ExitStack() as stack:
        stack.enter_context(joined_worker(tmp_path, "first"))
        assert members.wait(lambda: names(router) == ["first"], 20)
        for facts in (
            other_facts(worker_id="x", model="another"),
            other_facts(worker_id="y", scheduler={"block_size": 8}),
        ):
            server = stack.enter_context(worker_server(facts=facts))
            server.on_refused = reasons.append
            server.join(address_of(f"ipc://{tmp_path}/door"))
        until(lambda: len(reasons) == 2)
        assert any("another model: 'another', and here it is 'f'" in reason for reason in reasons)
        assert any("another --block-size: 8, and here it is 4" in reason for reason in reasons)
        assert names(router) == ["first"]


def test_a_request_is_told_of_workers_that_compute_prompts(tmp_path):
    """It goes to a worker that decodes, and says where its prompt may be computed."""
    sent = []
    engine, executor = gated_engine()
    add = engine.add

    def noted(request):
        sent.append(request)
        add(request)

    engine.add = noted
    with routing_door(tmp_path) as (router, members, heard), ExitStack() as stack:
        stack.enter_context(joined_worker(tmp_path, "decodes", engine, role="decode"))
        for name in ("p1", "p2"):
            link = f"tcp://127.0.0.1:{name[1]}"
            stack.enter_context(joined_worker(tmp_path, name, role="prefill", link=link))
        assert members.wait(lambda: len(router.workers) == 3, 20)
        executor.gate.clear()
        for name in "abc":
            router.add(make_request(name, range(1, 30), max_tokens=2))
        executor.gate.set()
        for name in "abc":
            assert heard.final(name).error is None
        links = [request.prefill_at for request in sent]
        both = {"tcp://127.0.0.1:1", "tcp://127.0.0.1:2"}
        assert [set(each) for each in links] == [both] * 3
        assert links[0][0] != links[1][0]  # the second prompt's first choice is the idle one
        for worker in router.workers:
            assert not any(worker.view(0)[1:])
