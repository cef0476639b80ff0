"""Fields that change nothing are accepted, with the same answer; the others name the cause."""

import json

import msgspec
import pytest
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient

from duetto.core.errors import InvalidRequest
from duetto.server.apis.accepted import limited
from duetto.server.apis.protocol import ChatRequest, CompletionRequest, Message, TokenizeRequest

COMPLETION = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOKENIZE = {"messages": CHAT["messages"]}
ENDPOINTS = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": TOKENIZE,
}
SAMPLING = ("/v1/completions", "/v1/chat/completions")
KINDS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
}

BOTH = [
    {"tools": []},
    {"tools": None},
    {"functions": []},
    {"tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"function_call": "none"},
    {"function_call": "auto"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"modalities": ["text"]},
    {"verbosity": "medium"},
    {"reasoning_effort": "none"},
    {"continue_final_message": False},
    {"documents": []},
    {"chat_template": None},
    {"use_beam_search": False},
    {"length_penalty": 1.0},
    {"length_penalty": 1},
    {"early_stopping": False},
    {"spaces_between_special_tokens": True},
    {"return_tokens_as_token_ids": False},
    {"truncate_prompt_tokens": None},
    {"web_search_options": None},
    {"prediction": None},
    {"audio": None},
    {"include_reasoning": True},
    {"mm_processor_kwargs": {}},
    {"extra_body": {}},
    {"user": "u"},
]
SAMPLED = [
    {"truncate_prompt_tokens": -1},
    {"return_tokens_as_token_ids": True},
    {"truncation_side": "left"},
    {"safety_identifier": "s"},
    {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "implicit"}},
    {"request_id": "r", "session_id": "s"},
    {"chat_id": "c", "conversation_id": "c", "trace_id": "t"},
    {"metadata": {}},
    {"metadata": {"a": "b"}},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"store": False},
    {"store": None},
    {"suffix": ""},
    {"echo": False},
    {"best_of": 1},
    {"n": 1},
    {"n": None},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"top_logprobs": None},
    {"logit_bias": {}},
    {"logit_bias": None},
    {"stop": ""},
    {"stop": []},
    {"stop": None},
    {"stop_token_ids": []},
    {"bad_words": []},
    {"stream": False, "stream_options": None},
    {"stream": False, "stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "text", "json_schema": None}},
    {"add_generation_prompt": True},
    {"chat_template_kwargs": {}},
    {"min_tokens": 0},
    {"top_k": -1},
    {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"kv_transfer_params": None},
    {"kv_transfer_params": {}},
    {"structured_outputs": None, "guided_json": None},
    {"typical_p": 1, "mirostat": 0, "mirostat_tau": 5.0, "cache_prompt": True},
    {"dry_multiplier": 0.0, "dry_base": 1.75, "repeat_penalty": 1.0, "repeat_last_n": 64},
    {"typ_p": 1, "top_n_sigma": -1, "samplers": [], "n_predict": -1, "backend_sampling": False},
    {"reasoning_format": "none", "separate_reasoning": False, "stream_reasoning": True},
    {"tfs": 1, "typical": 1, "mirostat_mode": 0, "sampler_seed": -1, "ban_eos_token": False},
    {"custom_token_bans": "", "banned_strings": [], "stopping_strings": []},
    {"keep_alive": "5m", "options": {}},
    {"background": False, "enable_search": False, "context_length_exceeded_behavior": "error"},
]
ACCEPTED = [(path, change) for path in ENDPOINTS for change in BOTH]
ACCEPTED += [(path, change) for path in SAMPLING for change in SAMPLED]
REFUSED = [
    ("functions", [{"name": "f"}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("function_call", {"name": "f"}),
    ("parallel_tool_calls", 1),
    ("modalities", ["text", "audio"]),
    ("verbosity", "low"),
    ("reasoning_effort", "high"),
    ("use_beam_search", True),
    ("use_beam_search", 0),
    ("length_penalty", 1.5),
    ("length_penalty", True),
    ("early_stopping", True),
    ("spaces_between_special_tokens", False),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", "10"),
    ("return_tokens_as_token_ids", "yes"),
    ("truncation_side", "right"),
    ("web_search_options", {}),
    ("documents", [{"text": "x"}]),
    ("guided_json", {}),
    ("extra_body", {"top_k": 1}),
    ("thinking_token_budget", 100),
]


class Codec(type(CODEC)):
    def render_chat(self, messages, *, template_kwargs=None, **more):
        if template_kwargs:
            raise InvalidRequest("chat_template_kwargs", "not read by this template")
        shown = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
        assert all(set(m) <= shown for m in messages)
        return super().render_chat(messages, **more)


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(SpeakingExecutor("ok"), codec=Codec())[0]) as made:
        yield made


def answer(reply):
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if "tokens" in body:
        return body["tokens"]
    return [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]


def error_of(reply, status=400):
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


@pytest.mark.parametrize(("path", "change"), ACCEPTED, ids=str)
def test_what_changes_nothing_is_accepted(client, path, change):
    plain = answer(client.post(path, json=ENDPOINTS[path]))
    assert answer(client.post(path, json={**ENDPOINTS[path], **change})) == plain


@pytest.mark.parametrize("path", list(ENDPOINTS))
@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_what_changes_an_answer_is_refused_by_name(client, path, name, value):
    error = error_of(client.post(path, json={**ENDPOINTS[path], name: value}))
    assert error["param"] == name and error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize("path", list(ENDPOINTS))
def test_each_field_that_is_not_supported_accepts_null_and_refuses_what_is_not_listed(client, path):
    for name, only in limited(KINDS[path]):
        values = [None, *only.values]
        for value in values:
            reply = client.post(path, json={**ENDPOINTS[path], name: value})
            assert reply.status_code == 200, (name, value, reply.text)
        for value in (["no such value"], {"no": "such"}, 987654321, "no such value"):
            error = error_of(client.post(path, json={**ENDPOINTS[path], name: value}))
            assert error["param"] == name and "not supported in this version" in error["message"]
            for accepted in only.values:
                assert msgspec.json.encode(accepted).decode() in error["message"]


def test_best_of_may_say_what_n_says(client):
    assert len(answer(client.post("/v1/completions", json={**COMPLETION, "n": 2, "best_of": 2})))
    for more in ({"best_of": 2}, {"n": 2, "best_of": 3}, {"n": 2, "best_of": 1}):
        assert error_of(client.post("/v1/completions", json={**COMPLETION, **more}))["param"] == (
            "best_of"
        )


def test_obfuscation_is_neither_needed_nor_missed(client):
    for value in (True, False):
        options = {"stream": True, "stream_options": {"include_obfuscation": value}}
        assert client.post("/v1/chat/completions", json={**CHAT, **options}).is_success


ASSISTANT = [
    {"tool_calls": []},
    {"tool_calls": None},
    {"function_call": None},
    {"annotations": []},
    {"audio": None},
    {"refusal": None},
    {"refusal": ""},
    {"reasoning": None},
    {"reasoning_content": None},
    {"reasoning_content": ""},
    {"reasoning_details": []},
    {"thinking_blocks": []},
    {"provider_specific_fields": {"refusal": None}},
    {"parsed": None},
    {"prefix": False},
    {"id": "msg_1"},
    {"cache_control": {"type": "ephemeral"}},
    {"model": "m", "timestamp": 1, "created_at": "2026", "metadata": {"a": 1}},
    {"attachments": [], "files": [], "additional_kwargs": {}},
    {"tool_call_id": None},
    {"name": None},
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("more", ASSISTANT, ids=str)
def test_an_assistants_message_may_be_sent_back_as_clients_keep_it(client, path, more):
    said = {"role": "assistant", "content": "hello"}
    asked = [*CHAT["messages"], said, {"role": "user", "content": "and?"}]
    plain = client.post(path, json={**ENDPOINTS[path], "messages": asked}).json()
    asked[1] = {**said, **more}
    got = client.post(path, json={**ENDPOINTS[path], "messages": asked}).json()
    assert "error" not in got
    assert got.get("tokens") == plain.get("tokens")
    if "usage" in plain:
        assert got["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("function_call", {"name": "f", "arguments": ""}),
        ("annotations", [{}]),
        ("audio", {"id": "a"}),
        ("refusal", "I cannot"),
        ("prefix", True),
    ],
)
def test_what_a_message_says_and_a_template_is_not_shown_is_refused(client, name, value):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "a", name: value}]
    error = error_of(client.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
    assert error["param"] == f"messages[1].{name}"


def test_each_limited_field_of_a_message_accepts_null():
    for name, only in limited(Message):
        for value in (None, *only.values):
            body = json.dumps({"role": "assistant", "content": "", name: value})
            message = msgspec.json.decode(body, type=Message)
            assert only.accepts(getattr(message, name))
            assert message.shown() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "more",
    [{"cache_control": {"type": "ephemeral", "ttl": "1h"}}, {"image_url": None},
     {"id": "p_1", "index": 0, "annotations": [], "logprobs": []}],
    ids=str,
)  # fmt: skip
def test_a_part_may_carry_a_label(client, more):
    part = {"type": "text", "text": "hi", **more}
    messages = [{"role": "user", "content": [part]}]
    assert client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).is_success


