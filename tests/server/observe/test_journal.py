"""What the log says of requests and of the engine, and that nobody can write into it."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from server.fakes_server import MODEL, SpeakingExecutor, chunks, make_app, post, running, wait_until
from starlette.testclient import TestClient

from duetto.server.observe import journal
from duetto.server.observe.history import History

TEXT = "Hello!"
PROMPT = "a prompt of more than one block"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}


@pytest.fixture
def client(caplog):
    caplog.set_level(logging.INFO, logger="duetto")
    with TestClient(make_app(SpeakingExecutor(TEXT, step_s=0.001))[0]) as made:
        yield made


def lines(caplog, kind="request"):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"{kind} ")]


def fields(line):
    return dict(pair.split("=", 1) for pair in line.split(" ")[1:])


def test_a_request_has_one_line_with_its_numbers(client, caplog):
    body = post(client, "/v1/completions", COMPLETION)
    (line,) = lines(caplog)
    told, timings = fields(line), body["timings"]
    assert told["prompt_tokens"] == str(len(PROMPT)) and told["cached_tokens"] == "0"
    assert told["output_tokens"] == str(len(TEXT) + 1) and told["choices"] == "1"
    assert float(told["ttft_ms"]) == pytest.approx(timings["ttft_ms"], abs=0.1)
    assert float(told["e2e_ms"]) == pytest.approx(timings["total_ms"], abs=0.1)
    assert 0 < float(told["itl_mean_ms"]) <= float(told["itl_max_ms"])
    assert told["finish"] == "stop" and told["tenant"] == "-"
    post(client, "/v1/completions", COMPLETION)
    assert fields(lines(caplog)[-1])["cached_tokens"] == "28"


@pytest.mark.parametrize("stream", [False, True])
def test_all_choices_of_a_reply_are_one_line(client, caplog, stream):
    asked = {**COMPLETION, "prompt": ["abcd", "abcdef"], "n": 3, "max_tokens": 2}
    if stream:
        chunks(client, "/v1/completions", asked)
    else:
        post(client, "/v1/completions", asked)
    (line,) = lines(caplog)
    told = fields(line)
    assert (told["prompt_tokens"], told["output_tokens"], told["choices"]) == ("10", "12", "6")
    assert told["finish"] == "length"


def test_one_token_has_no_gap(client, caplog):
    post(client, "/v1/completions", {**COMPLETION, "max_tokens": 1})
    told = fields(lines(caplog)[0])
    assert (told["itl_mean_ms"], told["itl_max_ms"]) == ("-", "-") and told["ttft_ms"] != "-"


@pytest.mark.parametrize(
    ("path", "asked"), [("completions", COMPLETION), ("chat/completions", CHAT)]
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sent", [None, "trace/1:2", "cmpl-mine", "chatcmpl-mine"])
def test_one_id_in_the_header_the_reply_the_log_and_the_timeline(
    client, caplog, path, asked, stream, sent
):
    headers = {} if sent is None else {"X-Request-Id": sent}
    reply = client.post(f"/v1/{path}", json={**asked, "stream": stream}, headers=headers)
    name = reply.headers["X-Request-Id"]
    reply_id = re.search(r'"id":"(.*?)"', reply.text)[1]
    assert sent is None or name == sent
    assert reply_id in (f"cmpl-{name}", f"chatcmpl-{name}")
    told = fields(lines(caplog)[0])
    assert told["id"] == name
    ids = [name, reply_id] if sent is None else [name, reply_id, told["own_id"]]
    answers = [client.get(f"/v1/requests/{one}/timeline").json()["choices"] for one in ids]
    assert len(answers[0]) == 1 and answers[0][0]["request_id"] == name
    assert all(answer == answers[0] for answer in answers)
    listed = client.get("/v1/requests").json()["data"]
    assert [one["request_id"] for one in listed] == [name]


def test_a_label_that_comes_again_means_the_newest(client, caplog):
    headers, ids = {"X-Request-Id": "same"}, []
    for length in (1, 2, 3):
        asked = {**COMPLETION, "max_tokens": length}
        reply = client.post("/v1/completions", json=asked, headers=headers)
        assert reply.headers["X-Request-Id"] == "same"
        ids.append(reply.json()["id"])
    assert ids[0] == "cmpl-same" and len(set(ids)) == 3
    assert all(one.startswith("cmpl-same") for one in ids)
    assert [fields(line)["id"] for line in lines(caplog)] == [i[len("cmpl-") :] for i in ids]

    def num_tokens(name):
        (choice,) = client.get(f"/v1/requests/{name}/timeline").json()["choices"]
        return choice["completion_tokens"]

    assert num_tokens("same") == 3
    own = [fields(line)["own_id"] for line in lines(caplog)]
    assert [num_tokens(name) for name in own] == [1, 2, 3]
    assert [num_tokens(name) for name in ids] == [1, 2, 3]
    # One that is refused takes nothing from those that were answered.
    wrong = {**COMPLETION, "prompt": "x" * 600}
    assert client.post("/v1/completions", json=wrong, headers=headers).status_code == 400
    assert num_tokens("same") in (1, 3)


def test_labels_are_forgotten():
    history = History(max_requests=2)
    names = [history.claim(b"", str(i), f"{i:032}") for i in (1, 1, 2, 3, 4, 5, 1)]
    assert names == ["1", "1-00000000", "2", "3", "4", "5", "1"]


def test_a_label_finds_nothing_of_another_tenant(caplog):
    caplog.set_level(logging.INFO, logger="duetto")
    app, _ = make_app(SpeakingExecutor(TEXT), api_keys=("one", "two"))
    with TestClient(app) as client:
        mine, theirs = (
            {"Authorization": f"Bearer {key}", "X-Request-Id": "label"} for key in ("one", "two")
        )
        salted = {**COMPLETION, "cache_salt": "secretsalt"}
        assert client.post("/v1/completions", json=salted, headers=mine).status_code == 200
        path = "/v1/requests/label/timeline"
        assert client.get(path, headers=theirs).status_code == 404
        client.post("/v1/completions", json={**COMPLETION, "max_tokens": 1}, headers=theirs)
        tokens = [
            client.get(path, headers=who).json()["choices"][0]["completion_tokens"]
            for who in (mine, theirs)
        ]
        assert tokens == [len(TEXT) + 1, 1]
    tenants = [fields(line)["tenant"] for line in lines(caplog)]
    assert len(set(tenants)) == 2 and all(re.fullmatch("[0-9a-f]{8}", t) for t in tenants)
    assert "secretsalt" not in caplog.text and "Bearer" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/v1/completions", {**COMPLETION, "SECRET text": 1}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {**COMPLETION, "prompt": "SECRET" * 99}, 400,
         "context_length_exceeded"),
        ("POST", "/v1/completions", {**COMPLETION, "model": "SECRET"}, 404, "model_not_found"),
        ("POST", "/v1/SECRET%0AINFO%20forged", COMPLETION, 404, "unknown_url"),
        ("SECRET", "/v1/completions", None, 405, "invalid_request_error"),
        ("GET", "/v1/requests/SECRET/timeline", None, 404, "request_not_found"),
    ],
)  # fmt: skip
def test_what_is_refused_has_a_line_without_the_callers_words(
    client, caplog, method, path, body, status, reason
):
    reply = client.request(method, path, json=body)
    assert reply.status_code == status
    (line,) = lines(caplog, "refused")
    told = fields(line)
    assert told["id"] == reply.headers["X-Request-Id"] and told["status"] == str(status)
    assert told["reason"] == reason
    assert not lines(caplog) and "SECRET" not in line and "\n" not in line


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"stop": [1]}, "stop"),
        ({"SECRET": 1}, "-"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_the_field_at_fault_is_told_if_it_is_ours(client, caplog, more, field):
    assert client.post("/v1/completions", json={**COMPLETION, **more}).status_code == 400
    assert fields(lines(caplog, "refused")[0])["param"] == field and "SECRET" not in caplog.text


def test_a_wrong_key_has_a_line(caplog):
    caplog.set_level(logging.INFO, logger="duetto")
    app, _ = make_app(SpeakingExecutor(TEXT), api_keys=("one",))
    with TestClient(app) as client:
        client.post("/v1/completions", json=COMPLETION, headers={"Authorization": "Bearer SECRET"})
    (line,) = lines(caplog, "refused")
    assert "reason=invalid_api_key" in line and "SECRET" not in caplog.text


@pytest.mark.parametrize(
    "sent", ["a\nINFO forged", "a\r\n\tid=2 x", "\x1b[31mred", "é\u2028b", " "]
)
def test_a_label_cannot_forge_a_line(client, caplog, sent):
    headers = {"X-Request-Id": sent.encode()}
    assert client.post("/v1/completions", json=COMPLETION, headers=headers).status_code == 200
    (line,) = lines(caplog)
    assert line.isascii() and line.isprintable()
    assert list(fields(line)).count("id") == 1 and len(line.split(" ")) <= 13


def test_no_text_is_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    post(client, "/v1/completions", COMPLETION)
    post(client, "/v1/chat/completions", CHAT)
    post(client, "/tokenize", {"prompt": PROMPT})
    assert PROMPT not in caplog.text and TEXT not in caplog.text and "Hello" not in caplog.text


def test_a_client_that_leaves_has_a_line(caplog):
    caplog.set_level(logging.INFO, logger="duetto")
    executor = SpeakingExecutor(step_s=0.01)
    with running(make_app(executor)[0]) as url:
        asked = {**COMPLETION, "max_tokens": 400, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked) as reply:
            next(reply.iter_raw())
            name = reply.headers["X-Request-Id"]
        wait_until(lambda: lines(caplog))
        told = fields(lines(caplog)[0])
        assert told["id"] == name and told["finish"] == "abort"
        assert 0 < int(told["output_tokens"]) < 400
        assert not lines(caplog, "refused")


def test_a_step_that_fails_has_a_line(caplog):
    caplog.set_level(logging.INFO, logger="duetto")
    executor = SpeakingExecutor(TEXT)
    executor.fails = True
    with TestClient(make_app(executor)[0]) as client:
        assert client.post("/v1/completions", json=COMPLETION).status_code == 500
    (line,) = lines(caplog)
    assert "finish=error" in line and not lines(caplog, "refused")


def test_throughput_is_told_while_busy_and_then_no_more(monkeypatch, caplog):
    monkeypatch.setattr(journal, "THROUGHPUT_INTERVAL_S", 0.1)
    caplog.set_level(logging.INFO, logger="duetto")
    app, _ = make_app(SpeakingExecutor(step_s=0.01))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        asked = {**COMPLETION, "max_tokens": 60}
        reply = pool.submit(post, client, "/v1/completions", asked)
        wait_until(lambda: len(lines(caplog, "throughput")) >= 3)
        told = [fields(line) for line in lines(caplog, "throughput")]
        assert float(told[0]["prompt_tokens_per_s"]) == len(PROMPT) / 0.1
        assert float(told[1]["prompt_tokens_per_s"]) == 0.0
        assert float(told[1]["generation_tokens_per_s"]) > 0
        assert (told[1]["running"], told[1]["waiting"]) == ("1", "0")
        assert 0 < float(told[1]["kv_use"].removesuffix("%")) < 100
        assert told[0]["prefix_hits"] == "0.0%" and told[1]["prefix_hits"] == "-"
        reply.result(10)
        wait_until(lambda: "running=0" in lines(caplog, "throughput")[-1])
        count = len(lines(caplog, "throughput"))
        client.get("/health")
        assert len(lines(caplog, "throughput")) == count


def test_other_levels_are_quiet(caplog):
    caplog.set_level(logging.WARNING, logger="duetto")
    with TestClient(make_app(SpeakingExecutor(TEXT))[0]) as client:
        post(client, "/v1/completions", COMPLETION)
        client.get("/nope")
    assert not caplog.records


def test_usual_polls_are_quiet(client, caplog):
    for path in ("/health", "/metrics", "/v1/models", "/v1/requests"):
        assert client.get(path).status_code == 200
    post(client, "/tokenize", {"prompt": "ab"})
    assert not [r for r in caplog.records if r.name.startswith("duetto")]
