"""Whatever a client sends, the reply is an OpenAI-shaped error that names the field, no 500."""

import json
import random

import pytest
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient

from duetto.core.errors import InvalidRequest

COMPLETION = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
BODIES = {"completion": COMPLETION, "chat": CHAT}
DEEP = "[" * 20_000 + "]" * 20_000


class Codec(type(CODEC)):
    """Refuses as the real one does."""

    def render_chat(self, messages, *, template_kwargs, **more):
        if not messages:
            raise InvalidRequest("messages", "must hold at least one message")
        if template_kwargs:
            raise InvalidRequest("chat_template_kwargs", "not read by this template")
        if messages[0]["content"] == "refuse":
            raise InvalidRequest("messages", "the template refuses this")
        if messages[0]["content"] == "bug":
            raise RuntimeError("secret detail at 0x7f")
        return super().render_chat(messages, **more)


@pytest.fixture(scope="module")
def server():
    app, engine = make_app(SpeakingExecutor("ok"), codec=Codec(), max_body_bytes=300_000)
    with TestClient(app) as client:
        yield client, engine


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture(autouse=True)
def still_answers(server):
    """After each test: nothing runs, and a good request is answered."""
    yield
    client, engine = server
    assert not engine.has_work
    assert client.post("/v1/completions", json=COMPLETION).json()["choices"][0]["text"] == "ok"


def check_error(reply, status, param=None):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    if param is not None:
        assert param in error["message"]
    return error


# Each: the field to name, and what to put into an otherwise good body.
SAMPLING = [
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": 101}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("min_p", {"min_p": 2}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": 10**30}),
    ("n", {"n": True}),
    ("min_tokens", {"min_tokens": 5}),
    ("min_tokens", {"min_tokens": -1}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": 1.5}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": ["x" * 2000]}),
    ("stop", {"stop": {"a": 1}}),
    ("stop[0]", {"stop": [1]}),
    ("stop_token_ids", {"stop_token_ids": [257]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("allowed_token_ids", {"allowed_token_ids": [10**9]}),
    ("logit_bias", {"logit_bias": {"257": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("logit_bias", {"logit_bias": {"one": 1}}),
    ("logit_bias[...]", {"logit_bias": {"1": "x"}}),
    ("logit_bias", {"logit_bias": [1]}),
    ("bad_words", {"bad_words": [""]}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ("cache_salt", {"cache_salt": ""}),
    ("cache_salt", {"cache_salt": "x" * 129}),
    ("cache_salt", {"cache_salt": 5}),
    ("priority", {"priority": 1}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.x", {"stream": True, "stream_options": {"x": 1}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema.name", {"response_format": {"type": "text", "json_schema": {}}}),
    ("guided_json", {"guided_json": {}}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("use_beam_search", {"use_beam_search": True}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
    ("no_such_field", {"no_such_field": 1}),
    ("ignore_eos", {"ignore_eos": 1}),
    ("metadata[...]", {"metadata": {"a": 1}}),
    ("metadata", {"metadata": {str(i): "x" for i in range(17)}}),
    ("stop_token_ids", {"stop_token_ids": [1] * 258}),
    ("allowed_token_ids", {"allowed_token_ids": [1] * 258}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(258)}}),
    ("model", {"model": None}),
    ("model", {"model": 7}),
]
COMPLETIONS = [
    ("continue_final_message", {"continue_final_message": True}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [[1], "a"]}),
    ("prompt", {"prompt": [257]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [10**100]}),
    ("prompt[0]", {"prompt": [1.5]}),
    ("prompt", {"prompt": None}),
    ("prompt.a", {"prompt": {"a": 1}}),
    ("prompt", {"prompt": "x" * 512}),
    ("prompt", {"prompt": ["x"] * 300}),
    ("n", {"prompt": ["x"] * 3, "n": 100}),
    ("max_tokens", {"max_tokens": 510}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "many"}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("n", {"echo": True, "logprobs": 1, "stream": True, "n": 2}),
    ("prompt_logprobs", {"echo": True, "logprobs": 1, "prompt_logprobs": 1}),
    ("suffix", {"suffix": "x"}),
    ("best_of", {"best_of": 2}),
]
CHATS = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x"}}]}]}),
    ("messages[1].tool_calls[0].id", {"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{}]}]}),
    ("messages[0].extra", {"messages": [{"role": "user", "content": "a", "extra": 1}]}),
    ("messages", {"messages": [{"role": "user", "content": "x" * 600}]}),
    ("messages", {"messages": [{"role": "user", "content": "refuse"}]}),
    ("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": 600}),
    ("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": 0}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("logprobs", {"logprobs": 5}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("service_tier", {"service_tier": "flex"}),
    ("store", {"store": True}),
    ("modalities", {"modalities": ["audio"]}),
    ("messages", {"messages": [{"role": "user", "content": "a"}] * 5001}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": ""}] * 5001}]}),
    ("chat_template", {"chat_template": "{% for %}"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"a": [1]}}),
    ("continue_final_message", {"continue_final_message": 1}),
    ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
]  # fmt: skip
CASES = (
    [("completion", *case) for case in SAMPLING + COMPLETIONS]
    + [("chat", *case) for case in SAMPLING + CHATS]
)  # fmt: skip


@pytest.mark.parametrize(("kind", "param", "change"), CASES)
def test_a_bad_field_is_named(client, kind, param, change):
    reply = client.post(PATHS[kind], json={**BODIES[kind], **change})
    check_error(reply, 400, param)


def test_a_text_that_can_never_fit_is_not_even_tokenized():
    class Untouched(Codec):
        max_token_bytes = 8

        def encode(self, text, *, add_special_tokens=True):
            assert len(text) <= 8 * 512
            return [1] * 100

    with TestClient(make_app(SpeakingExecutor("ok"), codec=Untouched())[0]) as client:
        for size, status in ((8 * 512, 200), (8 * 512 + 1, 400)):
            reply = client.post(PATHS["completion"], json={**COMPLETION, "prompt": "x" * size})
            assert reply.status_code == status
        error = check_error(reply, 400, "prompt")
        assert error["code"] == "context_length_exceeded" and "513" in error["message"]
        long = [{"role": "user", "content": "é" * 8 * 300}]
        error = check_error(
            client.post(PATHS["chat"], json={**CHAT, "messages": long}), 400, "messages"
        )
        assert error["code"] == "context_length_exceeded"
        reply = client.post(PATHS["completion"], json={**COMPLETION, "prompt": [1] * 10_000})
        assert check_error(reply, 400, "prompt")["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("literal"), ["NaN", "Infinity", "-Infinity", "nan"])
def test_a_number_that_json_cannot_say_is_named(client, literal):
    for name in ("temperature", "top_p"):
        body = json.dumps({**COMPLETION, name: "?"}).replace('"?"', literal)
        check_error(client.post(PATHS["completion"], content=body), 400, name)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_missing_field_is_named(client, kind):
    for name in BODIES[kind].keys() - {"max_tokens"}:
        body = {key: value for key, value in BODIES[kind].items() if key != name}
        error = check_error(client.post(PATHS[kind], json=body), 400, name)
        assert "required" in error["message"]


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        (
            {"messages": [{"role": "alien", "content": "a"}]},
            "assistant, developer, system, tool, user",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "x", "text": "a"}]}]}, "text"),
        ({"service_tier": "flex"}, "auto, default"),
        ({"tool_choice": "any"}, "auto, none, required"),
        ({"tools": [{"type": "web_search"}]}, "function"),
        ({"response_format": {"type": "xml"}}, "json_object, json_schema, structural_tag, text"),
    ],
)
def test_a_value_that_is_not_supported_is_answered_with_those_that_are(client, change, accepted):
    reply = client.post("/v1/chat/completions", json={**CHAT, **change})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.endswith(f"is not supported in this version; accepted: {accepted}")


