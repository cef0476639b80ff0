"""`/v1/embeddings` without a model: what is asked, what is answered, what is refused."""

import asyncio
import base64
import json
import struct
from dataclasses import replace

import numpy as np
import openai
import pytest
from fakes import ByteCodec
from server.fakes_server import (
    CONFIG,
    MODEL,
    SpeakingExecutor,
    has_all_blocks,
    make_app,
    post,
    wait_until,
)
from starlette.testclient import TestClient

from duetto.core.batch import RequestResult, StepOutput
from duetto.core.embeddings import EmbeddingModel
from duetto.core.executor import Done
from duetto.server.apis.embeddings import embeddings_body, reply_bytes
from duetto.server.batch_file import BatchFile
from duetto.server.http.json_parts import encode

PATH = "/v1/embeddings"
SIZE = 4
EMBEDS = EmbeddingModel(size=SIZE, sizes=(2,), prompts={"query": "Q:", "plain": ""})
POOLING = replace(CONFIG, is_pooling=True, max_num_batched_tokens=48)


def embedding_of(num_tokens: int, last: int, size: int = SIZE) -> np.ndarray:
    """What the fake gives: whoever gets another text's, or a part of one, is told apart."""
    return (np.arange(size) * 0.5 + num_tokens + last / 4).astype("<f4")


class EmbeddingExecutor:
    """Tells how long a text is, and its last token. Fails for one that ends with "!"."""

    def __init__(self) -> None:
        self.num_live = []  # requests of each step

    def submit(self, batch) -> Done:
        self.num_live.append(len(batch.requests))
        return Done(StepOutput(tuple(self._result(item) for item in batch.requests)))

    def _result(self, item) -> RequestResult:
        if item.pooling is None:
            return RequestResult()
        if item.token_ids[-1] == ord("!"):
            return RequestResult(error="the model's hidden state for this text is not finite")
        size = item.pooling.dimensions or SIZE
        return RequestResult(embedding=embedding_of(item.end, item.token_ids[-1], size).tobytes())


