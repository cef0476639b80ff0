"""What real clients sent (tests/clients/transcripts, made by record.py), sent again without them.

The model says what each request asks for: a call of a tool, JSON of the schema, or a text.
"""

import json
import re
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.structured import Vocabulary
from duetto.dialects.choose import choose_dialects
from duetto.engine.speech import Speech
from duetto.grammars.compile import CompiledGrammars

FOLDER = Path(__file__).parents[1] / "clients" / "transcripts"
TRANSCRIPTS = sorted(FOLDER.glob("*.json"))
CONFIG = SchedulerConfig(
    num_blocks=8192, max_model_len=32768, block_size=16, max_num_batched_tokens=32768
)
ID = r"\b{}_[0-9A-Za-z]{{8,}}"  # as record.py finds them
WHOLE = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
}
STREAMED = {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
}
LAST_EVENTS = {"response.completed", "response.incomplete", "message_stop"}
MESSAGE = {"id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage"}


class DemoSized(type(CODEC)):
    """Takes the ids of the demo model, of which clients sent some; its template reads as little."""

    vocab_size = 4096

    def render_chat(self, messages, *, template_kwargs=None, **more):
        if template_kwargs:
            raise InvalidRequest("chat_template_kwargs", f"{[*template_kwargs]} is not read")
        return super().render_chat(messages, **more)


BYTES = Vocabulary([*(bytes([i]) for i in range(256)), b"<end>"], {"<end>": 256}, frozenset({256}))


def value_of(schema, definitions):
    """The shortest value that comes to mind, of a schema as clients make them."""
    if ref := schema.get("$ref"):
        return value_of(definitions[ref.rsplit("/", 1)[1]], definitions)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return value_of(schema[key][0], definitions)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if schema.get("type") == "object" or "properties" in schema:
        wanted = schema.get("required", ())
        return {k: value_of(v, definitions) for k, v in schema["properties"].items() if k in wanted}
    simple = {"integer": 1, "number": 1, "boolean": True, "array": [], "null": None}
    return simple.get(schema.get("type"), "Riga")


def schema_of(body):
    """That of the answer, by the name that each API has for it."""
    for found in (
        (body.get("response_format") or {}).get("json_schema"),
        (body.get("text") or {}).get("format"),
        (body.get("output_config") or {}).get("format"),
    ):
        if found and "schema" in found:
            return found["schema"]
    return None


def answer_to(body):
    choice, tools = body.get("tool_choice"), body.get("tools")
    if tools and (choice == "required" or isinstance(choice, dict)):
        if choice == "required" or choice.get("type") in ("auto", "any"):
            name = None
        else:
            name = choice.get("name") or choice["function"]["name"]
        flat = [tool.get("function", tool) for tool in tools]
        tool = next(tool for tool in flat if name in (None, tool["name"]))
        schema = tool.get("parameters") or tool.get("input_schema") or {"type": "object"}
        arguments = value_of({"properties": {}, **schema}, schema.get("$defs", {}))
        call = json.dumps({"name": tool["name"], "arguments": arguments})
        return f"<tool_call>\n{call}\n</tool_call>"
    if schema := schema_of(body):
        return json.dumps(value_of(schema, schema.get("$defs", {})))
    return "Hi there."


def filled_in(text, replies):
    """With the ids of the replies that were got this time."""

    def id_of(found):
        at, prefix, n = found.groups()
        ids = re.findall(ID.format(prefix), replies[int(at)])
        return [*dict.fromkeys(ids)][int(n)]

    return re.sub(r"\$(\d+)\.([a-z]+)\.(\d+)\$", id_of, text)


def with_ends(chunk):
    """openai's type of a completion has a reason in every chunk, which no server gives."""
    ended = [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]]
    return {**chunk, "choices": ended}


def check_stream(path, text):
    data = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    if path in ("/v1/chat/completions", "/v1/completions"):
        assert data.pop() == "[DONE]"
    events = [json.loads(each) for each in data]
    if path in STREAMED:
        for event in events:
            STREAMED[path].validate_python(with_ends(event) if path == "/v1/completions" else event)
    if "type" in events[-1]:
        assert events[-1]["type"] in LAST_EVENTS
    else:
        ends = [c["finish_reason"] for event in events for c in event["choices"]]
        assert [end for end in ends if end], events


def check_reply(exchange, reply):
    path = exchange["path"].partition("?")[0]
    if exchange["method"] != "POST" or reply.status_code != 200:
        return
    if exchange["body"].get("stream"):
        check_stream(path, reply.text)
    elif path in WHOLE:
        found = reply.json()
        if exchange["body"].get("echo"):  # its first token has no score, which their types forget
            for choice in found["choices"]:
                assert choice["logprobs"]["token_logprobs"].pop(0) is None
                assert choice["logprobs"]["top_logprobs"].pop(0) is None
        WHOLE[path].model_validate(found)
    elif path == "/v1/messages":
        assert set(reply.json()) >= MESSAGE


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_what_a_client_sent_is_answered_as_then(path):
    text = path.read_text().replace("duetto-demo", MODEL)
    grammars, executor, replies = CompiledGrammars(lambda: BYTES), SpeakingExecutor(), []
    dialects = choose_dialects(None, tool_call_parser="hermes", reasoning_parser="think")
    speech = Speech(dialects, grammars=grammars)
    app, _ = make_app(executor, CONFIG, DemoSized(), speech=speech, grammars=grammars)
    with TestClient(app) as client:
        for recorded in json.loads(text):
            exchange = json.loads(filled_in(json.dumps(recorded), replies))
            body = exchange["body"]
            executor.text = answer_to(body or {})
            reply = client.request(
                exchange["method"],
                exchange["path"],
                headers=exchange["headers"],
                content=None if body is None else json.dumps(body),
            )
            assert reply.status_code == exchange["status"], (exchange, reply.text)
            check_reply(exchange, reply)
            replies.append(reply.text)


def test_there_are_transcripts():
    assert len(TRANSCRIPTS) >= 16
    assert sum(path.stat().st_size for path in TRANSCRIPTS) < 300_000