def test_what_is_not_supported_says_so(client):
    for change in ({"functions": [{}]}, {"chat_template": "x"}, {"response_format": {"type": "x"}}):
        reply = client.post("/v1/chat/completions", json={**CHAT, **change})
        assert "not supported in this version" in reply.json()["error"]["message"]
        nothing = dict.fromkeys(change)
        assert client.post("/v1/chat/completions", json={**CHAT, **nothing}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xef\xbb\xbf{}",
        b'{"model": "\xff"}',
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "a", "temperature": NaN}',
        b'{"model": "fake", "prompt": "a", "temperature": Infinity}',
        b'{"model": "fake", "prompt": "a", "temperature": 1e999}',
        b'{"model": "fake", "prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"model": "fake", "prompt": ' + DEEP.encode() + b"}",
        b'{"model": "fake", "chat_template_kwargs": ' + DEEP.encode() + b"}",
        DEEP.encode(),
        b'{"model": "fake", "prompt": "a"} trailing',
        b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json_is_refused(client, body):
    for path in (*PATHS.values(), "/tokenize", "/detokenize"):
        reply = client.post(path, content=body)
        assert reply.status_code == 400, (path, reply.text)
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert len(reply.content) < 2000


def test_of_two_fields_with_one_name_the_last_counts(client):
    """As RFC 8259 leaves it to readers; both must be good, or one of them is named."""
    body = b'{"model": "fake", "prompt": "a", "max_tokens": 9, "max_tokens": 1}'
    got = client.post("/v1/completions", content=body).json()
    assert got["usage"]["completion_tokens"] == 1
    body = b'{"model": "fake", "prompt": "a", "max_tokens": "x", "max_tokens": 1}'
    check_error(client.post("/v1/completions", content=body), 400, "max_tokens")


def test_an_unknown_model_is_404(client):
    for path, body in ((PATHS["chat"], CHAT), (PATHS["completion"], COMPLETION)):
        error = check_error(client.post(path, json={**body, "model": "x" * 9000}), 404, "model")
        assert error["code"] == "model_not_found" and len(error["message"]) < 500


LONG = "x" * 600
CHAT_LONG = [{"role": "user", "content": LONG}]


