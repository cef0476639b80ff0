"""OpenAI's Responses: objects, typed events, and what is stored."""

import json

import pytest
from server.fakes_server import CODEC, MODEL, post
from server.speaking import named_events, saying

from duetto.core.errors import InvalidRequest

PATH = "/v1/responses"
ASK = {"model": MODEL, "input": "Hello", "max_output_tokens": 200}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
MESSAGE = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Riga"}}\n</tool_call>'


def events_of(client, body):
    events = named_events(client, PATH, body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_text_is_one_message():
    with saying("Hi there") as client:
        reply = post(client, PATH, ASK)
    assert reply["object"] == "response" and reply["status"] == "completed"
    assert reply["id"].startswith("resp_")
    (item,) = reply["output"]
    assert item["type"] == "message" and item["role"] == "assistant"
    assert item["status"] == "completed"
    assert item["content"] == [
        {"type": "output_text", "text": "Hi there", "annotations": [], "logprobs": []}
    ]
    usage = reply["usage"]
    assert usage["output_tokens"] == 9
    assert usage["total_tokens"] == usage["input_tokens"] + 9
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}


def test_the_limit_makes_it_incomplete():
    with saying("Hi there") as client:
        reply = post(client, PATH, {**ASK, "max_output_tokens": 3})
        events = events_of(client, {**ASK, "max_output_tokens": 3})
    assert reply["status"] == "incomplete"
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert reply["output"][0]["status"] == "incomplete"
    assert events[-1]["type"] == "response.incomplete"


