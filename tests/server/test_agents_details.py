"""What the three APIs for agents share or must not confuse: fields that are refused, streams that
say what bodies say, log-probabilities, special tokens, and the store."""

import json
from threading import Thread

import pytest
from grammar_world import TOKENS, asked, make_grammars
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app, post
from starlette.testclient import TestClient

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar
from duetto.dialects.choose import choose_dialects
from duetto.engine.speech import Speech
from duetto.engine.tool_rules import ToolRules
from duetto.grammars.compile import CompiledGrammars
from duetto.server.apis.responses.store import ResponseStore

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
TURNS = [{"role": "user", "content": "Hello"}]
ASK = {
    CHAT: {"model": MODEL, "messages": TURNS},
    MESSAGES: {"model": MODEL, "messages": TURNS, "max_tokens": 200},
    RESPONSES: {"model": MODEL, "input": "Hello"},
}
SCHEMA = {"type": "object"}
TOOL = {
    CHAT: {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    MESSAGES: {"name": "weather", "input_schema": SCHEMA},
    RESPONSES: {"type": "function", "name": "weather", "parameters": SCHEMA},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Riga"}}\n</tool_call>'
THOUGHT = "<think>\nfar\n</think>\n\n"


def saying(text: str, special: frozenset[str] = frozenset(), **settings) -> TestClient:
    dialects = choose_dialects(None, tool_call_parser="hermes", reasoning_parser="think")
    app, _ = make_app(SpeakingExecutor(text), speech=Speech(dialects, special), **settings)
    return TestClient(app)


def events_of(client, path, **more):
    reply = client.post(path, json={**ASK[path], "stream": True, **more})
    assert reply.status_code == 200, reply.text
    return [
        json.loads(line.removeprefix("data: "))
        for line in reply.text.splitlines()
        if line.startswith("data: {")
    ]


TEXT_BLOCK = {"type": "text", "text": "x", "citations": [{"type": "char_location"}]}


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        (
            MESSAGES,
            {"tools": [{**TOOL[MESSAGES], "defer_loading": True}]},
            "tools[0].defer_loading",
        ),
        (
            MESSAGES,
            {"tools": [{**TOOL[MESSAGES], "allowed_callers": ["code_execution_20250825"]}]},
            "tools[0].allowed_callers",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [TEXT_BLOCK]}]},
            "messages[0].content[0].citations",
        ),
        (MESSAGES, {"system": [TEXT_BLOCK]}, "system[0].citations"),
        (MESSAGES, {"tools": [TOOL[MESSAGES]] * 2}, "tools[1].name"),
        (
            MESSAGES,
            {"thinking": {"type": "enabled", "budget_tokens": 100}},
            "thinking.budget_tokens",
        ),
        (RESPONSES, {"tools": [{**TOOL[RESPONSES], "defer_loading": True}]}, "tools[0].defer_load"),
        (RESPONSES, {"tools": [TOOL[RESPONSES]] * 2}, "tools[1].name"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        (RESPONSES, {"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary"),
        (RESPONSES, {"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        (RESPONSES, {"input": [{**TURNS[0], "output": "x"}]}, "input[0].output"),
        (
            RESPONSES,
            {"input": [{"type": "function_call_output", "call_id": "c", "role": "assistant"}]},
            "input[0].role",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(path, more, field):
    with saying("x") as client:
        reply = client.post(path, json={**ASK[path], **more})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"].startswith(field), reply.text


def test_what_changes_nothing_is_accepted():
    thinking = {"type": "enabled", "budget_tokens": 199}
    tool = {**TOOL[MESSAGES], "defer_loading": False, "allowed_callers": ["direct"]}
    with saying("x") as client:
        post(client, MESSAGES, {**ASK[MESSAGES], "thinking": thinking, "tools": [tool]})
        reasoning = {"summary": "auto", "effort": None}
        more = {"reasoning": reasoning, "text": {"verbosity": "medium"}}
        post(client, RESPONSES, {**ASK[RESPONSES], **more})


def test_a_message_has_its_blocks_in_the_order_of_its_stream():
    with saying(f"{THOUGHT}One. {CALL}\nTwo. {CALL}\nThree.") as client:
        more = {"tools": [TOOL[MESSAGES]]}
        blocks = post(client, MESSAGES, {**ASK[MESSAGES], **more})["content"]
        events = events_of(client, MESSAGES, **more)
    begun = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert begun == ["thinking", "text", "tool_use", "text", "tool_use", "text"]
    assert [block["type"] for block in blocks] == begun
    assert [block["text"].strip() for block in blocks[1::2]] == ["One.", "Two.", "Three."]


def test_thinking_can_be_left_out():
    thinking = {"type": "adaptive", "display": "omitted"}
    with saying(f"{THOUGHT}Well.") as client:
        blocks = post(client, MESSAGES, {**ASK[MESSAGES], "thinking": thinking})["content"]
        events = events_of(client, MESSAGES, thinking=thinking)
    assert blocks[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert blocks[1]["text"] == "Well."
    assert not [e for e in events if e.get("delta", {}).get("type") == "thinking_delta"]


def test_a_response_counts_reasoning_streamed_or_not():
    with saying(f"{THOUGHT}Well.") as client:
        whole = post(client, RESPONSES, ASK[RESPONSES])
        streamed = events_of(client, RESPONSES)[-1]["response"]
    counts = [
        each["usage"]["output_tokens_details"]["reasoning_tokens"] for each in (whole, streamed)
    ]
    # A reader who is behind gets steps as one, which then counts as what the whole of it is.
    assert min(counts) >= 3 and abs(counts[0] - counts[1]) <= len(THOUGHT)
    assert whole["completed_at"] >= whole["created_at"]


@pytest.mark.parametrize("text", ["Well.", f"{THOUGHT}Well."])
def test_log_probabilities_are_those_of_the_message(text):
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    with saying(text) as client:
        whole = post(client, RESPONSES, {**ASK[RESPONSES], **more})
        events = events_of(client, RESPONSES, **more)
    for body in (whole, events[-1]["response"]):
        (part,) = body["output"][-1]["content"]
        assert part["text"] == "Well."
        shown = [entry["token"] for entry in part["logprobs"]]
        assert "".join(shown).strip().startswith("Well."), shown
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(entry["token"] for part in deltas for entry in part).strip() == "Well."


def test_special_tokens_are_shown_to_who_asks_for_them():
    special = frozenset({"<tool_call>", "</tool_call>", "<mark>"})
    with saying("a<mark>b", special) as client:
        body = {**ASK[CHAT], "tools": [TOOL[CHAT]]}
        dropped = post(client, CHAT, body)
        kept = post(client, CHAT, {**body, "skip_special_tokens": False})
    assert dropped["choices"][0]["message"]["content"] == "ab"
    assert kept["choices"][0]["message"]["content"] == "a<mark>b"


def test_what_is_too_large_to_be_stored_says_so():
    with saying("x" * 400, max_stored_bytes=4000) as client:
        made = post(client, RESPONSES, {**ASK[RESPONSES], "instructions": "y" * 40})
        assert client.get(f"{RESPONSES}/{made['id']}").status_code == 404
    assert made["store"] is False


class AnyText:
    """Makes grammars that nobody follows."""

    def make(self, wanted: object, tenant: bytes = b"") -> Grammar:
        return Grammar("", "")


def test_a_constraint_of_the_whole_answer_is_no_reasoning():
    """Where the prompt has begun reasoning, as templates of models that always reason do."""
    dialects = choose_dialects(None, reasoning_parser="deepseek_r1")
    app, _ = make_app(SpeakingExecutor("yes"), speech=Speech(dialects), grammars=AnyText())
    with TestClient(app) as client:
        body = {**ASK[CHAT], "structured_outputs": {"choice": ["yes", "no"]}}
        message = post(client, CHAT, body)["choices"][0]["message"]
    assert message["content"] == "yes" and message["reasoning"] is None


def test_json_comes_behind_the_reasoning_that_the_prompt_has_begun():
    grammars = make_grammars()
    speech = Speech(choose_dialects(None, reasoning_parser="think"), grammars=grammars)
    params = SamplingParams(structured_outputs=asked(json_object=True))
    assert speech.plan(None, "assistant:", params).grammar is None
    grammar = speech.plan(None, "assistant:<think>\n", params).grammar
    for text, ends in ((b"ab </think>\n{}", True), (b"{}", False)):
        matcher, ids = grammars.matcher(grammar), list[int]()
        while text:
            starts = [i for i, token in enumerate(TOKENS) if token and text.startswith(token)]
            ids.append(max(starts, key=lambda i: len(TOKENS[i])))
            text = text[len(TOKENS[ids[-1]]) :]
        assert matcher.seek(ids) and bool(matcher.allowed()[0]) is ends


def test_what_no_grammar_can_hold_is_refused_only_where_it_must_be_held():
    speech = Speech(choose_dialects(None, tool_call_parser="qwen3_coder"), grammars=make_grammars())
    properties = {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}]
    assert speech.plan(ToolRules(tools=tools), "", SamplingParams()).grammar is None
    with pytest.raises(InvalidRequest, match="tools"):
        speech.plan(ToolRules(tools=tools, is_required=True), "", SamplingParams())


def test_many_tools_are_one_grammar_that_is_kept(monkeypatch):
    """Not one for each tool: hundreds would push each other out of what is kept. And what is not
    supported is found out once, not with every request of a conversation."""
    compiled = list[str]()
    compile_ = CompiledGrammars._compile

    def count(self, grammar, field):
        compiled.append(grammar.text)
        return compile_(self, grammar, field)

    monkeypatch.setattr(CompiledGrammars, "_compile", count)
    speech = Speech(choose_dialects(None, tool_call_parser="hermes"), grammars=make_grammars())
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in "abc"]
    for _ in range(2):
        assert speech.plan(ToolRules(tools=tools), "", SamplingParams()).grammar is not None
        assert len(compiled) == 1
    odd = {"type": "object", "properties": {"a": {"not": {}}}}
    tools.append({"type": "function", "function": {"name": "odd", "parameters": odd}})
    made = [speech.plan(ToolRules(tools=tools), "", SamplingParams()).grammar for _ in range(2)]
    assert made[0] == made[1] is not None
    # Before; all; two schemas, as three are the same; and all, with any arguments of the odd one.
    assert len(compiled) == len({*compiled}) == 1 + 1 + 2 + 1
    with pytest.raises(InvalidRequest, match=r"tools\[3\].function.parameters: #/properties/a/not"):
        speech.plan(ToolRules(tools=tools, is_required=True), "", SamplingParams())


def test_the_store_is_asked_by_many_threads():
    """Bodies are read, and large replies made, on threads of their own: while one asks for a
    response, another may delete it."""
    deleter: list[Thread] = []

    def clock() -> float:
        if is_asking and not deleter:
            deleter.append(Thread(target=store.delete, args=(b"t", "r")))
            deleter[0].start()
            deleter[0].join(0.2)  # it has to wait until the other is done
        return 0.0

    is_asking = False
    store = ResponseStore(40_000, 600.0, clock)
    assert store.put(b"t", {"id": "r"}, [], [])
    is_asking = True
    assert store.get(b"t", "r") is not None
    deleter[0].join()
    assert store.get(b"t", "r") is None


class Refusing(type(CODEC)):
    """As templates do with a result that no call asked for."""

    def render_chat(self, messages, **more):
        at = next((i for i, m in enumerate(messages) if m["role"] == "tool"), None)
        if at is not None:
            raise InvalidRequest(f"messages[{at}].tool_call_id", "no call has it")
        return super().render_chat(messages, **more)


def test_faults_are_named_as_the_caller_wrote_them():
    result = {"type": "tool_result", "tool_use_id": "nobody", "content": "x"}
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}, result]}
    output = {"type": "function_call_output", "call_id": "nobody", "output": "x"}
    with saying("ok", codec=Refusing()) as client:
        said = client.post(MESSAGES, json={**ASK[MESSAGES], "messages": [turn]}).json()
        told = client.post(RESPONSES, json={**ASK[RESPONSES], "input": [output]}).json()
        method = client.put(MESSAGES, json={})
    assert said["error"]["message"].startswith("messages[0].content[1].tool_use_id"), said
    assert told["error"]["param"] == "input[0].call_id"
    assert method.status_code == 405 and method.json()["type"] == "error"