@pytest.mark.parametrize(
    ("reads", "effort", "expected"),
    [
        ((), "none", {}),
        (("enable_thinking",), "none", {"enable_thinking": False}),
        (("thinking",), "none", {"thinking": False}),
        (("reasoning_effort",), "none", {"reasoning_effort": "none"}),
        (("reasoning_effort",), "low", {"reasoning_effort": "low"}),
        (("enable_thinking",), "low", None),
        ((), "medium", {}),
        (("reasoning_effort",), "medium", {"reasoning_effort": "medium"}),
        ((), "high", None),
    ],
)
def test_an_effort_of_reasoning_is_the_templates_to_read(reads, effort, expected):
    seen = []

    class Reader(type(CODEC)):
        def render_chat(self, messages, *, template_kwargs=None, **more):
            if set(template_kwargs) - {*reads, "mine"}:
                raise InvalidRequest("chat_template_kwargs", "not read by this template")
            seen.append(template_kwargs)
            return super().render_chat(messages, **more)

    with TestClient(make_app(SpeakingExecutor("ok"), codec=Reader())[0]) as client:
        asked = {**CHAT, "reasoning_effort": effort, "chat_template_kwargs": {"mine": 1}}
        reply = client.post("/v1/chat/completions", json=asked)
        if expected is None:
            assert error_of(reply)["param"] == "reasoning_effort"
        else:
            assert reply.is_success and seen[-1] == {"mine": 1, **expected}
        asked["chat_template_kwargs"] = {"theirs": 1}
        error = error_of(client.post("/v1/chat/completions", json=asked))
        assert error["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("reads", "given", "expected"),
    [
        ((), {"enable_thinking": False}, {}),
        ((), {"thinking": False, "enable_thinking": False}, {}),
        (("enable_thinking",), {"enable_thinking": False}, {"enable_thinking": False}),
        (("thinking",), {"thinking": False, "enable_thinking": False}, {"thinking": False}),
        (("enable_thinking",), {"thinking": False, "enable_thinking": True},
         {"enable_thinking": True}),
        ((), {"enable_thinking": True}, None),
        ((), {"enable_thinking": 0}, None),
        (("enable_thinking",), {"enable_thinking": False, "effort": 1}, None),
    ],
)  # fmt: skip
def test_no_thinking_may_be_asked_of_a_template_that_has_none(reads, given, expected):
    seen = []

    class Reader(type(CODEC)):
        def render_chat(self, messages, *, template_kwargs=None, **more):
            if set(template_kwargs) - set(reads):
                raise InvalidRequest("chat_template_kwargs", "not read by this template")
            seen.append(template_kwargs)
            return super().render_chat(messages, **more)

    with TestClient(make_app(SpeakingExecutor("ok"), codec=Reader())[0]) as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            reply = client.post(path, json={**ENDPOINTS[path], "chat_template_kwargs": given})
            if expected is None:
                assert error_of(reply)["param"] == "chat_template_kwargs"
            else:
                assert reply.is_success and seen.pop() == expected


