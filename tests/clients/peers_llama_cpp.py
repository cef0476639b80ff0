"""llama.cpp's tests of its server, by name, as checks of ours.

What they ask of `/completion`, which we do not have, is asked of `/v1/completions` where both can
do it. What a text says is not compared: their models are others.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

from peers_suite import (
    CITY,
    PROMPT,
    TOOL,
    USER,
    Server,
    Suite,
    message_text,
    said,
)

suite = Suite("llama.cpp", "tools/server/tests/unit", "as stored in November 2026")
test = suite.test
GRAMMAR = 'root ::= "a"{5,5}'
CONST = {"const": "42"}
ANTHROPIC_TOOL = {"name": "weather", "input_schema": CITY}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Riga", "days": 1}'},
}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Riga"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"}


# --- test_basic.py ---


@test("test_basic.py")
def test_server_start_simple(s: Server) -> None:
    s.get("/health")


@test("test_basic.py")
def test_server_props(s: Server) -> None:
    props = s.get("/props")
    assert props["total_slots"] >= 1
    settings = props["default_generation_settings"]
    assert settings["n_ctx"] == 32768 and isinstance(settings["params"], dict)


@test("test_basic.py")
def test_server_models(s: Server) -> None:
    (card,) = s.get("/v1/models")["data"]
    assert card["id"] == "duetto-demo"


@test("test_basic.py")
def test_server_slots(s: Server) -> None:
    slots = s.get("/slots")
    assert len(slots) == s.get("/props")["total_slots"]
    assert slots[0]["n_ctx"] == 32768 and "params" not in slots[0]


suite.leaves_out("test_basic.py", "a flag of theirs", "test_server_start_with_host_family")
suite.leaves_out("test_basic.py", "a model from a hub", "test_load_split_model")
suite.leaves_out("test_basic.py", "their page and its flag", "test_no_webui")
suite.leaves_out("test_basic.py", "tags of models", "test_server_model_aliases_and_tags")


# --- test_chat_completion.py ---

CHAT = "test_chat_completion.py"
PARTS = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Where is", " it?")]}]


@test(CHAT)
def test_chat_completion(s: Server) -> None:
    for messages in (USER, [{"role": "system", "content": "Be short."}, *USER], PARTS):
        got = s.chat(messages)
        assert "cmpl" in got["id"] and got["usage"]["prompt_tokens"] > 0
        (choice,) = got["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")


@test(CHAT)
def test_chat_completion_stream(s: Server) -> None:
    chunks = s.stream_chat(stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["model"] for chunk in chunks} == {"duetto-demo"}
    first, *rest = [chunk for chunk in chunks if chunk["choices"]]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in rest)
    assert rest[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert said(chunks) == said(s.chat()["choices"][0])
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@test(CHAT)
def test_chat_completion_with_openai_library(s: Server) -> None:
    assert s.chat(seed=42, temperature=0.8)["choices"][0]["finish_reason"] in ("stop", "length")


@test(CHAT)
def test_completion_with_response_format(s: Server) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CONST}}
    for given in ({"type": "json_object", "schema": CONST}, schema):
        (choice,) = s.chat(response_format=given, max_tokens=20)["choices"]
        assert json.loads(said(choice)) == "42"
    s.chat(response_format={"type": "json_object"}, max_tokens=20)
    for wrong in (
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
    ):
        s.refused("/v1/chat/completions", {"messages": USER, "response_format": wrong})


@test(CHAT)
def test_completion_with_json_schema(s: Server) -> None:
    assert said(s.chat(json_schema=CONST, max_tokens=20)["choices"][0]) == '"42"'


@test(CHAT)
def test_completion_with_grammar(s: Server) -> None:
    assert said(s.chat(grammar=GRAMMAR, max_tokens=20)["choices"][0]) == "aaaaa"


@test(CHAT)
def test_invalid_chat_completion_req(s: Server) -> None:
    bad = {"role": "system", "content": "x"}
    for messages in (
        None,
        "text",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [bad, {}],
    ):
        s.refused("/v1/chat/completions", {"messages": messages})


@test(CHAT, differs="`timings_per_token` is refused by name; the last chunk has `timings`")
def test_chat_completion_with_timings_per_token(s: Server) -> None:
    chunks = s.stream_chat(timings_per_token=True, stream_options={"include_usage": True})
    assert chunks[-1]["timings"]["predicted_n"] <= 5


@test(CHAT)
def test_logprobs(s: Server) -> None:
    (choice,) = s.chat(logprobs=True, top_logprobs=10, temperature=0)["choices"]
    tokens = choice["logprobs"]["content"]
    assert all(t["logprob"] <= 0 and t["bytes"] is not None for t in tokens)
    assert all(len(t["top_logprobs"]) == 10 for t in tokens)
    assert said(choice) in "".join(t["token"] for t in tokens)


@test(CHAT)
def test_logprobs_stream(s: Server) -> None:
    chunks = s.stream_chat(logprobs=True, top_logprobs=10, temperature=0)
    parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c.get("logprobs")]
    tokens = [token for part in parts for token in part["content"]]
    assert tokens and all(len(t["top_logprobs"]) == 10 for t in tokens)
    assert said(chunks) in "".join(t["token"] for t in tokens)


@test(CHAT, name="test_logit_bias")
def chat_logit_bias(s: Server) -> None:
    ids = s.post("/tokenize", {"prompt": "Gilcross"})["tokens"]
    text = said(s.chat(logit_bias={str(i): -100 for i in ids}, temperature=0)["choices"][0])
    assert "Gilcross" not in text


@test(CHAT)
def test_context_size_exceeded(s: Server) -> None:
    """With the numbers; its type is OpenAI's `invalid_request_error`, not theirs."""
    body = {"messages": [{"role": "user", "content": "x y " * 40_000}]}
    error = s.refused("/v1/chat/completions", body, "32768")
    assert error["code"] == "context_length_exceeded"


