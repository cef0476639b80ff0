"""vLLM's tests of its server, by name, as checks of ours.

Theirs that look into their own classes are left out; so is what needs adapters, images or a model
that reasons. What a text says is not compared: their models are others.
"""

import json
import re
from typing import Any

from peers_suite import (
    CITY,
    FLAT_TOOL,
    MODEL,
    NAMED,
    PROMPT,
    TOOL,
    USER,
    Server,
    Suite,
    message_text,
    said,
)

suite = Suite("vLLM", "tests/entrypoints", "as stored in November 2026")
test = suite.test
MORE = {"temperature": 0, "ignore_eos": True}
BAD_SCHEMA = {"type": "object", "properties": {"x": "bar"}}
BAD_GRAMMAR = 'root ::= missing_rule\nother ::= "x"'
USAGE = {"include_usage": True}


def usage_adds_up(usage: dict[str, Any]) -> None:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def usages(chunks: list[dict[str, Any]]) -> list[Any]:
    return [chunk.get("usage") for chunk in chunks]


# --- openai/completion/test_completion.py ---

COMPLETION = "openai/completion/test_completion.py"


@test(COMPLETION)
def test_single_completion(s: Server) -> None:
    got = s.complete(**MORE)
    (choice,) = got["choices"]
    assert got["id"] and choice["finish_reason"] == "length"
    usage_adds_up(got["usage"])
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    assert s.complete([9, 9, 9], **MORE)["choices"][0].get("prompt_logprobs") is None


@test(COMPLETION, differs="`truncation_side` is refused by name; the last tokens are kept")
def test_completion_truncation_side_controls_prompt_truncation(s: Server) -> None:
    more = {"return_token_ids": True, "truncate_prompt_tokens": 2}
    left = s.complete([9, 10, 11], truncation_side="left", **more)["choices"][0]
    right = s.complete([9, 10, 11], truncation_side="right", **more)["choices"][0]
    assert (left["prompt_token_ids"], right["prompt_token_ids"]) == ([10, 11], [9, 10])


@test(COMPLETION)
def test_no_logprobs(s: Server) -> None:
    assert s.complete(logprobs=None)["choices"][0].get("logprobs") is None


@test(COMPLETION)
def test_zero_logprobs(s: Server) -> None:
    logprobs = s.complete(logprobs=0, **MORE)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] and len(logprobs["top_logprobs"][0]) == 1


@test(COMPLETION)
def test_some_logprobs(s: Server) -> None:
    logprobs = s.complete(logprobs=5, **MORE)["choices"][0]["logprobs"]
    assert 5 <= len(logprobs["top_logprobs"][0]) <= 6


@test(COMPLETION)
def test_too_many_completion_logprobs(s: Server) -> None:
    for more in ({}, {"stream": True}):
        s.refused("/v1/completions", {"prompt": "x", "logprobs": 999, **more}, "logprobs")
    s.complete()


@test(COMPLETION)
def test_prompt_logprobs_completion(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs")
    for wanted in (0, 1):
        got = s.complete(["A robot", "My name is"], prompt_logprobs=wanted)
        assert all(choice["prompt_logprobs"] for choice in got["choices"])
    assert s.complete("A robot")["choices"][0].get("prompt_logprobs") is None


@test(COMPLETION)
def test_completion_streaming(s: Server) -> None:
    chunks = s.stream_completion(**MORE)
    assert said(chunks) == said(s.complete(**MORE)["choices"][0])
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}


@test(COMPLETION)
def test_parallel_no_streaming(s: Server) -> None:
    more = {"n": 3, "temperature": 1.5, "seed": 42, "max_tokens": 30, "ignore_eos": True}
    choices = s.complete("I", **more)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    assert len({said(c) for c in choices}) == 3 and all(c["finish_reason"] for c in choices)


@test(COMPLETION)
def test_parallel_streaming(s: Server) -> None:
    more = {"n": 3, "temperature": 1.5, "seed": 42, "max_tokens": 30, "ignore_eos": True}
    texts = {0: "", 1: "", 2: ""}
    ends = 0
    for chunk in s.stream_completion("I", **more):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends += choice["finish_reason"] is not None
    assert ends == 3 and len(set(texts.values())) == 3
    assert [*texts.values()] == [said(c) for c in s.complete("I", **more)["choices"]]


OPTIONS = "without `stream`, options that ask for nothing are taken; one that asks is refused"


def stream_options(s: Server, stream: Any, path: str, body: dict[str, Any]) -> None:
    for options in ({"include_usage": False}, {}):
        assert not any(usages(stream(stream_options=options, **MORE)))
    *rest, last = stream(stream_options=USAGE, **MORE)
    assert not any(usages(rest)) and last["choices"] == []
    usage_adds_up(last["usage"])
    chunks = stream(stream_options={**USAGE, "continuous_usage_stats": True}, **MORE)
    for usage in usages(chunks):
        usage_adds_up(usage)
    for options in (USAGE, {"include_usage": None}, {"continuous_usage_stats": True}):
        s.refused(path, {**body, "stream_options": options}, "stream_options")