@pytest.mark.parametrize("path", list(ENDPOINTS))
@pytest.mark.parametrize("name", ["a_field_of_tomorrow", "thinking", "Ключ", 'a"b', "prompt.x"])
def test_an_unknown_field_that_is_null_asks_for_nothing(client, path, name):
    base = ENDPOINTS[path]
    plain = answer(client.post(path, json=base))
    assert answer(client.post(path, json={name: None, **base})) == plain
    assert answer(client.post(path, json={**base, name: None, "user": "u"})) == plain
    if "messages" not in base:
        return
    said = {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}
    messages = [said, *base["messages"]]
    plain = answer(client.post(path, json={**base, "messages": messages}))
    for place in (said, said["content"][0]):
        place[name] = None
        assert answer(client.post(path, json={**base, "messages": messages})) == plain
        place[name] = 0
        error = error_of(client.post(path, json={**base, "null": None, "messages": messages}))
        assert error["param"].startswith("messages[0]")
        assert "is not a known field" in error["message"]
        del place[name]


# --- the cause -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"content": None, "tool_calls": [{}]}, "messages[1].tool_calls[0].id"),
        ({"content": None, "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"content": None, "audio": {"id": "a"}}, "messages[1].audio"),
        ({"content": None, "tool_calls": []}, "messages[1].content"),
        ({"content": [{"image_url": {"url": "x"}, "type": "image_url"}]},
         "messages[1].content[0].type"),
        ({"content": [{"input_audio": {}, "type": "input_audio"}]}, "messages[1].content[0].type"),
        ({"content": [{"type": "text", "text": "a", "file": {}}]}, "messages[1].content[0].file"),
    ],
)  # fmt: skip
def test_what_an_assistant_cannot_have_said_is_named(client, said, param):
    result = {"role": "tool", "tool_call_id": "c", "content": "4"}
    messages = [*CHAT["messages"], {"role": "assistant", **said}, result]
    if param.endswith(".file"):
        messages.pop()  # it is read to its end before fields of parts are compared
    error = error_of(client.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
    assert error["param"] == param


def test_a_feature_is_named_before_a_field_that_nobody_knows(client):
    for change, param in (
        ({"functions": [{}]}, "functions"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
        ),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"use_beam_search": True}, "use_beam_search"),
    ):
        body = {"strange": 1, **CHAT, **change}
        assert error_of(client.post("/v1/chat/completions", json=body))["param"] == param


