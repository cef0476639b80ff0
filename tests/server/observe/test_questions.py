"""Where a request's time went, asked over HTTP."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx2
import pytest
from fakes import make_request
from server.fakes_server import MODEL, SpeakingExecutor, chunks, make_app, post, wait_until
from starlette.testclient import TestClient

from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.cache_miss import CacheMiss, MissReason
from duetto.core.request import FinishReason
from duetto.core.shape import BatchShape, RequestShape
from duetto.core.timings import Part
from duetto.server.http.json_parts import NUM_AT_ONCE
from duetto.server.observe import questions
from duetto.server.observe.explain import so_far, timeline
from duetto.server.observe.history import Ended, History, RememberedStep
from duetto.server.observe.miss import cache_miss
from duetto.server.observe.questions import _item_parts
from duetto.server.observe.timeline import Steps, segments, trace

TEXT = "Hello!"
PROMPT = "a prompt of more than one block"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100}


@pytest.fixture
def client():
    app, _ = make_app(SpeakingExecutor(TEXT, step_s=0.001))
    with TestClient(app) as made:
        made.history = app.state.relay.history
        yield made


def all_steps_are_told(client, count):
    """The record of a step comes after its updates, so after the reply."""
    wait_until(lambda: len(client.history.steps()) == count)


def test_a_timeline_adds_up_and_says_why(client):
    body = post(client, "/v1/completions", COMPLETION)
    all_steps_are_told(client, len(TEXT) + 1)
    got = client.get(f"/v1/requests/{body['id']}/timeline").json()
    (choice,) = got["choices"]
    assert (choice["prompt_tokens"], choice["completion_tokens"]) == (len(PROMPT), len(TEXT) + 1)
    assert sum(choice["parts_ms"].values()) == pytest.approx(choice["total_ms"], abs=0.01)
    assert choice["parts_ms"] == body["timings"]["parts_ms"]
    kinds = [(s["kind"], s.get("tokens")) for s in choice["segments"]]
    assert kinds == [("wait", None), ("prompt", len(PROMPT)), ("decode", len(TEXT))]
    last = choice["segments"][-1]
    assert last["start_ms"] + last["ms"] <= choice["total_ms"] + 0.002  # rounded, each
    assert choice["segments_are_whole"] and choice["finish_reason"] == "stop"
    assert choice["cache_miss"] == {"reason": "never_seen", "token": 0, "differs_at": None}
    assert choice["why"].endswith(".") and f"{choice['total_ms']:.1f} ms" in choice["why"]
    same = client.get(f"/v1/requests/{choice['id']}/timeline").json()
    assert same["choices"] == got["choices"]


def test_every_choice_of_a_reply_has_its_timeline(client):
    body = post(client, "/v1/completions", {**COMPLETION, "n": 3})
    wait_until(lambda: len(client.history.ended(b"")) == 3)
    choices = client.get(f"/v1/requests/{body['id']}/timeline").json()["choices"]
    ids = [choice["id"] for choice in choices]
    assert ids == sorted(ids) and len(set(ids)) == 3
    listed = client.get("/v1/requests").json()["data"]
    assert {one["id"] for one in listed} == set(ids)


def test_the_reason_of_a_miss_is_in_the_timings(client):
    def miss(**more):
        return post(client, "/v1/completions", {**COMPLETION, **more})["timings"]["cache_miss"]

    assert miss()["reason"] == "never_seen"
    assert miss() is None
    assert miss(prompt="ab") == {"reason": "too_short", "token": 0, "differs_at": None}
    differs = {"reason": "differs", "token": 8, "differs_at": 9}
    assert miss(prompt=PROMPT[:9] + "X and more") == differs
    # That others have the same text is their secret, unless nobody but this machine's user asks.
    assert miss(cache_salt="mine")["reason"] == "never_seen"


def test_that_others_have_the_text_is_told_only_to_who_is_alone():
    miss = CacheMiss(MissReason.OTHER_SALT, 0)
    assert cache_miss(miss, tells_other_salts=True)["reason"] == "other_salt"
    assert cache_miss(miss, tells_other_salts=False)["reason"] == "never_seen"
    # As it would be without the others, or the difference would tell.
    miss = CacheMiss(MissReason.OTHER_SALT, 0, 2)
    alone = {"reason": "differs", "token": 0, "differs_at": 2}
    assert cache_miss(miss, tells_other_salts=False) == alone
    assert cache_miss(miss, tells_other_salts=True)["differs_at"] is None
    app, _ = make_app(SpeakingExecutor(TEXT), only_local_hosts=True)
    with TestClient(app, base_url="http://localhost") as client:
        post(client, "/v1/completions", COMPLETION)
        got = post(client, "/v1/completions", {**COMPLETION, "cache_salt": "mine"})
        assert got["timings"]["cache_miss"]["reason"] == "other_salt"


def test_an_unknown_request_is_404(client):
    post(client, "/v1/completions", COMPLETION)
    for name in ("cmpl-", "nope", "%20", "a" * 32):
        reply = client.get(f"/v1/requests/{name}/timeline")
        assert reply.status_code == 404 and "error" in reply.json()


def test_a_request_that_runs_tells_what_it_did_so_far():
    app, _ = make_app(SpeakingExecutor(TEXT, step_s=0.1))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        history = app.state.relay.history
        reply = pool.submit(post, client, "/v1/completions", COMPLETION)
        wait_until(lambda: len(history.steps()) == 2)
        (running,) = history.running(b"")
        got = client.get(f"/v1/requests/{running.request_id}/timeline")
        (choice,) = got.json()["choices"]
        assert got.status_code == 200 and choice["finish_reason"] is None
        assert choice["completion_tokens"] >= 2 and "still running" in choice["why"]
        assert [s["kind"] for s in choice["segments"]] == ["wait", "prompt", "decode"]
        assert choice["segments_are_whole"] and choice["total_ms"] > 200
        assert history.running(b"another tenant") == []
        body = reply.result(10)
        assert history.running(b"") == []
        ended = client.get(f"/v1/requests/{body['id']}/timeline").json()["choices"]
        assert [one["finish_reason"] for one in ended] == ["stop"]


def test_a_request_in_the_queue_waits_and_says_so():
    history = History(max_steps=3)
    history.record_arrival(make_request("w", range(8)))
    for start in (1.0, 2.0, 3.0):
        history.record_step(step(start, {"a": (1, 8)}))
    (running,) = history.running(b"")
    told = so_far(running, of("w", history.steps()), 4.0, is_whole=history.remembers_since(0.0))
    assert told["segments"] == [{"kind": "wait", "start_ms": 0.0, "ms": 4000.0}]
    assert "waits in the queue" in told["why"] and told["segments_are_whole"]
    history.record_step(step(4.0, {"w": (8, 0)}, prompt_tokens=8))
    told = so_far(running, of("w", history.steps()), 5.0, is_whole=history.remembers_since(0.0))
    assert "prompt is being computed" in told["why"] and not told["segments_are_whole"]


def test_a_tenant_sees_its_own_requests_only():
    app, _ = make_app(SpeakingExecutor(TEXT), api_keys=("one", "two"))
    with TestClient(app) as client:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = client.post("/v1/completions", json=COMPLETION, headers=mine).json()
        path = f"/v1/requests/{body['id']}/timeline"
        assert client.get(path, headers=mine).status_code == 200
        assert client.get(path, headers=theirs).status_code == 404
        assert client.get("/v1/requests", headers=theirs).json()["data"] == []
        wait_until(lambda: len(app.state.relay.history.steps()) == len(TEXT) + 1)
        whole = client.get("/debug/steps.json", headers=theirs).text
        assert body["id"].removeprefix("cmpl-") not in whole and '"7 tokens"' not in whole
        assert (
            body["id"].removeprefix("cmpl-") in client.get("/debug/steps.json", headers=mine).text
        )


def test_the_steps_are_a_trace(client):
    post(client, "/v1/completions", COMPLETION)
    all_steps_are_told(client, len(TEXT) + 1)
    events = client.get("/debug/steps.json").json()["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [e["args"]["tokens"] for e in steps] == [len(PROMPT)] + [1] * len(TEXT)
    for before, after in pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2  # microseconds, rounded
    mine = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert mine == ["wait", "prompt", "decode"]
    assert {e["ph"] for e in events} == {"X", "C", "M"}


def test_a_stream_that_is_not_read_shows_in_the_readers_part(client):
    last = chunks(client, "/v1/completions", COMPLETION)[-1]["timings"]
    assert sum(last["parts_ms"].values()) == pytest.approx(last["total_ms"], abs=0.01)
    history = History()
    history.record_update(*ended_request())
    history.record_delivery("r0", 9.0)
    (ended,) = history.ended(b"")
    assert ended.reader_s == 4.0 and ended.total_s == 9.0
    told = timeline(ended, of("r0", []), tells_other_salts=False)
    assert sum(told["parts_ms"].values()) == told["total_ms"] == 9000.0
    assert "client had not read" in told["why"] or told["parts_ms"]["reader"] < 4500


def ended_request(name="r0", waited_s=1.0):
    request = make_request(name, range(8))
    timings = request.timings
    timings.account(Part.WAITING, waited_s)
    timings.account(Part.PROMPT, 5.0)
    timings.token_times, timings.finish_time = [5.0], 5.0
    timings.first_scheduled_time = waited_s
    update = RequestUpdate(name, finish_reason=FinishReason.LENGTH, timings=timings)
    return request, update


def step(start, requests, *, prompt_tokens=0, predicted_s=None):
    """A step of one second; `requests` maps ids to (new, past)."""
    shape = BatchShape(tuple(RequestShape(new, past) for new, past in requests.values()))
    return StepRecord(
        start_time=start,
        end_time=start + 1.0,
        num_tokens=shape.num_tokens,
        num_prompt_tokens=prompt_tokens,
        num_scheduled=len(requests),
        num_running=len(requests),
        num_waiting=0,
        num_free_blocks=1,
        num_blocks=2,
        num_preemptions=0,
        num_queried_tokens=0,
        num_hit_tokens=0,
        shape=shape,
        request_ids=tuple(requests),
        predicted_s=predicted_s,
    )


STEPS = [
    step(1.0, {"a": (6, 0)}, prompt_tokens=6, predicted_s=0.5),
    step(2.0, {"a": (2, 6), "b": (3, 0)}, prompt_tokens=5, predicted_s=0.5),
    step(3.0, {"a": (1, 8), "b": (9, 3)}, prompt_tokens=9, predicted_s=0.5),
    step(4.0, {"a": (1, 9), "b": (1, 12)}, predicted_s=0.5),
    step(7.0, {"a": (6, 0), "b": (1, 13)}, prompt_tokens=6, predicted_s=0.5),
    step(8.0, {"a": (4, 6), "b": (1, 14)}, prompt_tokens=4, predicted_s=0.5),
    step(9.0, {"a": (1, 10), "b": (1, 15)}, predicted_s=0.5),
]


def of(name, records, roof_time=None):
    return Steps([kept(record) for record in records], [name], roof_time)


def kept(record):
    return record if isinstance(record, RememberedStep) else RememberedStep.of(record)


def ended_like(name, num_prompt, num_output, finish_time):
    request = make_request(name, range(num_prompt))
    request.timings.token_times = [finish_time] * num_output
    request.timings.first_scheduled_time, request.timings.finish_time = 1.0, finish_time
    history = History()
    history.record_update(
        request, RequestUpdate(name, finish_reason=FinishReason.LENGTH, timings=request.timings)
    )
    return history.ended(b"")[0]


def test_segments_tell_prompt_decode_shared_and_what_was_computed_again():
    found, is_whole = segments(ended_like("a", 8, 4, 10.0), of("a", STEPS, lambda shape: 0.25))
    assert is_whole
    assert [(s.kind, s.start, s.end, s.num_tokens) for s in found] == [
        ("wait", 0.0, 1.0, 0),
        ("prompt", 1.0, 3.0, 8),
        ("shared", 3.0, 4.0, 1),
        ("decode", 4.0, 5.0, 1),
        ("wait", 5.0, 7.0, 0),
        ("recompute", 7.0, 9.0, 10),
        ("decode", 9.0, 10.0, 1),
    ]
    assert found[1].num_other_prompt_tokens == 3
    prompt = found[1].shown(0.0)
    assert (prompt["busy_ms"], prompt["steps_expected_ms"], prompt["of_roof"]) == (2e3, 1e3, 0.25)


def test_segments_end_with_the_request_not_with_its_last_step():
    found, _ = segments(ended_like("a", 8, 4, 9.75), of("a", STEPS))
    last = found[-1].shown(0.0)
    assert (last["start_ms"], last["ms"], last["busy_ms"]) == (9000.0, 750.0, 750.0)
    assert last["longest_step_ms"] == 750.0


def test_forgotten_steps_are_told():
    ended = ended_like("a", 8, 4, 10.0)
    assert segments(ended, of("a", STEPS[1:])) != segments(ended, of("a", STEPS))
    assert not segments(ended, of("a", STEPS[-1:]))[1]


def test_history_is_bounded():
    history = History(max_steps=3, max_requests=2)
    for index in range(5):
        history.record_step(step(float(index), {"a": (1, index)}))
        history.record_update(*ended_request(f"r{index}"))
    assert [s.record.start_time for s in history.steps()] == [2.0, 3.0, 4.0]
    assert [e.request_id for e in history.ended(b"")] == ["r4", "r3"]
    assert all(type(e) is Ended for e in history.ended(b""))


def test_a_slow_machine_is_told_from_a_full_one():
    request, update = ended_request()
    history = History()
    request.timings.predicted_s = 1.0
    history.record_update(request, update)
    why = timeline(history.ended(b"")[0], of("r0", []), tells_other_salts=False)["why"]
    assert "computing its own prompt" in why and "4.0 times what is expected" in why
    assert "80%" in why
    waited, update = ended_request("w", waited_s=4.5)
    history.record_update(waited, update)
    why = timeline(history.ended(b"")[0], of("w", []), tells_other_salts=False)["why"]
    assert "waiting for its turn" in why and "expected" not in why


def test_a_trace_is_json_of_finite_numbers():
    text = json.dumps(
        [*trace([kept(s) for s in STEPS], [ended_like("a", 8, 4, 10.0)], lambda shape: 0.1)]
    )
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)[2]["args"]["of_roof"] == 0.1


class CountedIds(tuple):
    """The ids of a step, counting how often they are looked through."""

    num_passes = 0

    def __iter__(self):
        CountedIds.num_passes += 1
        return super().__iter__()

    def __contains__(self, item):
        return any(each == item for each in self)

    def index(self, item):
        return list(self).index(item)


def test_many_choices_cost_one_pass_over_the_steps_and_none_of_it_on_the_loop():
    """Each choice once looked through all steps, twice, and priced each again, on the event loop:
    2.4 s of it for 32 choices and a full history (benchmarks/observed.py)."""
    num_choices, num_steps, priced_on = 16, 50, []

    def price(shape):
        assert len(shape.requests) == num_choices
        priced_on.append(threading.get_ident())
        return 0.1

    app, _ = make_app(SpeakingExecutor(TEXT), roof_time=price)
    history = app.state.relay.history
    ids = [f"{'f' * 32}-0-{index}" for index in range(num_choices)]
    for number in range(num_steps):
        made = step(float(number), dict.fromkeys(ids, (1, number)))
        history.record_step(made._replace(request_ids=CountedIds(made.request_ids)))
    for each in ids:
        request, update = ended_request(each)
        update.timings.finish_time = float(num_steps)
        history.record_update(request, update)
    loop_thread = []

    async def ask():
        loop_thread.append(threading.get_ident())
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            return await asking.get(f"/v1/requests/{'f' * 32}/timeline")

    CountedIds.num_passes = 0
    choices = asyncio.run(ask()).json()["choices"]
    assert [choice["id"] for choice in choices] == sorted(ids)
    assert all(sum(s.get("steps", 0) for s in c["segments"]) == num_steps for c in choices)
    assert CountedIds.num_passes <= num_steps
    assert len(priced_on) == num_steps and not set(priced_on) & set(loop_thread)


def test_a_long_list_of_segments_is_the_same_in_parts():
    segments = [{"kind": "decode", "start_ms": float(i)} for i in range(3 * NUM_AT_ONCE + 1)]
    item = {"id": "x", "segments": segments, "why": "because"}
    assert json.loads(b"".join(_item_parts(item))) == item
    short = {"id": "x", "segments": segments[:1]}
    assert json.loads(b"".join(_item_parts(short))) == short


def test_too_many_questions_at_once_are_told_to_come_back(client, monkeypatch):
    monkeypatch.setattr(questions, "MAX_ASKED", 0)
    for path in ("/v1/requests", "/debug/steps.json"):
        reply = client.get(path)
        assert reply.status_code == 503 and "Retry-After" in reply.headers
