"""A file of requests: each line is answered once, whatever the others are."""

import asyncio
import json
import threading

import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, make_app

from duetto.core.errors import ConfigError, EngineError
from duetto.server.batch_file import BatchFile

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}
COMPLETION = {"model": MODEL, "prompt": "a", "max_tokens": 2}


def request(name, body=COMPLETION, url="/v1/completions", **more):
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **more}


class World:
    """Two files, and an app for each run over them."""

    def __init__(self, folder):
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.executor = SpeakingExecutor("ok")
        self.num_advanced = 0

    def write(self, *lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.source.write_text("\n".join(texts))

    def advance(self, count):
        self.num_advanced += count

    def run(self, num_at_once=4, is_stopped=lambda: False, **settings):
        self.app, self.engine = make_app(self.executor, **settings)
        batch = BatchFile(self.app, self.source, self.target, self.advance)
        self.counts = counts = asyncio.run(batch.run(num_at_once, is_stopped))
        return counts.num_answered, counts.num_failed, counts.num_skipped

    def told(self):
        return [json.loads(line) for line in self.target.read_text().splitlines()]

    def by_name(self):
        return {line["custom_id"]: line for line in self.told()}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_each_api_is_asked_and_answers_as_over_http(world):
    responses = {"model": MODEL, "input": "hi", "max_output_tokens": 16}
    world.write(
        request("one", CHAT, "/v1/chat/completions"),
        request("two"),
        request("three", responses, "/v1/responses"),
    )
    assert world.run() == (3, 0, 0)
    told = world.by_name()
    bodies = {name: line["response"]["body"] for name, line in told.items()}
    assert bodies["one"]["choices"][0]["message"]["content"] == "ok"
    assert bodies["two"]["choices"][0]["text"] == "ok"
    assert bodies["three"]["output"][-1]["content"][0]["text"] == "ok"
    for line in told.values():
        assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
        assert line["error"] is None and line["id"].startswith("batch_req_")
    assert world.num_advanced == 3


UNREAD = "the line is not valid JSON in UTF-8"
NO_STREAM = "body.stream: a file takes whole answers; leave it out"
BAD = [
    ("{", UNREAD, None),
    ("[]", "the line: Expected object, got array", None),
    ({"custom_id": "x", "body": {}}, "url: is required", "x"),
    (
        request("x", url="/v1/rerank"),
        "url: '/v1/rerank' is not supported in this version; accept",
        "x",
    ),
    (
        request("x", method="GET"),
        "method: 'GET' is not supported in this version; accepted: POST",
        "x",
    ),
    (request("x", colour=1), "colour: is not a known field", "x"),
    (request("x", model="m"), "model: is not a known field; it is one of body", "x"),
    (request(5), "custom_id: Expected str, got int", None),
    (request("x", {**COMPLETION, "stream": True}), NO_STREAM, "x"),
    (request("x", {"stream": "yes"}), "body.stream: Expected bool | null, got str", "x"),
    (request("x", []), "body: Expected object, got array", "x"),
    (request("first"), "custom_id 'first' is there twice", "first"),
]


@pytest.mark.parametrize(("line", "words", "name"), BAD)
def test_a_line_that_is_no_request_gives_an_error_and_the_rest_goes_on(world, line, words, name):
    world.write(request("first"), line, "", request("last"))
    assert world.run() == (2, 1, 0)
    (told,) = [told for told in world.told() if told["error"]]
    assert told["custom_id"] == name
    assert told["error"]["code"] == "invalid_line" and told["error"]["line"] == 2
    assert told["error"]["message"].startswith(f"line 2: {words}")
    assert {"first", "last"} <= set(world.by_name())
    assert world.run() == (0, 0, 3)  # and it is told once
    assert world.counts.num_skipped_failed == 1
    assert len(world.told()) == 3


def test_a_line_with_a_name_that_was_mended_is_asked(world):
    world.write(request("one"), request("two", url="/v1/odd"))
    assert world.run() == (1, 1, 0)
    world.write(request("one"), request("two"))
    assert world.run() == (1, 0, 1)
    assert world.by_name()["two"]["response"]["status_code"] == 200


def test_a_line_that_was_mended_is_asked_and_others_may_move(world):
    world.write("{", request("one"), "[]")
    assert world.run() == (1, 2, 0)
    world.write(request("new"), "[]", request("one"))
    assert world.run() == (1, 0, 2)
    assert {"new", "one"} <= set(world.by_name())


def test_what_is_refused_is_told_as_over_http(world):
    world.write(request("bad", {**COMPLETION, "n": 0}), request("good"))
    assert world.run() == (1, 1, 0)
    response = world.by_name()["bad"]["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["param"] == "n"
    assert world.run() == (0, 0, 2) and world.counts.num_skipped_failed == 1


def test_what_is_answered_is_not_asked_again(world):
    world.write(request("one"), request("two"))
    world.run()
    before = world.target.read_text()
    world.write(request("one"), request("three"), request("two"))
    assert world.run() == (1, 0, 2)
    assert world.target.read_text().startswith(before)
    assert [line["custom_id"] for line in world.told()][2:] == ["three"]


def test_a_line_that_was_not_written_to_its_end_is_asked_again(world):
    world.write(request("one"), request("two"))
    world.run(num_at_once=1)
    whole = world.target.read_text()
    world.target.write_text(whole[:-10])
    assert world.run() == (1, 0, 1)
    assert sorted(world.by_name()) == ["one", "two"]
    assert len(world.told()) == 2


def test_more_lines_than_run_at_once_keep_the_engine_busy(world):
    world.write(*[request(f"r{i}", {**COMPLETION, "max_tokens": 2}) for i in range(40)])
    assert world.run(num_at_once=2 * CONFIG.max_num_seqs) == (40, 0, 0)
    assert len(world.by_name()) == 40
    assert world.executor.num_steps < 40  # two for each if they ran alone


def test_a_full_server_is_asked_again(world):
    """As where a line has many answers; here nearly nothing may wait."""
    lines = [request(f"r{i}", {**COMPLETION, "n": 6}) for i in range(12)]
    world.write(*lines)
    assert world.run(num_at_once=8, max_num_queued_reqs=1) == (12, 0, 0)


def test_who_is_stopped_goes_on_from_there(world):
    world.write(*[request(f"r{i}", {**COMPLETION, "max_tokens": 100}) for i in range(6)])
    world.executor.text = None  # never ends by itself
    world.executor.step_s = 0.01
    first = threading.Event()
    world.advance = lambda _: first.set()
    answered, failed, _ = world.run(num_at_once=1, is_stopped=first.is_set)
    assert failed == 0 and 1 <= answered < 6
    assert not world.engine.has_work  # what was under way has ended
    world.executor.step_s = 0.0
    assert world.run() == (6 - answered, 0, answered)
    assert sorted(world.by_name()) == [f"r{i}" for i in range(6)]


def test_a_step_that_fails_is_an_answer_of_its_line(world):
    world.executor.fails = True
    world.write(request("one"))
    assert world.run() == (0, 1, 0)
    assert world.by_name()["one"]["response"]["status_code"] == 500


def test_an_engine_that_has_ended_ends_the_run(world):
    world.write(request("one"), request("two"))
    app, _ = make_app(world.executor)
    batch = BatchFile(app, world.source, world.target, world.advance)

    def die(*_):
        raise SystemExit

    world.executor.submit = die
    with pytest.raises(EngineError, match=r"out\.jsonl"):
        asyncio.run(batch.run(1))


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"custom_id": 5}\n'])
def test_an_output_that_is_something_else_is_left_alone(world, text):
    world.write(request("one"))
    world.target.write_text(text)
    with pytest.raises(ConfigError, match="--output-file: line 1"):
        world.run()
    assert world.target.read_text() == text


def test_files_that_cannot_be(world):
    with pytest.raises(ConfigError, match="--input-file"):
        world.run()
    world.write(request("one"))
    world.target.hardlink_to(world.source)
    with pytest.raises(ConfigError, match="--output-file: is the input file"):
        world.run()