def test_the_events_of_a_stream_come_in_the_order_of_the_specification():
    thought = "<think>\nfar\n</think>\n\nWell. "
    with saying(thought + CALL) as client:
        events = events_of(client, {**ASK, "tools": [TOOL]})
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:2] == ["created", "in_progress"] and names[-1] == "completed"
    short = [n for i, n in enumerate(names) if not (n.endswith("delta") and n == names[i - 1])]
    assert short[2:-1] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    done = events[-1]["response"]
    kinds = [item["type"] for item in done["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    call = done["output"][2]
    assert json.loads(call["arguments"]) == {"city": "Riga"} and call["name"] == "weather"
    assert call["call_id"].startswith("call_")
    for kind, at in (("reasoning_text", 0), ("output_text", 1)):
        text = done["output"][at]["content"][0]["text"]
        deltas = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == text
        (end,) = [e for e in events if e["type"] == f"response.{kind}.done"]
        assert end["text"] == text and end["output_index"] == at
        assert end["item_id"] == done["output"][at]["id"]
    arguments = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert "".join(arguments) == call["arguments"]
    assert done["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_one_goes_on_from_what_was_stored():
    with saying("Hi") as client:
        first = post(client, PATH, ASK)
        second = post(client, PATH, {**ASK, "previous_response_id": first["id"]})
        alone = post(client, PATH, ASK)
        turns = [
            {"role": "user", "content": "Hello"},
            {"type": "message", **first["output"][0]},
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ]
        whole = post(client, PATH, {**ASK, "input": turns})
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] > alone["usage"]["input_tokens"]
    assert second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_what_is_stored_can_be_asked_for_and_deleted_by_its_owner_alone():
    keys = {"api_keys": ("one", "two")}
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    with saying("Hi", **keys) as client:
        made = client.post(PATH, json=ASK, headers=one).json()
        path = f"{PATH}/{made['id']}"
        assert client.get(path, headers=one).json() == made
        items = client.get(f"{path}/input_items", headers=one).json()
        assert items["data"][0]["content"] == [{"type": "input_text", "text": "Hello"}]
        assert client.get(path, headers=two).status_code == 404
        assert client.delete(path, headers=two).status_code == 404
        assert client.post(f"{path}/cancel", headers=one).status_code == 400
        deleted = client.delete(path, headers=one).json()
        assert deleted == {"id": made["id"], "object": "response", "deleted": True}
        assert client.get(path, headers=one).status_code == 404
        later = {**ASK, "previous_response_id": made["id"]}
        reply = client.post(PATH, json=later, headers=one)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "previous_response_id"


def test_input_items_come_in_pages():
    texts = [f"t{i}" for i in range(25)]
    turns = [{"role": "user", "content": text, "id": f"i{i}"} for i, text in enumerate(texts)]
    with saying("Hi") as client:
        path = f"{PATH}/{post(client, PATH, {**ASK, 'input': turns})['id']}/input_items"

        def page(query=""):
            reply = client.get(path + query)
            assert reply.status_code == 200, reply.text
            shown = reply.json()
            ids = [item["id"] for item in shown["data"]]
            assert (
                (shown["first_id"], shown["last_id"]) == (ids[0], ids[-1]) if ids else (None,) * 2
            )
            return ids, shown["has_more"]

        ids = [f"i{i}" for i in range(25)]
        assert page() == (ids[:4:-1], True)  # OpenAI's order and length
        assert page("?order=asc") == (ids[:20], True)
        assert page("?order=asc&after=i19") == (ids[20:], False)
        assert page("?order=desc&after=i2&limit=100") == (["i1", "i0"], False)
        assert page("?limit=25&api-version=2025-01-01") == (ids[::-1], False)
        assert page("?after=i0") == ([], False)
        for query, field in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=²", "limit"),
            ("order=up", "order"),
            ("after=x", "after"),
            ("include[]=x", "include[]"),
            ("limit=1&limit=2", "limit"),
        ):
            error = client.get(f"{path}?{query}").json()["error"]
            assert error["param"] == field and error["message"].startswith(f"{field}: ")


def test_what_a_query_asks_for_is_honoured_or_refused():
    with saying("Hi") as client:
        path = f"{PATH}/{post(client, PATH, ASK)['id']}"
        for query in ("", "?stream=false", "?include_obfuscation=true", "?api-version=x"):
            assert client.get(path + query).status_code == 200
        for method, at, query in (
            ("GET", path, "stream=true"),
            ("GET", path, "include[]=message.output_text.logprobs"),
            ("GET", path, "starting_after=3"),
            ("DELETE", path, "force=1"),
            ("POST", f"{path}/cancel", "now=1"),
            ("POST", PATH, "stream=true"),
            ("POST", "/v1/chat/completions", "temperature=0"),
            ("POST", "/v1/messages/count_tokens", "stream=true"),
            ("POST", "/tokenize", "model=x"),
        ):
            reply = client.request(method, f"{at}?{query}", json=None if method == "GET" else ASK)
            assert reply.status_code == 400, (at, reply.text)
            assert reply.json()["error"]["message"].startswith(query.split("=")[0] + ": ")
        assert client.post("/v1/messages?beta=true", json=MESSAGE).status_code == 200
        assert client.get(path).status_code == 200


def test_store_false_is_honoured_and_the_store_can_be_off():
    with saying("Hi") as client:
        made = post(client, PATH, {**ASK, "store": False})
        assert made["store"] is False
        assert client.get(f"{PATH}/{made['id']}").status_code == 404
    with saying("Hi", max_stored_bytes=0) as client:
        assert post(client, PATH, ASK)["store"] is False
        reply = client.post(PATH, json={**ASK, "store": True})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "store"


def test_a_call_and_its_result_come_back_as_items():
    with saying(CALL) as client:
        first = post(client, PATH, {**ASK, "tools": [TOOL]})
        (call,) = first["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        body = {**ASK, "tools": [TOOL], "previous_response_id": first["id"], "input": [result]}
        assert post(client, PATH, body)["status"] == "completed"
        items = [{"role": "user", "content": "Hello"}, call, result]
        assert post(client, PATH, {**ASK, "tools": [TOOL], "input": items})["output"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"temperature": 1e9}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(more, field):
    with saying("x") as client:
        reply = client.post(PATH, json={**ASK, **more})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(field), reply.text


def test_the_store_is_bounded():
    with saying("Hi", max_stored_bytes=20_000) as client:
        ids = [post(client, PATH, ASK)["id"] for _ in range(40)]
        found = [client.get(f"{PATH}/{each}").status_code for each in ids]
    assert found[-1] == 200 and found[0] == 404
    assert found == sorted(found, reverse=True)


def test_what_codex_sends_with_every_turn_is_taken():
    """codex-cli 0.171, without its namespaces and its web search."""
    item = {"type": "message", "id": "msg_1"}
    text = [{"type": "input_text", "text": "hi"}]
    body = {
        "model": MODEL,
        "input": [
            {**item, "role": "developer", "content": text},
            {**item, "role": "user", "content": text},
        ],
        "tools": [{**TOOL, "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"session_id": "s"},
    }
    with saying("Hi") as client:
        assert events_of(client, body)[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("more", "field", "accepted"),
    [
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role",
         "assistant, developer, system, user"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type",
         "function_call, function_call_output, message, reasoning"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "function"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type",
         "json_object, json_schema, text"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"service_tier": "flex"}, "service_tier", "auto, default"),
    ],
    ids=str,
)  # fmt: skip
def test_a_refused_value_is_followed_by_those_of_this_api(more, field, accepted):
    with saying("x") as client:
        error = client.post(PATH, json={**ASK, **more}).json()["error"]
    assert error["param"] == field
    assert error["message"].endswith(f"is not supported in this version; accepted: {accepted}")


def test_reasoning_that_cannot_be_read_is_refused():
    def asked(**more):
        reasoning = {"type": "reasoning", "encrypted_content": "Z2VoZWlt", **more}
        return {**ASK, "input": [reasoning, {"role": "user", "content": "x"}]}

    with saying("x") as client:
        error = client.post(PATH, json=asked()).json()["error"]
        post(client, PATH, asked(summary=[{"type": "summary_text", "text": "far"}]))
    assert error["param"] == "input[0].encrypted_content"


@pytest.mark.parametrize(
    ("effort", "is_taken"), [("none", True), ("medium", True), ("high", False)]
)
def test_an_effort_that_is_usual_asks_for_nothing(effort, is_taken):
    class Reader(type(CODEC)):
        def render_chat(self, messages, *, template_kwargs=None, **more):
            if template_kwargs:
                raise InvalidRequest("chat_template_kwargs", "none is read")
            return super().render_chat(messages, **more)

    with saying("x", codec=Reader()) as client:
        reply = client.post(PATH, json={**ASK, "reasoning": {"effort": effort}})
    if is_taken:
        assert reply.status_code == 200, reply.text
    else:
        assert reply.json()["error"]["message"] == (
            "reasoning.effort: this model's chat template has no levels of it; "
            "accepted: none, medium"
        )


def test_an_input_that_is_missing_is_not_called_empty():
    with saying("x") as client:
        told = [
            client.post(PATH, json={"model": MODEL, **more}).json()["error"]["message"]
            for more in ({}, {"input": None}, {"input": ""}, {"input": []})
        ]
    assert told == ["input: is required"] * 2 + ["input: must not be empty"] * 2