@test(COMPLETION, differs=OPTIONS)
def test_completion_stream_options(s: Server) -> None:
    stream_options(s, s.stream_completion, "/v1/completions", {"prompt": "x"})


@test(COMPLETION)
def test_batch_completions(s: Server) -> None:
    """Without its beam search, which is not here."""
    for prompts in ([PROMPT] * 2, [[9, 10, 11]] * 2):
        one, two = s.complete(prompts, **MORE)["choices"]
        assert said(one) == said(two)
        texts = ["", ""]
        for chunk in s.stream_completion(prompts, **MORE):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == [said(one), said(two)]


@test(COMPLETION)
def test_echo_logprob_completion(s: Server) -> None:
    for wanted in (1, 0):
        for prompt in (PROMPT, [9, 10, 11]):
            (choice,) = s.complete(prompt, echo=True, logprobs=wanted, **MORE)["choices"]
            logprobs = choice["logprobs"]
            assert prompt == [9, 10, 11] or choice["text"].startswith(PROMPT)
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert all(1 <= len(top) <= wanted + 1 for top in logprobs["top_logprobs"][1:])
            assert len(logprobs["tokens"]) == len(logprobs["text_offset"])


def refuses(path: str, body: dict[str, Any], kind: str, value: Any) -> Any:
    def check(s: Server) -> None:
        s.refused(path, {**body, "structured_outputs": {kind: value}})

    return check


CHAT_MORE = "openai/chat_completion/test_chat_completion.py"
for name, kind, value in (
    ("test_invalid_json_schema", "json", BAD_SCHEMA),
    ("test_invalid_regex", "regex", "[.*"),
    ("test_invalid_grammar", "grammar", BAD_GRAMMAR),
):
    test(COMPLETION, name=name)(refuses("/v1/completions", {"prompt": "x"}, kind, value))
    test(CHAT_MORE, name=name)(refuses("/v1/chat/completions", {"messages": USER}, kind, value))
test(CHAT_MORE, name="test_empty_grammar")(
    refuses("/v1/chat/completions", {"messages": USER}, "grammar", "")
)


@test(CHAT_MORE, differs="`truncation_side` is refused by name; the last tokens are kept")
def test_chat_completion_truncation_side_controls_prompt_truncation(s: Server) -> None:
    s.chat(truncate_prompt_tokens=4, truncation_side="right")


# --- openai/completion: the rest ---

PROMPTS = "openai/completion/test_prompt_validation.py"


