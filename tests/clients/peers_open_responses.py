"""The compliance tests of Open Responses (openresponses.org), by their ids, as checks of ours.

Theirs compare each response with the schema of their OpenAPI; here with its required fields.
"""

from typing import Any

from peers_suite import FLAT_TOOL, PROMPT, Server, Suite

suite = Suite("Open Responses", "bin/compliance-test.ts", "as stored in November 2026")
test = suite.test
FILE = "src/lib/compliance-tests.ts"
FIELDS = [
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
    *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice"),
    *("truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty"),
    *("frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier"),
    *("metadata", "safety_identifier", "prompt_cache_key"),
]
ITEM_FIELDS = {
    "message": {"id", "status", "role", "content"},
    "function_call": {"id", "call_id", "name", "arguments", "status"},
}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


def whole(response: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    missing = [name for name in FIELDS if name not in response]
    assert not missing, missing
    assert response["object"] == "response" and response["status"] == status
    assert response["output"]
    for item in response["output"]:
        assert ITEM_FIELDS[item["type"]] <= set(item), item
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert {"cached_tokens"} <= set(usage["input_tokens_details"])
    assert {"reasoning_tokens"} <= set(usage["output_tokens_details"])
    return response


def events_in_order(events: list[dict[str, Any]]) -> None:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert all(event["type"].startswith("response.") for event in events)


@test(FILE, name="basic-response")
def basic(s: Server) -> None:
    whole(s.respond([message("user", PROMPT)]))


@test(FILE, name="streaming-response")
def streaming(s: Server) -> None:
    events = s.stream_response([message("user", PROMPT)])
    events_in_order(events)
    whole(events[-1]["response"])


@test(FILE, name="system-prompt")
def system(s: Server) -> None:
    whole(s.respond([message("system", "Be short."), message("user", PROMPT)]))


@test(FILE, name="tool-calling")
def tool(s: Server) -> None:
    """Required here: of its own accord the demo model calls nothing."""
    got = whole(s.respond([message("user", PROMPT)], tools=[FLAT_TOOL], tool_choice="required"))
    assert any(item["type"] == "function_call" for item in got["output"])


@test(FILE, name="tool-calling-streaming")
def tool_streaming(s: Server) -> None:
    more = {"tools": [FLAT_TOOL], "tool_choice": "required"}
    events = s.stream_response([message("user", PROMPT)], **more)
    events_in_order(events)
    kinds = {event["type"].removeprefix("response.") for event in events}
    assert {"function_call_arguments.delta", "function_call_arguments.done"} <= kinds
    for kind in ("added", "done"):
        items = [e["item"] for e in events if e["type"] == f"response.output_item.{kind}"]
        assert any(item["type"] == "function_call" for item in items)


@test(FILE, name="function-call-roundtrip")
def roundtrip(s: Server) -> None:
    chosen = {"type": "function", "name": "weather"}
    first = whole(s.respond(tools=[FLAT_TOOL], tool_choice=chosen))
    (call,) = [item for item in first["output"] if item["type"] == "function_call"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "18 degrees"}
    more = {"previous_response_id": first["id"], "tools": [FLAT_TOOL]}
    whole(s.respond([result], **more))
    whole(s.respond([message("user", PROMPT), call, result], tools=[FLAT_TOOL]))


@test(FILE, name="multi-turn")
def turns(s: Server) -> None:
    answer = message("assistant", "In Gilcross.")
    whole(s.respond([message("user", PROMPT), answer, message("user", PROMPT)]))


@test(FILE, name="previous-response-id")
def previous(s: Server) -> None:
    first = whole(s.respond())
    second = whole(s.respond(PROMPT, previous_response_id=first["id"]))
    assert second["previous_response_id"] == first["id"]


suite.leaves_out(FILE, "images", "image-input")
suite.leaves_out(FILE, "files", "file-input")
suite.leaves_out(FILE, "optional: tools that a server runs", "file-search", "offline-web-search")