@pytest.mark.parametrize(
    ("kind", "change", "param", "numbers"),
    [
        ("completion", {"max_tokens": 600}, "max_tokens", "603 tokens (3 in the prompt, 600 in"),
        ("completion", {"prompt": LONG}, "prompt", "602 tokens (600 in the prompt, 2 in"),
        ("completion", {"prompt": [1] * 600}, "prompt", "601 tokens (600 in the prompt, 1 in"),
        ("completion", {"prompt": [[1] * 600]}, "prompt", "602 tokens (600 in the prompt, 2 in"),
        ("completion", {"prompt": "x" * 512}, "prompt", "514 tokens (512 in the prompt, 2 in"),
        ("chat", {"messages": CHAT_LONG}, "messages", "620 tokens (618 in the messages, 2 in"),
        ("chat", {"max_tokens": None, "max_completion_tokens": 600}, "max_completion_tokens",
         "620 tokens (20 in the messages, 600 in"),
    ],
)  # fmt: skip
def test_too_long_is_told_in_openais_words(client, kind, change, param, numbers):
    """LiteLLM, LangChain, aider and others look for them, and compact what they send."""
    reply = client.post(PATHS[kind], json={**BODIES[kind], **change})
    error = check_error(reply, 400, param)
    name = "messages" if kind == "chat" else "prompt"
    assert error["code"] == "context_length_exceeded"
    exact = error["message"].replace("at least ", "")  # where it was not tokenized
    assert exact.startswith(
        f"This model's maximum context length is 512 tokens. However, you requested {numbers} the "
        f"completion). Please reduce the length of the {name} or completion."
    )


def test_many_prompts_are_no_long_prompt(client):
    error = check_error(
        client.post(PATHS["completion"], json={**COMPLETION, "prompt": ["x"] * 600}), 400, "prompt"
    )
    assert error["code"] is None and "at most 256" in error["message"]


def test_a_body_beyond_the_limit_is_413_before_it_is_read(client):
    reply = client.post("/v1/completions", content=b"x" * 300_001)
    assert check_error(reply, 413)["code"] == "body_too_large"

    def pieces():  # no content-length is announced
        for _ in range(31):
            yield b"x" * 10_000

    check_error(client.post("/tokenize", content=pieces()), 413)


@pytest.mark.parametrize(
    ("path", "param", "body"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "messages", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", "messages", {"prompt": "a", "messages": []}),
        ("/tokenize", "chat_template_kwargs", {"prompt": "a", "chat_template_kwargs": {"b": 1}}),
        ("/tokenize", "add_generation_prompt", {"prompt": "a", "add_generation_prompt": False}),
        ("/tokenize", "continue_final_message", {"prompt": "a", "continue_final_message": True}),
        ("/tokenize", "messages", {"messages": []}),
        ("/tokenize", "tools[0].type", {"prompt": "a", "tools": [{}]}),
        (
            "/tokenize",
            "tools",
            {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
        ),
        ("/tokenize", "prompt", {"prompt": 5}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": [257]}),
        ("/detokenize", "tokens", {"tokens": [-1]}),
        ("/detokenize", "tokens[0]", {"tokens": ["a"]}),
    ],
)
def test_bad_text_requests_are_named(client, path, param, body):
    check_error(client.post(path, json=body), 400, param)


def test_unknown_paths_and_methods(client):
    check_error(client.get("/v1/nope"), 404)
    check_error(client.get("/v1/completions/"), 404)
    check_error(client.get("/v1/completions"), 405)
    check_error(client.delete("/health"), 405)


def test_a_bug_is_a_plain_500_without_its_words(client, caplog):
    body = {**CHAT, "messages": [{"role": "user", "content": "bug"}]}
    reply = client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"
    assert reply.headers["X-Request-Id"] == "mine"
    assert "secret detail" in caplog.text and "mine" in caplog.text


def test_random_bodies_never_break_the_server(client):
    """Good bodies with a few fields replaced by values of every kind."""
    rng = random.Random(2026)
    names = sorted({name for _, _, change in CASES for name in change})
    numbers = [None, True, -1, 0, 1, 2.5, 10**40, -1e308]
    lists = [[], [0], [[]], [[1, 2]], ["a"], [None], [{"role": "user"}]]
    values = [*numbers, *lists, "", "a", "\x00", "é" * 40, {}, {"1": 1}, {"type": "text"}]
    statuses = set()
    for _ in range(300):
        kind = rng.choice(sorted(PATHS))
        changed = {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 3))}
        reply = client.post(PATHS[kind], content=json.dumps({**BODIES[kind], **changed}))
        assert reply.status_code in (200, 400, 404), (changed, reply.text)
        statuses.add(reply.status_code)
        if reply.status_code != 200:
            assert set(reply.json()) == {"error"}
    assert statuses == {200, 400, 404}


def test_random_bytes_in_a_good_body_never_break_the_server(client):
    rng = random.Random(7)
    for _ in range(200):
        body = bytearray(json.dumps(rng.choice([CHAT, COMPLETION])).encode())
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        path = rng.choice(sorted(PATHS.values()))
        reply = client.post(path, content=bytes(body))
        assert reply.status_code in (200, 400, 404), (bytes(body), reply.text)
