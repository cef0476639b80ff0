"""Items of a response as messages of the conversation that goes on, and as a list of its input."""

from collections.abc import Sequence

from duetto.engine.read_answer import call_id
from duetto.server.apis.responses.body import InputItem, ResponsesRequest, TextContent
from duetto.server.http.errors import cut, invalid
from duetto.server.http.json_parts import Json


def messages_of_output(output: Sequence[Json]) -> list[Json]:
    """The assistant's turn that an answer's items are: one message, as templates want it."""
    message: Json = {"role": "assistant", "content": None}
    for item in output:
        match item["type"]:
            case "message":
                text = "".join([part["text"] for part in item["content"]])
                message["content"] = (message["content"] or "") + text
            case "reasoning":
                text = "".join([part["text"] for part in item["content"]])
                message["reasoning_content"] = message.get("reasoning_content", "") + text
            case _:
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
    if not message.get("tool_calls"):
        message["content"] = message["content"] or ""
    return [message]


def input_items(request: ResponsesRequest) -> list[Json]:
    """What was sent, as items with ids."""
    if isinstance(request.input, str):
        content = [{"type": "input_text", "text": request.input}]
        return [{"type": "message", "id": call_id("msg_"), "role": "user", "content": content}]
    return [_shown(item) for item in request.input or ()]


def page_of(items: Sequence[Json], after: str | None, limit: int) -> Json:
    """OpenAI's list, from behind the item that `after` names. Raises ApiError 400 if none has that
    id."""
    start = 0
    if after is not None:
        start = next((at for at, item in enumerate(items, start=1) if item["id"] == after), 0)
        if not start:
            raise invalid("after", f"{cut(after)!r} is the id of no item of this response")
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _shown(item: InputItem) -> Json:
    shown: Json = {"type": item.type, "id": item.id or call_id("item_")}
    for name in ("role", "name", "call_id", "arguments", "output", "encrypted_content"):
        value = getattr(item, name)
        if value is not None:
            shown[name] = _parts(value, item.role)
    if item.content is not None:
        shown["content"] = _parts(item.content, item.role, always=True)
    if item.summary is not None:
        shown["summary"] = [{"type": part.type, "text": part.text} for part in item.summary]
    return shown


def _parts(value: object, role: str | None, *, always: bool = False) -> object:
    if isinstance(value, str):
        kind = "output_text" if role == "assistant" else "input_text"
        return [{"type": kind, "text": value}] if always else value
    assert isinstance(value, list)
    return [{"type": part.type, "text": part.text, **_refusal(part)} for part in value]


def _refusal(part: object) -> Json:
    if isinstance(part, TextContent) and part.refusal is not None:
        return {"refusal": part.refusal}
    return {}