@test(CHAT)
def test_context_size_exceeded_stream(s: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x y " * 40_000}], "stream": True}
    s.refused("/v1/chat/completions", body, "32768")


@test(CHAT)
def test_chat_completions_multiple_choices(s: Server) -> None:
    choices = s.chat(n=2)["choices"]
    assert [c["index"] for c in choices] == [0, 1]
    assert all(c["message"]["role"] == "assistant" for c in choices)


suite.leaves_out(CHAT, "reads `__verbose`, a field of theirs", "test_chat_template")
suite.leaves_out(CHAT, "reads `__verbose`", "test_chat_template_assistant_prefill")
suite.leaves_out(CHAT, "`/apply-template`; ours is `…/render`", "test_apply_chat_template")
suite.leaves_out(CHAT, "`return_progress`, theirs", "test_return_progress")


# --- test_completion.py ---

COMPLETION = "test_completion.py"


@test(COMPLETION)
def test_completion(s: Server) -> None:
    got = s.complete(return_token_ids=True)
    (choice,) = got["choices"]
    assert got["usage"]["completion_tokens"] == len(choice["token_ids"])


@test(COMPLETION)
def test_completion_stream(s: Server) -> None:
    chunks = s.stream_completion(return_token_ids=True)
    ids = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids") or ()]
    assert ids and chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@test(COMPLETION)
def test_completion_stream_vs_non_stream(s: Server) -> None:
    assert said(s.stream_completion()) == said(s.complete()["choices"][0])


@test(COMPLETION)
def test_completion_with_openai_library(s: Server) -> None:
    assert s.complete(ignore_eos=True)["choices"][0]["finish_reason"] == "length"


@test(COMPLETION)
def test_completion_stream_with_openai_library(s: Server) -> None:
    assert said(s.stream_completion(ignore_eos=True))


@test(COMPLETION)
def test_completion_stream_with_openai_library_stops(s: Server) -> None:
    whole = said(s.complete(max_tokens=40, ignore_eos=True)["choices"][0])
    stop = whole[3:5]
    chunks = s.stream_completion(max_tokens=40, ignore_eos=True, stop=[stop, "\nUser:"])
    assert said(chunks) == whole.split(stop)[0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@test(COMPLETION)
def test_consistent_result_same_seed(s: Server) -> None:
    texts = {said(s.complete(seed=42, temperature=1.0)["choices"][0]) for _ in range(3)}
    assert len(texts) == 1


@test(COMPLETION)
def test_different_result_different_seed(s: Server) -> None:
    more = {"temperature": 1.5, "max_tokens": 16, "ignore_eos": True}
    texts = {said(s.complete("I", seed=n, **more)["choices"][0]) for n in range(4)}
    assert len(texts) == 4


@test(COMPLETION)
def test_consistent_result_different_batch_size(s: Server) -> None:
    """Alone, and with others in the same steps; at temperature 1 too, which is their to-do."""
    alone = said(s.complete(seed=42, temperature=1.0)["choices"][0])
    many = s.complete([PROMPT, "x", "y z", PROMPT], seed=42, temperature=1.0)["choices"]
    assert said(many[0]) == alone


@test(COMPLETION)
def test_cache_vs_nocache_prompt(s: Server) -> None:
    more = {"seed": 42, "temperature": 1.0}
    cold = said(s.complete(cache_salt="a", **more)["choices"][0])
    assert said(s.complete(cache_salt="a", **more)["choices"][0]) == cold


@test(COMPLETION)
def test_nocache_long_input_prompt(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": "x y " * 40_000})


@test(COMPLETION)
def test_completion_with_tokens_input(s: Server) -> None:
    """Ids, lists of ids, and texts; both in one prompt are only for segments."""
    ids = s.post("/tokenize", {"prompt": PROMPT})["tokens"]
    text = said(s.complete()["choices"][0])
    assert said(s.complete(ids)["choices"][0]) == text
    assert [said(c) for c in s.complete([ids, ids])["choices"]] == [text, text]


@test(COMPLETION)
def test_completion_parallel_slots(s: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        alone = [said(s.complete(f"{n}")["choices"][0]) for n in range(6)]
        beside = pool.map(lambda n: said(s.complete(f"{n}")["choices"][0]), range(6))
        assert list(beside) == alone


@test(COMPLETION)
def test_n_probs(s: Server) -> None:
    logprobs = s.complete(logprobs=10, ignore_eos=True)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 5
    assert all(10 <= len(top) <= 11 for top in logprobs["top_logprobs"])


@test(COMPLETION)
def test_n_probs_stream(s: Server) -> None:
    chunks = s.stream_completion(logprobs=10, ignore_eos=True)
    parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c.get("logprobs")]
    assert sum(len(part["tokens"]) for part in parts) == 5


@test(COMPLETION)
def test_logit_bias(s: Server) -> None:
    """Ids as keys; theirs takes texts and pairs too, which are refused here."""
    ids = s.post("/tokenize", {"prompt": "Gilcross"})["tokens"]
    text = said(s.complete(logit_bias={str(i): -100 for i in ids})["choices"][0])
    assert "Gilcross" not in text


@test(COMPLETION)
def test_cancel_request(s: Server) -> None:
    body = {"model": "duetto-demo", "prompt": "I", "max_tokens": 20_000, "ignore_eos": True}
    with s.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        next(reply.iter_lines())
    for _ in range(1000):
        if not any(slot["is_processing"] for slot in s.get("/slots")):
            return
    raise AssertionError("it still runs")


suite.leaves_out(COMPLETION, "`response_fields`, theirs", "test_completion_response_fields")
suite.leaves_out(COMPLETION, "`post_sampling_probs`, theirs", "test_n_probs_post_sampling")


# --- test_ctx_shift.py, test_tokenize.py, test_template.py ---


@test("test_ctx_shift.py")
def test_ctx_shift_disabled_short_prompt(s: Server) -> None:
    got = s.complete("Hi", max_tokens=64, ignore_eos=True)
    assert got["usage"]["completion_tokens"] == 64


@test("test_ctx_shift.py")
def test_ctx_shift_disabled_long_prompt(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": "x y " * 40_000}, "maximum context length")


@test("test_ctx_shift.py")
def test_ctx_shift_disabled_stream(s: Server) -> None:
    chunks = s.stream_completion("Once", max_tokens=64, ignore_eos=True)
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert said(chunks) and reasons[-1] == "length" and set(reasons[:-1]) == {None}


suite.leaves_out("test_ctx_shift.py", "the context is never shifted", "test_ctx_shift_enabled")
suite.leaves_out(
    "test_ignore_eos.py",
    "reads `generation_settings` of `/completion`",
    "test_ignore_eos_populates_logit_bias",
    "test_ignore_eos_false_no_logit_bias",
)


@test("test_tokenize.py")
def test_tokenize_detokenize(s: Server) -> None:
    """With vLLM's names of the fields (`prompt`), not theirs (`content`)."""
    ids = s.post("/tokenize", {"prompt": PROMPT})["tokens"]
    assert s.post("/detokenize", {"tokens": ids})["prompt"].strip() == PROMPT


@test("test_tokenize.py")
def test_tokenize_with_pieces(s: Server) -> None:
    body = {"prompt": "unicode 媽 and emoji 🤗", "return_token_strs": True}
    got = s.post("/tokenize", body)
    assert len(got["token_strs"]) == len(got["tokens"]) and all(got["token_strs"])


suite.leaves_out("test_tokenize.py", "the demo model has no BOS", "test_tokenize_with_bos")


@test("test_template.py")
def test_add_generation_prompt(s: Server) -> None:
    for wanted in (True, False):
        body = {"messages": USER, "add_generation_prompt": wanted}
        prompt = s.post("/v1/chat/completions/render", body)["prompt"]
        assert prompt.endswith("<|im_start|>assistant\n") is wanted


suite.leaves_out(
    "test_template.py",
    "templates of models that are not here",
    "test_reasoning",
    "test_date_inside_prompt",
)
suite.leaves_out("test_template.py", "a flag of theirs", "test_system_message_prefix")


# --- test_compat_anthropic.py ---

ANTHROPIC = "test_compat_anthropic.py"


@test(ANTHROPIC, differs="the reply has `timings`, which Anthropic's clients pass over")
def test_anthropic_messages_basic(s: Server) -> None:
    got = s.say()
    assert (got["type"], got["role"]) == ("message", "assistant")
    assert got["content"][0]["type"] == "text"
    assert got["stop_reason"] in ("end_turn", "max_tokens") and "timings" not in got
    usage = got["usage"]
    assert all(isinstance(usage[n], int) for n in ("input_tokens", "cache_read_input_tokens"))
    assert usage["output_tokens"] > 0


@test(ANTHROPIC)
def test_anthropic_messages_with_system(s: Server) -> None:
    assert s.say(system="Be short.")["content"]


@test(ANTHROPIC)
def test_anthropic_messages_multipart_content(s: Server) -> None:
    s.say(PARTS)


@test(ANTHROPIC)
def test_anthropic_messages_conversation(s: Server) -> None:
    s.say([*USER, {"role": "assistant", "content": "In Gilcross."}, *USER])


@test(ANTHROPIC)
def test_anthropic_messages_streaming(s: Server) -> None:
    events = s.stream_message()
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    start = events[0]["message"]
    assert start["content"] == [] and start["usage"]["input_tokens"] > 0
    opened = next(e for e in events if e["type"] == "content_block_start")
    assert opened["index"] == 0 and opened["content_block"]["type"] == "text"
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert deltas and all(d["type"] == "text_delta" for d in deltas)
    assert events[-2]["usage"]["output_tokens"] > 0 and "timings" not in events[-1]


@test(ANTHROPIC)
def test_anthropic_count_tokens(s: Server) -> None:
    count = s.post("/v1/messages/count_tokens", {"messages": USER})
    assert set(count) == {"input_tokens"} and count["input_tokens"] > 0


@test(ANTHROPIC)
def test_anthropic_count_tokens_with_system(s: Server) -> None:
    plain = s.post("/v1/messages/count_tokens", {"messages": USER})["input_tokens"]
    more = s.post("/v1/messages/count_tokens", {"messages": USER, "system": "Be short."})
    assert more["input_tokens"] > plain


@test(ANTHROPIC)
def test_anthropic_count_tokens_no_max_tokens(s: Server) -> None:
    s.post("/v1/messages/count_tokens", {"messages": USER})


@test(ANTHROPIC)
def test_anthropic_tool_use_basic(s: Server) -> None:
    """Required here: of its own accord the demo model calls nothing."""
    got = s.say(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=200)
    block = next(b for b in got["content"] if b["type"] == "tool_use")
    assert got["stop_reason"] == "tool_use" and block["name"] == "weather"
    assert set(block["input"]) == {"city", "days"}


def with_result(*blocks: dict[str, object]) -> list[dict[str, object]]:
    return [
        *USER,
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": list(blocks)},
    ]


@test(ANTHROPIC)
def test_anthropic_tool_result(s: Server) -> None:
    assert s.say(with_result(RESULT))["type"] == "message"


@test(ANTHROPIC)
def test_anthropic_tool_result_with_text(s: Server) -> None:
    s.say(with_result({"type": "text", "text": "Here:"}, RESULT))


@test(ANTHROPIC)
def test_anthropic_tool_result_error(s: Server) -> None:
    s.say(with_result({**RESULT, "is_error": True}))


@test(ANTHROPIC)
def test_anthropic_tool_streaming(s: Server) -> None:
    events = s.stream_message(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=200)
    opened = [e for e in events if e["type"] == "content_block_start"]
    assert opened[-1]["content_block"]["name"] == "weather"
    assert events[-1]["type"] == "message_stop"


@test(ANTHROPIC)
def test_anthropic_vision_format_accepted(s: Server) -> None:
    """Refused in words, as theirs is; a 400 where theirs is a 500."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    body = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 10}
    s.refused("/v1/messages", body, "image")


@test(ANTHROPIC)
def test_anthropic_stop_sequences(s: Server) -> None:
    s.say(stop_sequences=["\n", "END"])


@test(ANTHROPIC)
def test_anthropic_temperature(s: Server) -> None:
    s.say(temperature=0.5)


@test(ANTHROPIC)
def test_anthropic_top_p(s: Server) -> None:
    s.say(top_p=0.9)


@test(ANTHROPIC)
def test_anthropic_top_k(s: Server) -> None:
    s.say(top_k=40)


@test(ANTHROPIC)
def test_anthropic_missing_messages(s: Server) -> None:
    s.refused("/v1/messages", {"max_tokens": 50})


@test(ANTHROPIC, differs="refused, as Anthropic does; theirs answers")
def test_anthropic_empty_messages(s: Server) -> None:
    s.say([])


@test(ANTHROPIC)
def test_anthropic_streaming_content_block_indices(s: Server) -> None:
    events = s.stream_message(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=200)
    opened = [e["index"] for e in events if e["type"] == "content_block_start"]
    closed = [e["index"] for e in events if e["type"] == "content_block_stop"]
    assert opened == closed == list(range(len(opened)))


@test(ANTHROPIC, differs="refused where the template has no thinking: nothing is ignored")
def test_anthropic_thinking(s: Server) -> None:
    s.say(thinking={"type": "enabled", "budget_tokens": 50}, max_tokens=100)


@test(ANTHROPIC)
def test_anthropic_metadata(s: Server) -> None:
    s.say(metadata={"user_id": "somebody"})


@test(ANTHROPIC)
def test_anthropic_vs_openai_different_response_format(s: Server) -> None:
    theirs, ours = s.chat(), s.say()
    assert theirs["object"] == "chat.completion" and ours["type"] == "message"
    assert "prompt_tokens" in theirs["usage"] and "input_tokens" in ours["usage"]


suite.leaves_out(ANTHROPIC, "images", "test_anthropic_vision_base64_with_multimodal_model")
suite.leaves_out(ANTHROPIC, "a model that reasons", "test_anthropic_thinking_with_reasoning_model")


# --- test_compat_oai_responses.py ---

RESPONSES = "test_compat_oai_responses.py"


@test(RESPONSES)
def test_responses_with_text_format(s: Server) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": CONST}
    assert message_text(s.respond(text={"format": schema})) == '"42"'
    for kind in ("json_object", "text"):
        s.respond(text={"format": {"type": kind}})
    body = {"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}
    s.refused("/v1/responses", body)


@test(RESPONSES)
def test_responses_with_openai_library(s: Server) -> None:
    got = s.respond([{"role": "system", "content": "Be short."}, *USER], temperature=0)
    assert got["id"].startswith("resp_") and got["output"][0]["id"].startswith("msg_")


@test(RESPONSES)
def test_responses_stream_with_openai_library(s: Server) -> None:
    events = s.stream_response()
    ids = {e["response"]["id"] for e in events if "response" in e}
    items = {e["item_id"] for e in events if "item_id" in e}
    assert len(ids) == 1 and len(items) == 1
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert events[-1]["type"] == "response.completed"
    assert message_text(events[-1]["response"]) == text


suite.leaves_out(RESPONSES, "fields of theirs", "test_responses_stream_with_llama_telemetry")


# --- test_tool_call.py, test_security.py, and what is left out whole ---

CALLS = "test_tool_call.py"


@test(CALLS)
def test_completion_with_required_tool_real_model(s: Server) -> None:
    more = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    message = s.chat(max_tokens=200, **more)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}
    chunks = s.stream_chat(max_tokens=200, **more)
    parts = [p for c in chunks for x in c["choices"] for p in x["delta"].get("tool_calls") or ()]
    arguments = "".join(p["function"].get("arguments") or "" for p in parts)
    assert set(json.loads(arguments)) == {"city", "days"}


@test(CALLS)
def test_completion_without_tool_call_fast(s: Server) -> None:
    for more in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"}):
        message = s.chat(max_tokens=20, **more)["choices"][0]["message"]
        assert not message.get("tool_calls")


@test(CALLS)
def test_malformed_tool_call_args_rejected(s: Server) -> None:
    broken = {**CALL, "function": {"name": "weather", "arguments": "{"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [broken]}
    error = s.refused("/v1/chat/completions", {"messages": [*USER, turn, *USER]}, "arguments")
    assert error["type"] == "invalid_request_error" and re.search(r"messages\[1\]", str(error))


suite.leaves_out(
    CALLS,
    "what real models say with real templates",
    "test_completion_without_tool_call_slow",
    "test_weather",
    "test_calc_result",
    "test_thoughts",
    "test_hello_world",
)
KEYED = "test_security.py"


@test(KEYED)
def test_cors_options(s: Server) -> None:
    """An origin that was not allowed at the start gets nothing; theirs allows all."""
    headers = {"origin": "http://web.example", "access-control-request-method": "POST"}
    reply = s.http.options("/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in reply.headers


suite.leaves_out(
    KEYED,
    "a server with keys: tests/server/test_guard.py, test_messages.py",
    "test_access_public_endpoint",
    "test_incorrect_api_key",
    "test_correct_api_key",
    "test_correct_api_key_anthropic_header",
    "test_openai_library_correct_api_key",
)
suite.leaves_out(KEYED, "their page", "test_access_static_assets_without_api_key")
suite.leaves_out(KEYED, "images", "test_local_media_file")
for file, why in {
    "test_embedding.py": "the demo model is made for no embeddings",
    "test_infill.py": "the demo model's tokenizer has no tokens for it",
    "test_kv_keep_only_active.py": "their slots and their log",
    "test_lora.py": "adapters",
    "test_metrics.py": "names of their metrics",
    "test_rerank.py": "reranking",
    "test_router.py": "a router of several models",
    "test_sleep.py": "a flag of theirs",
    "test_slot_save.py": "slots that are saved",
    "test_speculative.py": "`/completion`; tests/server/test_drafts_end_to_end.py",
    "test_stream.py": "streams that are taken up again",
    "test_tools_builtin.py, test_mcp_servers.py": "tools that the server runs",
    "test_vision_api.py": "images",
}.items():
    suite.leaves_out(file, why, "(all)")