class Ending(ByteCodec):
    """Ends each text, as tokenizers of such models do."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text) + [256] * add_special_tokens


def make(**more):
    more = {"embeddings": EMBEDS, "config": POOLING} | more
    return make_app(EmbeddingExecutor(), **more)


@pytest.fixture(scope="module")
def made():
    app, engine = make()
    with TestClient(app) as client:
        yield client, engine


@pytest.fixture(scope="module")
def client(made):
    return made[0]


def body(given, **more):
    return {"model": MODEL, "input": given, **more}


def shown(reply) -> list[list[float]]:
    assert [each["index"] for each in reply["data"]] == list(range(len(reply["data"])))
    return [each["embedding"] for each in reply["data"]]


def refusal(client, given, status: int = 400):
    reply = client.post(PATH, json=given)
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("abc", ["abc"]),
        (["abc"], ["abc"]),
        (["abc", "é", "x" * 100], ["abc", "é", "x" * 100]),
        ([97, 98, 99], ["abc"]),
        ([[97, 98, 99], [100]], ["abc", "d"]),
    ],
)
def test_each_shape_of_input(client, given, texts):
    reply = post(client, PATH, body(given, user="u"))
    ids = [text.encode() for text in texts]
    assert shown(reply) == [embedding_of(len(each), each[-1]).tolist() for each in ids]
    num_tokens = sum(map(len, ids))
    assert (reply["object"], reply["model"]) == ("list", MODEL)
    assert reply["data"][0]["object"] == "embedding"
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (num_tokens, num_tokens)


def test_as_floats_they_are_the_very_numbers():
    """Nine digits, and no more."""
    numbers = np.random.default_rng(0).standard_normal(500).astype("<f4") * np.float32(1e-3)
    reply = embeddings_body("n", 0, "m", [numbers.tobytes()], "float", num_prompt=1, num_cached=0)
    text = encode(reply)
    shown_numbers = json.loads(text)["data"][0]["embedding"]
    assert np.array(shown_numbers, "<f4").tobytes() == numbers.tobytes()
    assert len(text) < reply_bytes(1, 500, "float") + 200


def test_as_base64(client):
    data = shown(post(client, PATH, body("abc", encoding_format="base64")))[0]
    numbers = struct.unpack("<4f", base64.b64decode(data))
    assert list(numbers) == embedding_of(3, ord("c")).tolist()


def test_the_openai_package_reads_both(client):
    asked = openai.OpenAI(base_url="http://testserver/v1", api_key="-", http_client=client)
    for more in ({}, {"encoding_format": "float"}):
        reply = asked.embeddings.create(model=MODEL, input=["abc", "d"], **more)
        assert reply.data[1].embedding == embedding_of(1, ord("d")).tolist()
        assert reply.usage.total_tokens == 4


def test_dimensions_prompts_and_what_is_put_around_a_text():
    app, _ = make(codec=Ending())
    with TestClient(app) as client:
        assert len(shown(post(client, PATH, body("abc", dimensions=2)))[0]) == 2
        assert len(shown(post(client, PATH, body("abc", dimensions=SIZE)))[0]) == SIZE
        numbers = {
            "named": shown(post(client, PATH, body("abc", prompt_name="query"))),
            "plain": shown(post(client, PATH, body("abc", prompt_name="plain"))),
            "bare": shown(post(client, PATH, body("abc", add_special_tokens=False))),
            "cut": shown(post(client, PATH, body("abc", truncate_prompt_tokens=2))),
            "ids": shown(post(client, PATH, body([1, 2], prompt_name="query"))),
        }
    wanted = {"named": (6, 256), "plain": (4, 256), "bare": (3, 99), "cut": (2, 256), "ids": (2, 2)}
    assert numbers == {name: [embedding_of(*of).tolist()] for name, of in wanted.items()}


def test_more_texts_than_may_wait_go_in_windows():
    """All of them are answered, and no more than a window of them are in the engine."""
    app, engine = make(max_num_queued_reqs=8)
    texts = [chr(97 + index % 26) * (1 + index % 5) for index in range(150)]
    with TestClient(app) as client:
        most = []
        add = engine.add
        engine.add = lambda request: (most.append(len(app.state.relay._live)), add(request))[1]
        reply = post(client, PATH, body(texts))
    assert shown(reply) == [embedding_of(len(t), ord(t[0])).tolist() for t in texts]
    assert max(most) <= 8 + 2
    wait_until(lambda: has_all_blocks(engine))


def test_one_text_too_long_refuses_the_body_and_nothing_runs(made):
    client, engine = made
    num_steps = len(engine._computer._executor.num_live)
    error = refusal(client, body(["abc", "x" * 513]))
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
    assert "512 tokens" in error["message"] and "513" in error["message"]
    assert refusal(client, body("x" * 513))["param"] == "input"
    assert len(engine._computer._executor.num_live) == num_steps
    assert len(shown(post(client, PATH, body(["x" * 512])))) == 1  # all the context, to the last
    assert len(shown(post(client, PATH, body("x" * 600, truncate_prompt_tokens=-1)))) == 1


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"model": MODEL}, "input", "is required"),
        (body(None), "input", "Expected"),
        (body(3), "input", "Expected"),
        (body({"text": "x"}), "input", "Expected"),
        (body([]), "input", "at least one"),
        (body(""), "input", "at least one token"),
        (body(["a", ""]), "input[1]", "at least one token"),
        (body([[1], []]), "input[1]", "at least one token"),
        (body(["a", 1]), "input", "not a mixture"),
        (body(["a", [1]]), "input", "not a mixture"),
        (body([1.5]), "input[0]", "Expected"),
        (body([True]), "input[0]", "Expected"),
        (body([[1, "a"]]), "input[0][1]", "Expected"),
        (body([257]), "input", "token id 257 is outside the vocabulary of 257"),
        (body([[3], [-1]]), "input[1]", "token id -1 is outside"),
        (body([10**30]), "input", "is outside the vocabulary"),
        (body("\ud800"), None, "not valid JSON"),
        (body(["x"] * 2049), "input", "2049 inputs; at most 2048"),
        (body([1] * 513), "input", "512 tokens"),
        (body("x", dimensions=0), "dimensions", "must be 1 or more, not 0"),
        (body("x", dimensions=-1), "dimensions", "must be 1 or more, not -1"),
        (body("x", dimensions="2"), "dimensions", "Expected"),
        (body("x", dimensions=3), "dimensions", "3 is not one of 2, 4"),
        (body("x", dimensions=10**9), "dimensions", "is not one of 2, 4"),
        (body("x", encoding_format="hex"), "encoding_format", "accepted: base64, float"),
        (body("x", encoding_format=1), "encoding_format", "Expected"),
        (body("x", user=1), "user", "Expected"),
        (body("x", prompt_name="other"), "prompt_name", "it has: plain, query"),
        (body("x", truncate_prompt_tokens=0), "truncate_prompt_tokens", "1 or more, or -1"),
        (body("x", priority=1), "priority", "--scheduling-policy"),
        (body("x", cache_salt=""), "cache_salt", "1 to 128"),
        (body("x", normalize=False), "normalize", "accepted: true"),
        (body("x", embed_dtype="int8"), "embed_dtype", "accepted: "),
        (body("x", messages=[{}]), "messages", "is not supported"),
        (body("x", inputs="y"), "inputs", "did you mean input?"),
        (body("x", temperature=1), "temperature", "is not a known field"),
    ],
)
def test_what_is_wrong_is_named(client, given, param, words):
    if param is None:
        reply = client.post(PATH, content=b'{"model": "fake", "input": "\xff"}')
        assert reply.status_code == 400 and words in reply.json()["error"]["message"]
        return
    error = refusal(client, given)
    assert error["param"] == param and words in error["message"], error


def test_a_name_that_is_not_the_models(client):
    assert refusal(client, {"model": "other", "input": "x"}, 404)["code"] == "model_not_found"


def test_a_reply_that_would_be_too_large_is_refused_with_the_numbers():
    app, _ = make(max_reply_bytes=1000)
    with TestClient(app) as client:
        assert len(shown(post(client, PATH, body(["x"] * 7)))) == 7
        message = refusal(client, body(["x"] * 8))["message"]
        assert "1024 bytes" in message and "8 embeddings of 4 numbers" in message
        assert len(shown(post(client, PATH, body(["x"] * 8, encoding_format="base64")))) == 8


def test_a_text_that_the_model_fails_on_is_an_error_of_the_engine(client):
    error = refusal(client, body(["a", "b!"]), 500)
    assert "not finite" in error["message"]


def test_whoever_generates_is_told_where_to_go(client):
    messages = [{"role": "user", "content": "hi"}]
    for path, more in {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": messages},
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": messages, "max_tokens": 1},
    }.items():
        reply = client.post(path, json={"model": MODEL, **more})
        assert reply.status_code == 400
        assert "served for embeddings, at /v1/embeddings" in reply.json()["error"]["message"]


def test_a_model_that_generates_says_how_it_could_embed():
    with TestClient(make_app(SpeakingExecutor("ok"))[0]) as client:
        error = refusal(client, body("x"))
        assert error["param"] == "model"
        assert "modules.json" in error["message"] and "--runner pooling" in error["message"]


def test_metrics_count_prompts_and_no_tokens(made):
    client, _ = made
    before = client.get("/metrics").text
    post(client, PATH, body("abcdef"))
    name = "vllm:prompt_tokens_total"
    counts = [
        next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
        for text in (before, client.get("/metrics").text)
    ]
    assert counts[1] - counts[0] == 6


def test_a_file_of_requests_may_hold_them(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "one", "url": PATH, "body": body(["abc", "d"])}
    source.write_text(json.dumps(line))
    app, _ = make()
    counts = asyncio.run(BatchFile(app, source, target, lambda _: None).run(2))
    assert (counts.num_answered, counts.num_failed) == (1, 0)
    reply = json.loads(target.read_text())["response"]["body"]
    assert shown(reply) == [embedding_of(3, ord("c")).tolist(), embedding_of(1, ord("d")).tolist()]
