"""/v1/cache: what is there, what is kept, what is dropped; each tenant sees its own; no 5xx."""

import json
import random

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.fakes_server import (
    CONFIG,
    MODEL,
    SpeakingExecutor,
    has_all_blocks,
    make_app,
    running,
    wait_until,
)
from starlette.testclient import TestClient

from duetto.core.config import SchedulerConfig

KEY, OTHER = "sk-one", "sk-two"
PROMPT = "a prompt of more than one block"  # 31 tokens: seven blocks of four, and three more
CHAT = [{"role": "user", "content": "how many blocks are there in this?"}]
TEXTS = {
    "prompt": {"prompt": PROMPT},
    "ids": {"prompt": list(PROMPT.encode())},
    "messages": {"messages": CHAT},
    "salted": {"prompt": PROMPT, "cache_salt": "mine"},
}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def server():
    app, engine = make_app(SpeakingExecutor("ok"), api_keys=(KEY, OTHER))
    with TestClient(app, headers=bearer(KEY)) as client:
        yield client, engine


@pytest.fixture
def client(server):
    return server[0]


def say(client, text, **more):
    """Answer the prompt, or the chat, so that it is in the cache."""
    path = "/v1/chat/completions" if "messages" in text else "/v1/completions"
    body = {"model": MODEL, "max_tokens": 1, **text}
    reply = client.post(path, json=body, **more).json()
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask(client, path, body, status=200, **more):
    reply = client.post(f"/v1/cache/{path}", json=body, **more)
    assert reply.status_code == status, reply.text
    return reply.json()