@test(PROMPTS)
def test_empty_prompt(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": None}, "prompt")


@test(PROMPTS)
def test_out_of_vocab_token_ids(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": [999_999]}, "prompt", "999999")


suite.leaves_out(
    PROMPTS,
    "embeddings as prompts, hidden states",
    "test_load_prompt_embeds",
    "test_disable_prompt_embeds",
    "test_inline_hidden_states_rejects_unsupported_http_shapes",
    "test_inline_hidden_states_rejects_multiple_completion_prompts",
    "test_inline_hidden_states_with_concurrent_streaming",
)


@test("openai/completion/test_empty_prompt_list.py")
def test_empty_prompt_list_rejected(s: Server) -> None:
    s.refused("/v1/completions", {"prompt": []}, "prompt")


@test("openai/completion/test_empty_prompt_list.py")
def test_nonempty_prompt_list_ok(s: Server) -> None:
    s.complete(["hello"])


@test("openai/completion/test_completion_text_offset.py")
def test_stream_text_offset_matches_non_stream_with_stop_holdback(s: Server) -> None:
    more = {"logprobs": 0, "stop": ["\n\n"], **MORE}
    parts = [c["logprobs"] for x in s.stream_completion(**more) for c in x["choices"]]
    streamed = [offset for part in parts if part for offset in part["text_offset"]]
    assert streamed == s.complete(**more)["choices"][0]["logprobs"]["text_offset"]


# --- openai/chat_completion/test_chat.py ---

CHAT = "openai/chat_completion/test_chat.py"


def tops(s: Server, **more: Any) -> Any:
    return s.chat(temperature=0, **more)["choices"][0]["logprobs"]


@test(CHAT)
def test_no_logprobs_chat(s: Server) -> None:
    assert s.chat(logprobs=False)["choices"][0].get("logprobs") is None


@test(CHAT)
def test_zero_logprobs_chat(s: Server) -> None:
    assert tops(s, logprobs=True, top_logprobs=0)["content"][0]["top_logprobs"] == []


@test(CHAT)
def test_some_logprobs_chat(s: Server) -> None:
    assert len(tops(s, logprobs=True, top_logprobs=5)["content"][0]["top_logprobs"]) == 5


@test(CHAT)
def test_too_many_chat_logprobs(s: Server) -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 999}
    for more in ({}, {"stream": True}):
        s.refused("/v1/chat/completions", {**body, **more}, "top_logprobs")
    s.chat()


@test(CHAT)
def test_prompt_logprobs_chat(s: Server) -> None:
    for wanted in (1, 0):
        assert s.chat(prompt_logprobs=wanted)["prompt_logprobs"]
    assert s.chat().get("prompt_logprobs") is None
    s.refused("/v1/chat/completions", {"messages": USER, "prompt_logprobs": -1}, "prompt_logprobs")


@test(CHAT)
def test_more_than_one_prompt_logprobs_chat(s: Server) -> None:
    one, two = (s.chat(prompt_logprobs=n)["prompt_logprobs"][3] for n in (1, 2))
    assert 1 <= len(one) <= 2 and 2 <= len(two) <= 3


@test(CHAT)
def test_single_chat_session(s: Server) -> None:
    got = s.chat(logprobs=True, top_logprobs=5)
    usage_adds_up(got["usage"])
    (choice,) = got["choices"]
    turns = [*USER, {"role": "assistant", "content": said(choice)}, *USER]
    assert s.chat(turns)["choices"][0]["message"]["role"] == "assistant"


@test(CHAT)
def test_chat_streaming(s: Server) -> None:
    chunks = s.stream_chat(temperature=0)
    (choice,) = s.chat(temperature=0)["choices"]
    assert said(chunks) == said(choice)
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert [r for r in reasons if r] == [choice["finish_reason"]] == reasons[-1:]


@test(CHAT, differs=OPTIONS)
def test_chat_completion_stream_options(s: Server) -> None:
    stream_options(s, s.stream_chat, "/v1/chat/completions", {"messages": USER})


@test(CHAT)
def test_structured_outputs_choice_chat(s: Server) -> None:
    names = ["Gilcross", "Oslo"]
    (choice,) = s.chat(structured_outputs={"choice": names}, max_tokens=20)["choices"]
    assert said(choice) in names


@test(CHAT)
def test_structured_outputs_json_chat(s: Server) -> None:
    (choice,) = s.chat(structured_outputs={"json": CITY}, max_tokens=200)["choices"]
    assert set(json.loads(said(choice))) == {"city", "days"}


@test(CHAT)
def test_structured_outputs_regex_chat(s: Server) -> None:
    ip = r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)\.){3}(25[0-5]|(2[0-4]|1\d|[1-9]|)\d)"
    (choice,) = s.chat(structured_outputs={"regex": ip}, max_tokens=40)["choices"]
    assert re.fullmatch(ip, said(choice))


@test(CHAT)
def test_structured_outputs_type_error(s: Server) -> None:
    body = {"messages": USER, "structured_outputs": {"regex": {"1": "x"}}}
    s.refused("/v1/chat/completions", body, "regex")


@test(CHAT)
def test_structured_outputs_choice_chat_logprobs(s: Server) -> None:
    found = tops(s, structured_outputs={"choice": ["a", "b"]}, logprobs=True, top_logprobs=5)
    assert all(t["logprob"] >= -9999 for t in found["content"][0]["top_logprobs"])


@test(CHAT)
def test_response_format_json_object(s: Server) -> None:
    (choice,) = s.chat(response_format={"type": "json_object"}, max_tokens=200)["choices"]
    assert isinstance(json.loads(said(choice)), dict)