@pytest.mark.parametrize(
    ("path", "change", "hint"),
    [
        ("/v1/chat/completions", {"max_token": 5}, "did you mean max_tokens?"),
        ("/v1/chat/completions", {"max_new_tokens": 5}, "did you mean max_tokens?"),
        ("/v1/chat/completions", {"temprature": 1}, "did you mean temperature?"),
        ("/v1/chat/completions", {"Stream": True}, "did you mean stream?"),
        ("/v1/chat/completions", {"prompt": "x"}, "it is one of /v1/completions"),
        ("/v1/completions", {"messages": []}, "it is one of /v1/chat/completions"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "naem": "x"}]},
         "did you mean name?"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"usage": True}}, ""),
        ("/v1/chat/completions", {"enable_thinking": False}, "from chat_template_kwargs"),
        ("/v1/chat/completions", {"zzzzz": 1}, ""),
    ],
)  # fmt: skip
def test_an_unknown_field_is_answered_with_what_was_meant(client, path, change, hint):
    message = error_of(client.post(path, json={**ENDPOINTS[path], **change}))["message"]
    assert "is not a known field" in message and message.endswith(hint or "field")


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ({"5": 1, "one": 1}, "'one'"),
        ({"": 1}, "''"),
        ({"1.5": 1}, "'1.5'"),
        ({"+1": 1}, "'+1'"),
        ({"9" * 30: 1}, "9999"),
        ({"-1": 1}, "-1"),
        ({"257": 1}, "257"),
    ],
)
def test_a_wrong_key_of_logit_bias_is_named(client, bias, names):
    for path in SAMPLING:
        error = error_of(client.post(path, json={**ENDPOINTS[path], "logit_bias": bias}))
        assert error["param"] == "logit_bias"
        assert names in error["message"] and "key" in error["message"]


