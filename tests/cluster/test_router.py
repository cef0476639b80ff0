"""Several engines behind one handle: the same answers, each once, whatever becomes of an engine."""

import random

import pytest
from cluster_world import CONFIG, shadow_engine, until
from fakes import ShadowExecutor, generate_alone, make_request
from routed_world import breakable_engine, routed, shadow_engines
from small_models import KINDS, make_model

from duetto.cluster.members import add_local
from duetto.cluster.router import HUNG, NO_WORKER, STOPPED
from duetto.core.request import FinishReason
from duetto.engine.thread import in_thread
from duetto.routing.prefix_index import PrefixIndex
from duetto.routing.prompt_blocks import prompt_hashes

LOST = "the device d is lost, and the engine ends: it fell"
POLICIES = ["round-robin", "least-loaded", "prefix-affinity", "predicted"]


def executor():
    return ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)


def made(count, seed=0, **options):
    """Requests of which some begin alike."""
    source = random.Random(seed)
    shared = [source.randrange(1, 90) for _ in range(40)]
    return [
        make_request(
            f"r{i}",
            [
                *shared[: 4 * source.randrange(8)],
                *(source.randrange(1, 90) for _ in range(1 + i % 9)),
            ],
            max_tokens=1 + source.randrange(12),
            seed=i,
            **options,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_those_of_one_engine(policy):
    with routed(shadow_engines(3), policy) as (router, heard):
        for request in made(30):
            router.add(request)
        for request in made(30):
            heard.final(request.request_id)
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert tokens == generate_alone(request)
        assert {record.engine for record in heard.records()} == {0, 1, 2}
        assert not router.has_work
        for worker in router.workers:
            counts = worker.view(0)[1:]
            assert not any(counts), "what has ended still counts"


def test_answers_of_real_models_are_the_same_bits(tmp_path):
    """Tokens and log-probabilities of three engines behind a router, against one engine."""

    def requests():
        found = made(12, seed=4, temperature=1.0, logprobs=2)
        assert all(r.max_tokens + r.num_prompt_tokens < 60 for r in found)
        return found

    def engine(number):
        directory = tmp_path / str(number)
        directory.mkdir()
        return make_model(KINDS[0], directory).engine()

    alone, wanted = engine(0), {}
    for request in requests():
        alone.add(request)
    while alone.has_work:
        for update in alone.step().updates:
            wanted.setdefault(update.request_id, []).extend(update.tokens)
    engines = [engine(number) for number in (1, 2, 3)]
    with routed(engines, "predicted", engines[0].scheduler.config) as (router, heard):
        for request in requests():
            router.add(request)
        for request in requests():
            assert heard.final(request.request_id).error is None
            assert heard.tokens(request.request_id) == wanted[request.request_id]


def test_requests_that_had_not_begun_are_computed_elsewhere():
    broken, device = breakable_engine(executor())
    with routed([broken, *shadow_engines(2)], "round-robin") as (router, heard):
        device.gate.clear()
        for request in made(12):
            router.add(request)
        device.entered.wait()
        device.lose()
        for request in made(12):
            assert heard.final(request.request_id).error is None
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            assert tokens == generate_alone(request)
        until(lambda: not router.workers[0].handle.is_alive)
        router.add(make_request("after"))  # and nothing goes there any more
        assert heard.final("after").error is None


def test_requests_that_had_begun_end_with_an_error_that_says_so():
    broken, device = breakable_engine(executor())
    with routed([broken, shadow_engine()], "round-robin") as (router, heard):
        router.add(make_request("long", range(1, 9), max_tokens=100))
        heard.wait(lambda: heard.tokens("long"))
        device.lose()
        final = heard.final("long")
        assert final.finish_reason is FinishReason.ERROR
        assert final.error == LOST
        assert router.has_failed is False
        assert router.is_alive


def test_what_may_end_engines_is_sent_to_two_of_them_at_most():
    engines, devices = zip(*(breakable_engine(executor()) for _ in range(4)), strict=True)
    for device in devices:
        device.is_lost = True
    with routed(engines, "round-robin") as (router, heard):
        router.add(make_request("poison"))
        assert heard.final("poison").error == LOST
        until(lambda: sum(w.handle.is_alive for w in router.workers) == 2)


def test_without_a_worker_requests_are_refused_until_one_joins():
    broken, device = breakable_engine(executor())
    with routed([broken], "predicted") as (router, heard):
        router.add(make_request("first"))
        assert heard.final("first").error is None
        device.is_lost = True
        router.add(make_request("second"))
        assert heard.final("second").error == LOST
        assert not router.is_alive
        router.add(make_request("third"))
        assert heard.final("third").error == NO_WORKER
        assert not router.has_failed
        router.leave(router.workers[0].handle)
        router.add(make_request("fourth"))
        assert heard.final("fourth").error == NO_WORKER
        add_local(router, "new", CONFIG, in_thread(shadow_engine())).handle.start()
        assert router.is_alive
        router.add(make_request("fifth"))
        assert heard.final("fifth").error is None
        assert router.workers[0].number == 0  # the lowest that is free


def test_a_worker_that_is_leaving_gets_no_more():
    with routed(shadow_engines(2), "round-robin") as (router, heard):
        router.leaving(router.workers[0].handle)
        for request in made(6):
            router.add(request)
        for request in made(6):
            assert heard.final(request.request_id).error is None
        assert {record.engine for record in heard.records()} == {1}


def test_an_abort_goes_to_the_worker_that_has_the_request():
    engines, devices = zip(*(breakable_engine(executor()) for _ in range(2)), strict=True)
    with routed(engines, "round-robin") as (router, heard):
        for device in devices:
            device.gate.clear()
        for name in "abcd":
            router.add(make_request(name, max_tokens=8))
        router.abort("b")
        router.abort("unknown")
        for device in devices:
            device.gate.set()
        assert heard.final("b").finish_reason is FinishReason.ABORT
        for name in "acd":
            assert heard.final(name).finish_reason is FinishReason.LENGTH
        router.abort("a")  # it has ended


def test_an_id_that_is_in_use():
    engine, device = breakable_engine(executor())
    with routed([engine, shadow_engine()]) as (router, heard):
        device.gate.clear()
        router.add(make_request("a"))
        with pytest.raises(ValueError, match="a is in use"):
            router.add(make_request("a"))
        device.gate.set()
        heard.final("a")
        router.add(make_request("a", max_tokens=1))


def test_what_no_worker_could_compute_is_refused_once():
    with routed(shadow_engines(2)) as (router, heard):
        router.add(make_request("long", range(1, 99), max_tokens=99))
        assert "maximum context length" in heard.final("long").error


@pytest.mark.parametrize("how", ["stop", "give_up"])
def test_the_end_ends_every_request_once(how):
    engines, devices = zip(*(breakable_engine(executor()) for _ in range(3)), strict=True)
    with routed(engines, "round-robin") as (router, heard):
        for device in devices:
            device.gate.clear()
        for request in made(9):
            router.add(request)
        if how == "stop":
            router.stop(0.01)
        else:
            router.give_up()
        expected = FinishReason.ABORT if how == "stop" else FinishReason.ERROR
        for request in made(9):
            assert heard.final(request.request_id).finish_reason is expected
        router.add(make_request("late"))
        assert heard.final("late").error == (STOPPED if how == "stop" else HUNG)
        assert not router.has_work
        for device in devices:
            device.gate.set()


def test_records_tell_of_all_engines_as_of_one():
    engines, devices = zip(*(breakable_engine(executor()) for _ in range(2)), strict=True)
    with routed(engines, "round-robin") as (router, heard):
        devices[1].gate.clear()
        router.add(make_request("a", range(1, 9), max_tokens=20))
        router.add(make_request("b", range(1, 9), max_tokens=2))
        heard.final("a")
        first = [r for r in heard.records() if r.engine == 0]
        assert {r.num_blocks for r in first} == {2 * CONFIG.num_blocks}
        # The other one has told nothing so far; this one runs a request, and at last none.
        assert [r.num_running for r in first] == [1] * 19 + [0]
        assert first[-2].num_free_blocks < 2 * CONFIG.num_blocks == first[-1].num_free_blocks
        devices[1].gate.set()
        heard.final("b")
        last = heard.records()[-1]
        assert (last.engine, last.num_running, last.num_free_blocks) == (1, 0, 128)
        router.leave(router.workers[1].handle)
        router.add(make_request("c"))
        heard.final("c")
        assert heard.records()[-1].num_blocks == CONFIG.num_blocks


def test_predicted_sends_a_prefix_where_it_is():
    with routed(shadow_engines(3), "predicted") as (router, heard):
        hits = 0
        for turn in range(4):
            for talk in range(3):
                name = f"{talk}-{turn}"
                size = 20 + 8 * turn
                router.add(make_request(name, [talk + 1] * size, max_tokens=2))
                hits += heard.final(name).num_cached_tokens
        assert hits >= 3 * (16 + 24 + 32)


def test_events_are_believed_and_so_is_what_was_sent_just_now():
    index = PrefixIndex()
    with routed(shadow_engines(3), "predicted", index=index) as (router, heard):
        for worker in router.workers:
            worker.tells_events = True
        prompt = range(1, 42)
        index.stored("w2", prompt_hashes(make_request("x", prompt), CONFIG))
        router.add(make_request("a", prompt, max_tokens=1))
        heard.final("a")
        assert heard.records()[-1].engine == 2  # where it is, by its events
        other = [7] * 41  # nobody has it, and no event says that it was sent
        engines = []
        for name in "bcd":
            router.add(make_request(name, other, max_tokens=1))
            heard.final(name)
            engines.append(heard.records()[-1].engine)
        assert len(set(engines)) == 1


def test_many_requests_while_workers_come_and_go():
    """Workers break and others join under load: each request ends once, right or with an error."""
    source = random.Random(8)
    engine, device = breakable_engine(executor())
    devices = [device]
    with routed([engine], "least-loaded") as (router, heard):

        def another():
            added, its_device = breakable_engine(executor())
            devices.append(its_device)
            name = f"new{len(devices)}"
            add_local(router, name, CONFIG, in_thread(added)).handle.start()

        another()
        another()
        requests = made(400, seed=9)
        for number, request in enumerate(requests):
            router.add(request)
            if number % 40 == 39:
                another()
                devices[source.randrange(len(devices))].lose()
            if number % 60 == 59:
                gone = [w for w in router.workers if not w.handle.is_alive]
                for worker in gone:
                    router.leave(worker.handle)
            if number % 7 == 0:
                router.abort(f"r{source.randrange(number + 1)}")
        num_right = 0
        for request, again in zip(requests, made(400, seed=9), strict=True):
            final = heard.final(request.request_id)
            tokens = [t.token_id for t in heard.tokens(request.request_id)]
            wanted = generate_alone(again)
            assert tokens == wanted[: len(tokens)]
            if final.finish_reason is FinishReason.ERROR:
                assert final.error == LOST
            elif final.finish_reason is not FinishReason.ABORT:
                assert tokens == wanted
                num_right += 1
        assert num_right > 200
        for worker in router.workers:
            assert not any(worker.view(0)[1:])