@test(CHAT)
def test_response_format_json_schema(s: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    (choice,) = s.chat(response_format=wanted, max_tokens=200)["choices"]
    assert set(json.loads(said(choice))) == {"city", "days"}


@test(CHAT)
def test_response_format_text(s: Server) -> None:
    assert said(s.chat(response_format={"type": "text"})["choices"][0]) is not None


@test(CHAT, differs="an unknown field is refused by its name, of a message too")
def test_extra_fields_allowed(s: Server) -> None:
    s.chat([{**USER[0], "extra_field": "0"}])


@test(CHAT)
def test_complex_message_content(s: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    assert said(s.chat(parts)["choices"][0]) == said(s.chat()["choices"][0])


@test(CHAT, differs="roles are those of OpenAI")
def test_custom_role(s: Server) -> None:
    s.chat([{"role": "my-role", "content": "x"}])


@test(CHAT)
def test_long_seed(s: Server) -> None:
    for seed in (-(2**63) - 1, 2**64):
        s.refused("/v1/chat/completions", {"messages": USER, "seed": seed}, "seed")


@test(CHAT)
def test_chat_completion_n_parameter_non_streaming(s: Server) -> None:
    choices = s.chat(n=3, temperature=1.5, max_tokens=20, ignore_eos=True)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2] and len({said(c) for c in choices}) > 1


@test(CHAT)
def test_chat_completion_n_parameter_streaming(s: Server) -> None:
    chunks = s.stream_chat(n=2, ignore_eos=True)
    indexes = {c["index"] for x in chunks for c in x["choices"] if c["delta"].get("content")}
    assert indexes == {0, 1}


@test(CHAT)
def test_chat_completion_n_with_seed(s: Server) -> None:
    one, two = (s.chat(n=2, seed=42, temperature=0.8, ignore_eos=True) for _ in range(2))
    assert [said(c) for c in one["choices"]] == [said(c) for c in two["choices"]]


@test(CHAT)
def test_chat_completion_n_equals_1(s: Server) -> None:
    assert [c["index"] for c in s.chat(n=1)["choices"]] == [0]


suite.leaves_out(CHAT, "SageMaker's route", "test_invocations")
suite.leaves_out(
    CHAT,
    "their classes",
    "test_chat_completion_request_n_parameter_to_sampling_params",
    "test_chat_completion_request_n_parameter_default",
    "test_chat_completion_request_n_parameter_various_values",
)


# --- openai/chat_completion: echo, logit_bias, token ids, tools ---

ECHO = "openai/chat_completion/test_chat_echo.py"


@test(ECHO)
def test_chat_session_with_echo_and_continue_final_message(s: Server) -> None:
    begun = [*USER, {"role": "assistant", "content": "It is based in"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    for echo in (True, False):
        (choice,) = s.chat(begun, echo=echo, **more)["choices"]
        assert ("It is based in" in said(choice)) is echo


suite.leaves_out(
    ECHO,
    "a server with `--max-logprobs`: tests/server/test_logprobs.py",
    "test_prompt_logprobs",
    "test_top_logprobs",
)
BIAS = "openai/chat_completion/test_chat_logit_bias_validation.py"


def bias_refused(s: Server, bias: Any, *words: str) -> None:
    s.refused("/v1/chat/completions", {"messages": USER, "logit_bias": bias}, *words)


@test(BIAS)
def test_chat_logit_bias_valid(s: Server) -> None:
    s.chat(logit_bias={"9": 1.0})


@test(BIAS)
def test_chat_logit_bias_invalid(s: Server) -> None:
    bias_refused(s, {"999999": 1.0}, "logit_bias", "999999")


@test(BIAS)
def test_chat_logit_bias_non_integer_key(s: Server) -> None:
    bias_refused(s, {"no_id": 50}, "logit_bias", "no_id")


@test(BIAS)
def test_chat_logit_bias_non_numeric_value(s: Server) -> None:
    bias_refused(s, {"1": "x"}, "logit_bias")


@test(BIAS, differs="the first one is named, not all")
def test_chat_logit_bias_multiple_non_integer_keys(s: Server) -> None:
    bias_refused(s, {"bad1": 50, "bad2": 20}, "bad1", "bad2")


IDS = "openai/basic/test_return_token_ids.py"


@test(IDS)
def test_basic_completion_with_emoji(s: Server) -> None:
    prompt = "I love 🚀"
    (choice,) = s.complete(prompt, return_token_ids=True, logprobs=1)["choices"]
    assert s.post("/detokenize", {"tokens": choice["prompt_token_ids"]})["prompt"] == prompt
    assert choice["token_ids"]
    (without,) = s.complete(prompt, return_token_ids=False)["choices"]
    assert without.get("token_ids") is None and without.get("prompt_token_ids") is None


@test(IDS)
def test_chat_completion_with_tool_use(s: Server) -> None:
    got = s.chat(tools=[TOOL], tool_choice="auto", return_token_ids=True, logprobs=True)
    assert got["choices"][0]["token_ids"] is not None
    prompt = s.post("/detokenize", {"tokens": got["prompt_token_ids"]})["prompt"]
    assert PROMPT in prompt
    assert s.chat(tools=[TOOL]).get("prompt_token_ids") is None


@test(IDS, differs="`prompt_logprobs` beside `echo` with `logprobs` is refused: one of them")
def test_comparison_with_prompt_logprobs_and_logprobs(s: Server) -> None:
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1}
    (choice,) = s.complete(echo=True, prompt_logprobs=1, **ids, **MORE)["choices"]
    named = [int(t.removeprefix("token_id:")) for t in choice["logprobs"]["tokens"]]
    assert named == choice["prompt_token_ids"] + choice["token_ids"]
    chunks = s.stream_completion(**ids, **MORE)
    choices = [c for chunk in chunks for c in chunk["choices"]]
    assert choices[0]["prompt_token_ids"]
    streamed = [i for c in choices for i in c.get("token_ids") or ()]
    tokens = [t for c in choices if c.get("logprobs") for t in c["logprobs"]["tokens"]]
    assert [f"token_id:{i}" for i in streamed] == tokens


@test(IDS)
def test_chat_completion_with_emoji_and_token_ids(s: Server) -> None:
    turns = [{"role": "user", "content": "I love 🐱"}]
    got = s.chat(turns, return_token_ids=True, ignore_eos=True, temperature=0)
    chunks = s.stream_chat(turns, return_token_ids=True, ignore_eos=True, temperature=0)
    assert chunks[0]["prompt_token_ids"] == got["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    streamed = [i for x in chunks for c in x["choices"] for i in c.get("token_ids") or ()]
    assert streamed == got["choices"][0]["token_ids"]


TOOLS = "openai/chat_completion/test_completion_with_function_calling.py"


@test(TOOLS, name="test_function_tool_use")
def chat_function_tool_use(s: Server) -> None:
    """`required` and by name, whole and streamed; `auto` depends on the model."""
    for chosen in ("required", NAMED):
        more = {"tools": [TOOL], "tool_choice": chosen, "max_tokens": 200}
        assert s.chat(**more)["choices"][0]["message"]["tool_calls"]
        chunks = s.stream_chat(**more)
        assert any(c["delta"].get("tool_calls") for x in chunks for c in x["choices"])


@test(TOOLS)
def test_no_args_tool_call(s: Server) -> None:
    """The empty text of their second case is no JSON, and refused."""
    clock = {
        "name": "now",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    more = {"tools": [{"type": "function", "function": clock}], "max_tokens": 100}
    message = s.chat(tool_choice="required", **more)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    call["function"]["arguments"] = "{}"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "noon"}
    s.chat([*USER, message, result], **more)


@test(TOOLS, name="test_named_tool_use")
def chat_named_tool_use(s: Server) -> None:
    more = {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 200}
    message = s.chat(**more)["choices"][0]["message"]
    whole = message["tool_calls"][0]["function"]["arguments"]
    assert not message["content"] and set(json.loads(whole)) == {"city", "days"}
    chunks = s.stream_chat(**more)
    assert not said(chunks)
    parts = [p for x in chunks for c in x["choices"] for p in c["delta"].get("tool_calls") or ()]
    assert "".join(p["function"].get("arguments") or "" for p in parts) == whole


@test(TOOLS)
def test_inconsistent_tool_choice_and_tools(s: Server) -> None:
    missing = {"type": "function", "function": {"name": "missing"}}
    for more in (
        {"tool_choice": NAMED},
        {"tools": [TOOL], "tool_choice": missing},
        {"tools": [TOOL], "tool_choice": {}},
    ):
        s.refused("/v1/chat/completions", {"messages": USER, **more}, "tool_choice")


@test(TOOLS, name="test_max_tokens_with_tool_choice_required")
def chat_max_tokens_with_tool_choice_required(s: Server) -> None:
    for chosen in ("required", NAMED):
        (choice,) = s.chat(tools=[TOOL], tool_choice=chosen, max_tokens=1)["choices"]
        assert choice["finish_reason"] == "length" and not choice["message"].get("tool_calls")


# --- openai/responses ---

BASIC = "openai/responses/test_basic.py"


@test(BASIC)
def test_simple_input(s: Server) -> None:
    """Without its reasoning: the demo model has none."""
    assert s.respond()["output"][-1]["type"] == "message"


@test(BASIC)
def test_instructions(s: Server) -> None:
    plain, more = s.respond(), s.respond(instructions="Be short.")
    assert more["usage"]["input_tokens"] > plain["usage"]["input_tokens"]


@test(BASIC)
def test_chat(s: Server) -> None:
    assert s.respond([*USER, {"role": "assistant", "content": "In Gilcross."}, *USER])["output"]


@test(BASIC)
def test_chat_with_input_type(s: Server) -> None:
    parts = [{"type": "input_text", "text": PROMPT}]
    assert s.respond([{"role": "user", "content": parts}])["status"] == "completed"


@test(BASIC)
def test_logprobs(s: Server) -> None:
    got = s.respond(include=["message.output_text.logprobs"], top_logprobs=5)
    assert len(got["output"][-1]["content"][-1]["logprobs"][0]["top_logprobs"]) == 5


@test(BASIC)
def test_streaming(s: Server) -> None:
    kinds = [event["type"] for event in s.stream_response()]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds


SIMPLE = "openai/responses/test_simple.py"


def item(role: str, text: str, **more: Any) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {
        "type": "message",
        "role": role,
        "content": [{"type": kind, "text": text, **({"annotations": []} if more else {})}],
        **more,
    }


@test(SIMPLE)
def test_basic(s: Server) -> None:
    got = s.respond()
    assert got["status"] == "completed" and got["incomplete_details"] is None


def history(s: Server, **more: Any) -> None:
    thought = {"type": "reasoning", "summary": [], "encrypted_content": None}
    ids = {"id": "rs_1", "status": "completed"} if more else {}
    turns = [item("user", "Hi"), item("assistant", "Yes.", **more), {**thought, **ids}]
    assert s.respond([*turns, item("user", PROMPT)])["status"] == "completed"


@test(SIMPLE)
def test_input_history_openai_shape_e2e(s: Server) -> None:
    history(s, id="msg_1", status="completed")


@test(SIMPLE)
def test_input_history_openresponses_shape_e2e(s: Server) -> None:
    history(s)


@test(SIMPLE)
def test_multiturn_history_replay_without_ids_e2e(s: Server) -> None:
    text = message_text(s.respond())
    got = s.respond([item("user", PROMPT), item("assistant", text), item("user", "Sure?")])
    assert got["status"] == "completed"


@test(SIMPLE)
def test_streaming_output_consistency(s: Server) -> None:
    events = s.stream_response()
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert text == message_text(events[-1]["response"])


@test(SIMPLE)
def test_streaming_logprobs(s: Server) -> None:
    events = s.stream_response(include=["message.output_text.logprobs"], top_logprobs=3)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert deltas
    for each in deltas:
        assert all(p["logprob"] <= 0 and len(p["top_logprobs"]) <= 3 for p in each["logprobs"])
    assert any(p["top_logprobs"] for each in deltas for p in each["logprobs"])


@test(SIMPLE)
def test_max_tokens(s: Server) -> None:
    got = s.respond(max_output_tokens=1)
    assert got["status"] == "incomplete"
    assert got["incomplete_details"] == {"reason": "max_output_tokens"}


@test(SIMPLE)
def test_extra_sampling_params(s: Server) -> None:
    more = {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "seed": 42}
    assert s.respond(temperature=0.7, **more)["output"]


OPENS = {
    "completed": "created",
    "output_item.done": "output_item.added",
    "content_part.done": "content_part.added",
    "output_text.done": "output_text.delta",
    "function_call_arguments.done": "function_call_arguments.delta",
}


def well_nested(events: list[dict[str, Any]]) -> None:
    stack: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind in OPENS:
            assert stack.pop() == OPENS[kind], (kind, stack)
        elif kind in OPENS.values() and stack[-1:] != [kind]:
            stack.append(kind)
    assert not stack


@test(SIMPLE)
def test_streaming_types(s: Server) -> None:
    well_nested(s.stream_response(tools=[], background=False))


suite.leaves_out(SIMPLE, "`enable_response_messages`, theirs", "test_enable_response_messages")
suite.leaves_out(
    SIMPLE,
    "a model that reasons",
    "test_reasoning_item",
    "test_streaming_reasoning_tokens_e2e",
    "test_non_streaming_reasoning_tokens_e2e",
)
STATE = "openai/responses/test_stateful.py"


@test(STATE)
def test_store(s: Server) -> None:
    made = s.respond()
    assert s.get(f"/v1/responses/{made['id']}")["status"] == "completed"
    kept_not = s.respond(store=False)
    s.ask("GET", f"/v1/responses/{kept_not['id']}", status=404)


@test(STATE, differs="`background` is refused by name")
def test_background(s: Server) -> None:
    assert s.respond(background=True)["status"] == "queued"


@test(STATE)
def test_background_error(s: Server) -> None:
    s.refused("/v1/responses", {"input": "x", "background": True, "store": False}, "background")


@test(STATE, differs="`background` is refused by name")
def test_background_cancel(s: Server) -> None:
    made = s.respond(background=True)
    assert s.post(f"/v1/responses/{made['id']}/cancel", {})["status"] == "cancelled"


@test(STATE)
def test_cancel_completed(s: Server) -> None:
    s.ask("POST", f"/v1/responses/{s.respond()['id']}/cancel", status=400)


@test(STATE)
def test_previous_response_id(s: Server) -> None:
    first = s.respond(instructions="Be short.")
    second = s.respond("And then?", previous_response_id=first["id"])
    third = s.respond("And then?", previous_response_id=second["id"])
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]


@test(STATE)
def test_two_responses_with_same_prev_id(s: Server) -> None:
    first = s.respond()
    one, two = (s.respond("And then?", previous_response_id=first["id"]) for _ in range(2))
    assert one["usage"]["input_tokens"] == two["usage"]["input_tokens"]


FORMS = "openai/responses/test_structured_output.py"
FORMAT = {"format": {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}}


@test(FORMS)
def test_structured_output(s: Server) -> None:
    assert set(json.loads(message_text(s.respond(text=FORMAT)))) == {"city", "days"}


@test(FORMS)
def test_structured_output_with_parse(s: Server) -> None:
    got = s.respond(text=FORMAT, instructions="Be short.")
    assert set(json.loads(message_text(got))) == {"city", "days"}


suite.leaves_out(FORMS, "their classes", "TestConstraintToContentFormat (7)")
CALLS = "openai/responses/test_function_call.py"
REQUIRED = {"tools": [FLAT_TOOL], "tool_choice": "required"}


def call_of(reply: dict[str, Any]) -> dict[str, Any]:
    (call,) = [each for each in reply["output"] if each["type"] == "function_call"]
    assert set(json.loads(call["arguments"])) == {"city", "days"}
    return call


@test(CALLS)
def test_function_tool_use(s: Server) -> None:
    call_of(s.respond(**REQUIRED))


@test(CALLS)
def test_max_tokens_with_tool_choice_required(s: Server) -> None:
    got = s.respond(max_output_tokens=2, **REQUIRED)
    assert not [each for each in got["output"] if each["type"] == "function_call"]
    assert got["incomplete_details"]["reason"] == "max_output_tokens"


@test(CALLS)
def test_named_tool_use(s: Server) -> None:
    chosen = {"type": "function", "name": "weather"}
    call = call_of(s.respond(tools=[FLAT_TOOL], tool_choice=chosen))
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    s.respond([*USER, call, result])


@test(CALLS)
def test_function_calling_with_streaming_expected_arguments(s: Server) -> None:
    events = s.stream_response(**REQUIRED)
    deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call_of(events[-1]["response"])["arguments"]


@test(CALLS)
def test_function_calling_with_streaming_types(s: Server) -> None:
    well_nested(s.stream_response(**REQUIRED))


# --- anthropic/test_messages.py, serve/ ---

MESSAGES = "anthropic/test_messages.py"
ANTHROPIC_TOOL = {"name": "weather", "input_schema": CITY}


@test(MESSAGES)
def test_simple_messages(s: Server) -> None:
    got = s.say()
    assert (got["stop_reason"], got["role"]) == ("end_turn", "assistant")


@test(MESSAGES)
def test_system_message(s: Server) -> None:
    assert s.say(system="Be short.")["role"] == "assistant"


@test(MESSAGES)
def test_anthropic_streaming(s: Server) -> None:
    assert s.stream_message()[-1]["type"] == "message_stop"


@test(MESSAGES)
def test_anthropic_tool_call(s: Server) -> None:
    """Required here: of its own accord the demo model calls nothing."""
    got = s.say(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=200)
    assert got["stop_reason"] == "tool_use"


SERVE = "serve/instrumentator/test_basic.py"


@test(SERVE)
def test_show_version(s: Server) -> None:
    assert set(s.get("/version")) >= {"version"}


@test(SERVE)
def test_check_health(s: Server) -> None:
    s.get("/health")


@test(SERVE)
def test_request_cancellation(s: Server) -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 20_000, "ignore_eos": True}
    for _ in range(8):
        sent = s.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
        with sent as reply:
            next(reply.iter_lines())
    assert s.chat()["choices"]
    for _ in range(1000):
        if s.get("/load")["server_load"] == 0:
            return
    raise AssertionError("they still run")


@test(SERVE, differs="JSON is read whatever it is called, as `curl -d` calls it a form")
def test_request_wrong_content_type(s: Server) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    body = json.dumps({"model": MODEL, "messages": USER})
    reply = s.http.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code >= 400


@test(SERVE)
def test_server_load(s: Server) -> None:
    assert s.get("/load")["server_load"] == 0
    body = {"model": MODEL, "prompt": "I", "max_tokens": 20_000, "ignore_eos": True}
    with s.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        next(reply.iter_lines())
        load = s.get("/load")
        assert load["server_load"] == 1, load


suite.leaves_out(SERVE, "their classes, `/health/decode`", "the rest")
TOKENIZE = "serve/tokenize/test_tokenization.py"


@test(TOKENIZE)
def test_tokenize_completions(s: Server) -> None:
    for special in (False, True):
        got = s.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": special})
        assert got["count"] == len(got["tokens"]) and got["max_model_len"] == 32768
        assert got["token_strs"] is None


@test(TOKENIZE)
def test_tokenize_chat(s: Server) -> None:
    begun = [*USER, {"role": "assistant", "content": "Sure,"}]
    for messages, more in ((USER, True), (USER, False), (begun, False)):
        body = {"messages": messages, "add_generation_prompt": more}
        body["continue_final_message"] = messages is begun
        rendered = s.post("/v1/chat/completions/render", body)["token_ids"]
        assert s.post("/tokenize", body)["tokens"] == rendered


@test(TOKENIZE)
def test_tokenize_chat_with_tools(s: Server) -> None:
    plain = s.post("/tokenize", {"messages": USER})["count"]
    got = s.post("/tokenize", {"messages": USER, "tools": [TOOL]})
    assert got["count"] > plain and got["token_strs"] is None


@test(TOKENIZE)
def test_tokenize_with_return_token_strs(s: Server) -> None:
    got = s.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert len(got["token_strs"]) == got["count"]


@test(TOKENIZE)
def test_detokenize(s: Server) -> None:
    ids = s.post("/tokenize", {"prompt": PROMPT})["tokens"]
    assert s.post("/detokenize", {"tokens": ids}) == {"prompt": PROMPT}


@test(TOKENIZE)
def test_tokenizer_info_basic(s: Server) -> None:
    assert s.get("/tokenizer_info")["tokenizer_class"]


@test(TOKENIZE)
def test_tokenizer_info_schema(s: Server) -> None:
    assert isinstance(s.get("/tokenizer_info")["eos_token"], str)


@test(TOKENIZE)
def test_tokenizer_info_consistency_with_tokenize(s: Server) -> None:
    assert s.get("/tokenizer_info")["model_max_length"] >= 32768


@test(TOKENIZE)
def test_tokenizer_info_chat_template(s: Server) -> None:
    assert s.get("/tokenizer_info")["chat_template"].strip()


RENDER = "serve/render/test_render.py"
NO_PARAMS = "the reply has no `sampling_params`"


@test(RENDER, differs=NO_PARAMS)
def test_completion_render_basic(s: Server) -> None:
    (got,) = s.post("/v1/completions/render", {"prompt": PROMPT})
    assert got["token_ids"] and got["model"] == MODEL and got["sampling_params"]


@test(RENDER)
def test_chat_completion_render_basic(s: Server) -> None:
    ids = s.post("/v1/chat/completions/render", {"messages": USER})["token_ids"]
    assert ids and all(isinstance(i, int) for i in ids)


@test(RENDER, differs=NO_PARAMS)
def test_completion_render_multiple_prompts(s: Server) -> None:
    got = s.post("/v1/completions/render", {"prompt": ["a", "b"]})
    assert len(got) == 2 and all(each["sampling_params"] for each in got)


@test(RENDER)
def test_chat_completion_render_multi_turn(s: Server) -> None:
    turns = [*USER, {"role": "assistant", "content": "In Gilcross."}, *USER]
    assert s.post("/v1/chat/completions/render", {"messages": turns})["token_ids"]


@test(RENDER, differs="the reply repeats no fields of the request")
def test_chat_completion_render_with_stream_true(s: Server) -> None:
    got = s.post("/v1/chat/completions/render", {"messages": USER, "stream": True})
    assert got["token_ids"] and got["stream"] is True


@test(RENDER)
def test_completion_render_error_invalid_model(s: Server) -> None:
    s.refused("/v1/completions/render", {"prompt": "x", "model": "no"}, status=404)


@test(RENDER)
def test_chat_completion_render_error_invalid_model(s: Server) -> None:
    s.refused("/v1/chat/completions/render", {"messages": USER, "model": "no"}, status=404)


@test(RENDER)
def test_completion_render_no_generation(s: Server) -> None:
    (got,) = s.post("/v1/completions/render", {"prompt": "a long story " * 10})
    assert "choices" not in got


@test(RENDER, differs=NO_PARAMS)
def test_chat_completion_render_with_sampling_params(s: Server) -> None:
    got = s.post("/v1/chat/completions/render", {"messages": USER, "temperature": 0.123})
    assert got["sampling_params"]["temperature"] == 0.123


NO_MESSAGES = "`/v1/messages/render` is not there; `count_tokens` is"
for name in ("basic", "system_and_multi_turn"):

    @test(RENDER, name=f"test_messages_render_{name}", differs=NO_MESSAGES)
    def messages_render(s: Server) -> None:
        s.post("/v1/messages/render", {"messages": USER, "max_tokens": 16})


@test(RENDER)
def test_messages_render_error_invalid_model(s: Server) -> None:
    body = {"messages": USER, "max_tokens": 16, "model": "no"}
    s.refused("/v1/messages/render", body, status=404)


suite.leaves_out(
    "openai/chat_completion/test_enable_force_include_usage.py",
    "a flag of theirs",
    "test_chat_with_enable_force_include_usage",
)
for file, why in {
    "anthropic: the other files": "their classes",
    "openai/chat_completion: the other files": "their classes; images, audio, video; harmony",
    "openai/completion: the other files": "their classes; adapters; embeddings as prompts",
    "openai/responses: the other files": "their classes; harmony; MCP; websockets",
    "serve: the other files": "sleep, weights, adapters, profiles, SageMaker, gRPC",
}.items():
    suite.leaves_out(file, why, "(all)")