def refused(client, path, body, param, status=400, code=None, words=""):
    error = ask(client, path, body, status)["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert words in error["message"], error
    return error["message"]


def evicted(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.labels["reason"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "duetto:kv_cache_evicted_blocks_total"
    }


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_look_up_says_what_a_request_would_find(client, text):
    assert ask(client, "lookup", text)["cached_tokens"] == 0
    assert say(client, text) == 0
    found = ask(client, "lookup", text)
    assert found["object"] == "cache.lookup"
    assert found["cached_tokens"] == say(client, text) > 20 and found["loadable_tokens"] == 0
    (part,) = found["ranges"]
    assert part == {
        "start": 0, "end": part["end"], "tier": "memory", "exact": True,
        "pinned": False, "priority": 35,
    }  # fmt: skip
    assert part["end"] % 4 == 0 and 0 <= found["num_tokens"] - part["end"] < 4
    other = {**text, "cache_salt": "another"}
    assert ask(client, "lookup", other)["cached_tokens"] == 0


def test_a_segment_is_a_text_alone_with_its_last_tokens(client):
    say(client, {"prompt": "12345678"})
    assert ask(client, "lookup", {"segment": "12345678"})["cached_tokens"] == 8
    assert ask(client, "lookup", {"prompt": "12345678"})["cached_tokens"] == 4
    assert ask(client, "lookup", {"segment": "123456789"})["cached_tokens"] == 8
    assert ask(client, "lookup", {"segment": list(b"12345678")})["cached_tokens"] == 8
    made = ask(client, "pin", {"segment": "123456789"})
    assert (made["segment"], made["num_tokens"], made["num_blocks"]) == (True, 9, 3)


def test_of_a_prompt_in_segments_it_is_told_what_is_there_of_each(client):
    say(client, {"prompt": "12345678"})
    marked = [{"text": text, "reusable": True} for text in ("12345678", "123456789", "abc")]
    prompt = {"segments": ["Read: ", *marked, [49, 50]]}
    found = ask(client, "lookup", {"prompt": prompt})
    assert (found["num_tokens"], found["cached_tokens"], found["ranges"]) == (28, 0, [])
    told = [(s["start"], s["end"], s["num_tokens"], s["cached_tokens"]) for s in found["segments"]]
    assert told == [(6, 14, 8, 8), (14, 23, 9, 8), (23, 26, 3, 0)]
    (part,) = found["segments"][0]["ranges"]
    assert (part["start"], part["end"]) == (0, 8)  # of the segment's own tokens
    parts = [{"type": "text", "text": "12345678", "cache": "reusable"}]
    parts.append({"type": "text", "text": "what?"})
    asked = {"messages": [{"role": "user", "content": parts}]}
    (only,) = ask(client, "lookup", asked)["segments"]
    assert only["end"] - only["start"] == only["cached_tokens"] == 8
    assert ask(client, "pin", asked)["segment"] is False  # its prefix
    salted = ask(client, "lookup", {"prompt": prompt, "cache_salt": "x"})
    assert [s["cached_tokens"] for s in salted["segments"]] == [0, 0, 0]
    plain = ask(client, "lookup", {"prompt": {"segments": ["1234", "5678"]}})
    assert "segments" not in plain and plain["cached_tokens"] == 4
    for path in ("pin", "unpin", "drop"):
        refused(client, path, {"prompt": prompt}, "prompt", words="send each as segment")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_pinned_stays_and_is_listed_until_it_is_unpinned(server, text):
    client, engine = server
    say(client, text)
    made = ask(client, "pin", {**text, "ttl_s": 1000})
    assert (made["id"], made["pinned"], made["priority"]) == ("pin-1", True, None)
    assert 990 < made["ttl_s"] <= 1000 and made["kept_blocks"] == made["num_blocks"] > 5
    assert made["max_kept_blocks"] == CONFIG.num_blocks // 4
    for number in range(20):  # more than the pool holds
        say(client, {"prompt": [number] * 64})
    assert say(client, text) >= made["num_tokens"] - 4
    again = ask(client, "pin", text)  # the same one, for as long as the server runs
    assert (again["id"], again["ttl_s"]) == ("pin-1", None)
    listed = client.get("/v1/cache").json()
    assert listed["object"] == "list" and not listed["has_more"] and listed["block_size"] == 4
    (only,) = listed["data"]
    assert only["id"] == "pin-1" and only["num_tokens"] == only["cached_tokens"]
    ended = ask(client, "unpin", text)
    assert ended["deleted"] and ended["kept_blocks"] == 0
    refused(client, "unpin", text, param=next(iter(text)), status=404, code="pin_not_found")
    assert client.get("/v1/cache").json()["data"] == []
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks


def test_what_is_dropped_is_computed_again(client):
    say(client, {"prompt": PROMPT})
    ask(client, "pin", {"prompt": PROMPT, "priority": 80})
    assert ask(client, "lookup", {"prompt": PROMPT})["ranges"][0]["priority"] == 80
    dropped = ask(client, "drop", {"id": "pin-1"})
    assert dropped == {
        "object": "cache.drop", "dropped_blocks": 7, "in_use_blocks": 0, "tier_blocks": 0,
        "pinned_blocks": 0, "unpinned": True,
    }  # fmt: skip
    assert evicted(client) == {"room": 0, "ttl": 0, "dropped": 7, "quota": 0}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
    reply = client.post("/v1/completions", json=body).json()
    assert (
        reply["timings"]["cache_n"] == 0 and reply["timings"]["cache_miss"]["reason"] == "dropped"
    )
    (choice,) = client.get(f"/v1/requests/{reply['id']}/timeline").json()["choices"]
    assert choice["cache"].endswith("was there, and was dropped by a user of the cache")
    assert ask(client, "drop", {"prompt": "never seen, but longer"})["dropped_blocks"] == 0
    refused(client, "drop", {"id": "pin-1"}, "id", 404, "pin_not_found", "GET /v1/cache lists")


def test_evictions_are_counted_by_their_reasons(client):
    say(client, {"prompt": PROMPT})
    ask(client, "pin", {"prompt": PROMPT, "ttl_s": 1e-9})
    for number in range(20):
        say(client, {"prompt": [number] * 64})
    counts = evicted(client)
    assert counts["ttl"] == 7 and counts["room"] > 0 and not counts["dropped"]


def test_pins_are_shown_as_in_use(client):
    ask(client, "pin", {"prompt": PROMPT})
    say(client, {"prompt": PROMPT})

    def value(name):
        families = text_string_to_metric_families(client.get("/metrics").text)
        return next(f.samples[0].value for f in families if f.name == name)

    assert value("duetto:kv_cache_pinned_blocks") == 7
    assert value("vllm:kv_cache_usage_perc") == 7 / CONFIG.num_blocks
    ask(client, "unpin", {"id": "pin-1"})
    assert value("duetto:kv_cache_pinned_blocks") == 0


def test_no_tenant_sees_or_ends_what_is_anothers(client):
    other = {"headers": bearer(OTHER)}
    say(client, {"prompt": PROMPT})
    ask(client, "pin", {"prompt": PROMPT})
    assert ask(client, "lookup", {"prompt": PROMPT}, **other)["cached_tokens"] == 0
    assert client.get("/v1/cache", **other).json()["data"] == []
    for body in ({"id": "pin-1"}, {"prompt": PROMPT}):
        ask(client, "unpin", body, 404, **other)
    ask(client, "drop", {"id": "pin-1"}, 404, **other)
    assert ask(client, "drop", {"prompt": PROMPT}, **other)["dropped_blocks"] == 0
    made = ask(client, "pin", {"prompt": PROMPT}, **other)
    assert (made["id"], made["cached_tokens"], made["kept_blocks"]) == ("pin-1", 0, 7)
    assert ask(client, "lookup", {"prompt": PROMPT})["ranges"][0]["pinned"]


def test_a_key_is_needed(client):
    for path in ("lookup", "pin", "unpin", "drop"):
        reply = client.post(f"/v1/cache/{path}", json={}, headers={"Authorization": "no"})
        assert reply.status_code == 401
    assert client.get("/v1/cache", headers={"Authorization": "no"}).status_code == 401


def test_pins_are_listed_in_pages(client):
    for number in range(5):
        ask(client, "pin", {"prompt": [number] * 4})
    first = client.get("/v1/cache?limit=2").json()
    assert [p["id"] for p in first["data"]] == ["pin-1", "pin-2"] and first["has_more"]
    ask(client, "unpin", {"id": "pin-2"})  # a page may begin behind one that has ended
    rest = client.get("/v1/cache?after=pin-2&limit=100").json()
    assert [p["id"] for p in rest["data"]] == ["pin-3", "pin-4", "pin-5"] and not rest["has_more"]
    for query, param in (
        *(("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=²", "limit")),
        *(("after=pin-0", "after"), ("after=3", "after"), ("after=" + "9" * 5000, "after")),
    ):
        reply = client.get(f"/v1/cache?{query}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_quota_is_refused_with_the_numbers_and_changes_nothing(client):
    ask(client, "pin", {"prompt": [1] * 240})
    message = refused(
        client, "pin", {"prompt": [2] * 24}, "prompt", code="pin_quota_exceeded",
        words="has 6 blocks, 6 of which are not kept so far; with 60 that are, a client may keep",
    )  # fmt: skip
    assert message.startswith("prompt: ") and "unpin something" in message
    assert len(client.get("/v1/cache").json()["data"]) == 1
    ask(client, "pin", {"prompt": [2] * 16})


def test_without_a_prefix_cache_there_is_nothing_to_ask():
    config = SchedulerConfig(
        num_blocks=64, max_model_len=64, block_size=4, enable_prefix_caching=False
    )
    app, _ = make_app(SpeakingExecutor("ok"), config)
    with TestClient(app) as client:
        for path in ("lookup", "pin", "unpin", "drop"):
            refused(client, path, {"prompt": PROMPT}, "cache", words="--enable-prefix-caching")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("lookup", {}, "prompt"),
        ("lookup", {"prompt": "a", "segment": "a"}, "segment"),
        ("lookup", {"prompt": "a", "id": "pin-1"}, "id"),
        ("lookup", {"prompt": ""}, "prompt"),
        ("lookup", {"prompt": []}, "prompt"),
        ("lookup", {"segment": []}, "segment"),
        ("lookup", {"segment": ["a"]}, "segment[0]"),
        ("lookup", {"prompt": [300]}, "prompt"),
        ("lookup", {"segment": [-1]}, "segment"),
        ("lookup", {"prompt": [2**70]}, "prompt"),
        ("lookup", {"prompt": [1] * 514}, "prompt"),
        ("lookup", {"prompt": "a" * 600}, "prompt"),
        ("lookup", {"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
        ("lookup", {"prompt": [1.5]}, "prompt[0]"),
        ("lookup", {"prompt": {}}, "prompt.segments"),
        ("lookup", {"prompt": {"segments": []}}, "prompt.segments"),
        ("lookup", {"prompt": {"segments": ["a", {}]}}, "prompt.segments[1]"),
        ("lookup", {"prompt": {"segments": ["a", [300]]}}, "prompt"),
        ("lookup", {"prompt": {"segments": ["a" * 300, "a" * 300]}}, "prompt"),
        ("lookup", {"prompt": {"segments": [{"text": "a", "reusable": True}] * 257}}, "prompt"),
        ("lookup", {"prompt": {"segments": ["a"]}, "documents": [{"text": "a"}]}, "documents"),
        ("lookup", {"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ("lookup", {"prompt": "a", "cache_salt": "x" * 129}, "cache_salt"),
        ("lookup", {"prompt": "a", "ttl_s": 3}, "ttl_s"),
        ("lookup", {"prompt": [1], "add_special_tokens": False}, "add_special_tokens"),
        ("lookup", {"segment": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("lookup", {"segment": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ("lookup", {"prompt": "a", "reasoning_effort": "low"}, "reasoning_effort"),
        ("lookup", {"prompt": "a", "tools": [{}]}, "tools"),
        ("lookup", {"messages": [{"role": "forbidden", "content": "x"}]}, "messages[0].role"),
        ("pin", {"prompt": "abc"}, "prompt"),
        ("pin", {"prompt": PROMPT, "ttl_s": 0}, "ttl_s"),
        ("pin", {"prompt": PROMPT, "ttl_s": -1}, "ttl_s"),
        ("pin", {"prompt": PROMPT, "ttl_s": 1e300}, "ttl_s"),
        ("pin", {"prompt": PROMPT, "ttl_s": "5m"}, "ttl_s"),
        ("pin", {"prompt": PROMPT, "ttl_s": True}, "ttl_s"),
        ("pin", {"prompt": PROMPT, "ttl": 5}, "ttl"),
        ("pin", {"prompt": PROMPT, "priority": 101}, "priority"),
        ("pin", {"prompt": PROMPT, "priority": -(2**70)}, "priority"),
        ("pin", {"prompt": PROMPT, "priority": 1.5}, "priority"),
        ("unpin", {}, "id"),
        ("unpin", {"id": "pin-1", "prompt": "a"}, "prompt"),
        ("unpin", {"id": 1}, "id"),
        ("unpin", {"id": "pin-1", "cache_salt": "x"}, "cache_salt"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_by_their_field(client, path, body, param):
    error = ask(client, path, body, 400)["error"]
    assert error["param"] == param, error
    assert client.get("/v1/cache").json()["data"] == []


@pytest.mark.parametrize(
    "pin_id", ["", "pin-", "pin-0", "pin-01", "pin-x", "1", "pin-" + "9" * 999, "pin-١"]
)
def test_ids_of_no_pin_are_not_found(client, pin_id):
    for path in ("unpin", "drop"):
        refused(client, path, {"id": pin_id}, "id", 404, "pin_not_found")


def test_another_model_is_unknown(client):
    refused(client, "lookup", {"prompt": "a", "model": "x"}, "model", 404, "model_not_found")


def test_hostile_bodies_are_no_bugs(server):
    """Fields of every kind at random: each is answered or refused, and the engine goes on."""
    client, engine = server
    rng = random.Random(0)
    values = [
        *(None, True, 0, -1, 35, 2**63, 1e-300, 1e300, "", "pin-1", PROMPT, "\ud800", [], [1] * 40),
        *(["a"], [[1]], {}, {"a": 1}, [{"role": "user", "content": "hi"}], [None], "x" * 400),
    ]
    names = [
        *("prompt", "messages", "segment", "id", "ttl_s", "priority", "cache_salt", "model"),
        *("add_special_tokens", "chat_template_kwargs", "reasoning_effort", "user", "zzz"),
    ]
    statuses = set()
    for _ in range(400):
        body = {name: rng.choice(values) for name in rng.sample(names, rng.randrange(1, 4))}
        path = rng.choice(("lookup", "pin", "unpin", "drop"))
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        reply = client.post(f"/v1/cache/{path}", content=content, headers=headers)
        statuses.add(reply.status_code)
        assert reply.status_code < 500, (body, reply.text)
    for content in (b"", b"[", b"null", b"[]", b'"x"', b"\xff", b"[" * 9999, b'{"prompt":NaN}'):
        for path in ("lookup", "pin", "unpin", "drop"):
            assert client.post(f"/v1/cache/{path}", content=content).status_code == 400
    assert {200, 400, 404} <= statuses
    assert client.get("/v1/cache/pin").status_code == 405
    engine.scheduler.check()
    say(client, {"prompt": PROMPT})


def test_names_of_other_servers_lead_here(client):
    for path, here in (("/lookup", "/v1/cache/lookup"), ("/v1beta/cachedContents", "/v1/cache")):
        assert f"did you mean {here}?" in client.get(path).json()["error"]["message"]


def test_an_engine_that_has_ended_is_told(server):
    client, _ = server
    app = client.app
    app.state.relay._running_handle().give_up()
    assert client.post("/v1/cache/lookup", json={"prompt": PROMPT}).status_code == 503
    assert client.get("/v1/cache").status_code == 503


def test_it_answers_while_requests_run():
    app, engine = make_app(SpeakingExecutor(step_s=0.02))
    with running(app) as url, httpx2.Client(base_url=url) as client:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 480, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # the stream lasts as long as this
            next(lines)
            assert ask(client, "lookup", {"prompt": PROMPT})["cached_tokens"] == 28
            dropped = ask(client, "drop", {"prompt": PROMPT})
            assert dropped["in_use_blocks"] == dropped["dropped_blocks"] == 7
            assert ask(client, "lookup", {"prompt": PROMPT})["cached_tokens"] == 0
            next(lines)
        wait_until(lambda: has_all_blocks(engine))