PATHS = [
    ("/chat/completions", "/v1/chat/completions"),
    ("/completions", "/v1/completions"),
    ("/models", "/v1/models"),
    ("/v1/chat/completion", "/v1/chat/completions"),
    ("/v1/v1/chat/completions", "/v1/chat/completions"),
    ("/v1/chat/completions/", "/v1/chat/completions"),
    ("//v1//completions", "/v1/completions"),
    ("/v1/chat", "/v1/chat/completions"),
    ("/api/chat", "/v1/chat/completions"),
    ("/api/generate", "/v1/completions"),
    ("/api/v1/chat/completions", "/v1/chat/completions"),
    ("/openai/deployments/x/chat/completions", "/v1/chat/completions"),
    ("/v1/engines/x/completions", "/v1/completions"),
    ("/V1/Completions", "/v1/completions"),
    ("/v1/tokenize", "/tokenize"),
    ("/v1/health", "/health"),
    ("/metric", "/metrics"),
    ("/api/tags", "/v1/models"),
    ("/embeddings", "/v1/embeddings"),
    ("/api/embed", "/v1/embeddings"),
]


@pytest.mark.parametrize(("path", "nearest"), PATHS)
def test_a_path_that_is_not_there_is_answered_with_the_nearest(client, path, nearest):
    error = error_of(client.request("POST", f"http://testserver{path}"), 404)
    assert error["message"] == f"there is no path {path!r}; did you mean {nearest}?"
    assert error["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/v1/rerank", "reranking"),
        ("/v1/audio/speech", "audio"),
        ("/v1/images/generations", "images"),
        ("/v1/moderations", "moderation"),
    ],
)
def test_what_this_server_does_not_offer_is_said(client, path, what):
    message = error_of(client.post(path, json={"model": MODEL, "input": "x"}), 404)["message"]
    assert path in message and f"does not offer {what}" in message
    assert "/v1/chat/completions" in message


def test_other_paths_and_methods_say_what_there_is(client):
    assert "/v1/models exists" in error_of(client.get("/xyzzy/plugh"), 404)["message"]
    assert len(client.get("/" + "x" * 5000).content) < 400
    message = error_of(client.get("/v1/chat/completions"), 405)["message"]
    assert message == "/v1/chat/completions accepts POST, not GET"
    assert "GET" in error_of(client.delete("/v1/models"), 405)["message"]


# --- what is echoed ------------------------------------------------------------------------------

MUCH = "\u00a7" * 5000


class Echoing(type(CODEC)):
    def render_chat(self, messages, **more):
        raise InvalidRequest("messages", f"the template refuses {messages[0]['content']}")


@pytest.mark.parametrize(
    "change",
    [
        {MUCH: 1},
        {"messages": [{"role": MUCH, "content": "a"}]},
        {"messages": [{"role": "user", "content": "a", MUCH: 1}]},
        {"messages": [{"role": "user", "content": [{"type": MUCH, "text": "a"}]}]},
        {"messages": [{"role": "user", "content": MUCH}]},
        {"response_format": {"type": MUCH}},
        {"service_tier": MUCH},
        {"tool_choice": MUCH},
        {"stop": [MUCH]},
        {"bad_words": [MUCH]},
        {"logit_bias": {MUCH: 1}},
        {"reasoning_effort": MUCH},
        {"verbosity": MUCH},
        {"stream": True, "stream_options": {MUCH: 1}},
        {"chat_template_kwargs": {MUCH: 1}},
        {"cache_salt": MUCH},
        {"user": [MUCH]},
        {"model": MUCH},
        {"tools": [MUCH]},
    ],
    ids=lambda change: next(iter(change))[:20],
)
def test_an_error_never_shows_much_of_the_body(change):
    with TestClient(make_app(SpeakingExecutor("ok"), codec=Echoing())[0]) as client:
        reply = client.post("/v1/chat/completions", json={**CHAT, **change})
        assert reply.status_code in (400, 404)
        error = reply.json()["error"]
        assert f"{error['message']}{error['param']}".count(MUCH[0]) <= 200
        assert len(error["message"]) < 500
