"""Messages of a conversation in plain data, checked: what is wrong is named with its place.

A result answers a call before it, by id. Knows no template; what one takes is template_forms.py's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from duetto.checkpoints.plain_data import PlainData
from duetto.core.errors import InvalidRequest

_REASONING = ("reasoning_content", "reasoning")  # one thing, of which servers have two names
_OURS = {"content", "tool_calls", *_REASONING}


class SentArguments(NamedTuple):
    """What a tool was called with: an object, and the JSON that says so."""

    values: Mapping[str, Any]
    text: str


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each with its role and content: a string, a list of text parts, or None beside calls. The
    arguments of its tool_calls are SentArguments; its reasoning has the name "reasoning_content".
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages", "must be a list of messages")
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    plain, calls = [], _Calls()
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                field, f"must be an object with role and content, not {message!r:.80}"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(f"{field}.role", "must be a string")
        made = PlainData(field).of({k: v for k, v in message.items() if k not in _OURS})
        reasoning = _reasoning_of(field, message)
        if reasoning:
            made["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            made["tool_calls"] = calls.made(field, role, message["tool_calls"])
        if role == "tool":
            made |= calls.answered(field, message)
        may_lack = role == "assistant" and ("tool_calls" in made or bool(reasoning))
        plain.append(made | {"content": _content(field, message, may_lack=may_lack)})
    return plain


class _Calls:
    """The calls so far, and which of them have a result.

    A call may stay without one, as in vLLM: who was interrupted has such a conversation. An id may
    come again in a later message, since some models count their calls anew in each; it then means
    the later call.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of the tools that were called, by the call's id
        self._has_result: set[str] = set()

    def made(self, field: str, role: str, given: Any) -> list[dict[str, Any]]:
        if role != "assistant":
            raise InvalidRequest(f"{field}.tool_calls", "only an assistant's message has calls")
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
            raise InvalidRequest(f"{field}.tool_calls", f"must be a list, not {given!r:.60}")
        calls = [_call(f"{field}.tool_calls[{at}]", call) for at, call in enumerate(given)]
        ids = [call["id"] for call in calls]
        for at, call_id in enumerate(ids):
            if (first := ids.index(call_id)) != at:
                raise InvalidRequest(
                    f"{field}.tool_calls[{at}].id", f"{call_id!r:.80} is tool_calls[{first}]'s too"
                )
        self._names |= {call["id"]: call["function"]["name"] for call in calls}
        self._has_result.difference_update(ids)
        return calls

    def answered(self, field: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """The id of a result and the name of its tool, which some templates print."""
        field, call_id = f"{field}.tool_call_id", message.get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            raise InvalidRequest(
                field, "is required: the id of the call that this is the result of"
            )
        if call_id not in self._names:
            raise InvalidRequest(
                field, f"no assistant's message before it has a call {call_id!r:.80}"
            )
        if call_id in self._has_result:
            raise InvalidRequest(field, f"the call {call_id!r:.80} has a result already")
        self._has_result.add(call_id)
        name = message.get("name")
        return {"tool_call_id": call_id, "name": self._names[call_id] if name is None else name}


def _call(field: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(field, f"must be an object, not {call!r:.60}")
    call_id, kind, function = call.get("id"), call.get("type", "function"), call.get("function")
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequest(f"{field}.id", "is required: the result of the call names it")
    if kind != "function":
        raise InvalidRequest(f"{field}.type", f"must be 'function', not {kind!r:.60}")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{field}.function", f"must be an object, not {function!r:.60}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{field}.function.name", f"must be a string, not {name!r:.60}")
    arguments = _arguments(f"{field}.function.arguments", function.get("arguments"))
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(field: str, given: Any) -> SentArguments:
    """JSON in a string, as APIs have it, or the object itself. Nothing is no arguments."""

    def refuse(why: str) -> NoReturn:
        raise InvalidRequest(field, f"must be a JSON object, in a string; {why}")

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    values = given
    if given is None or given == "":
        values = {}
    elif isinstance(given, str):
        try:
            values = json.loads(given, parse_constant=no_number)
        except RecursionError:
            refuse("this is nested too deep")
        except ValueError as error:
            refuse(f"{error}")
    if not isinstance(values, Mapping):
        refuse(f"this is {values!r:.60}")
    plain = PlainData(field).of(values)
    text = given if isinstance(given, str) and given else json.dumps(plain, ensure_ascii=False)
    return SentArguments(plain, text)


def _reasoning_of(field: str, message: Mapping[str, Any]) -> str | None:
    """What the assistant thought, under either name."""
    found = {name: message[name] for name in _REASONING if message.get(name)}
    for name, text in found.items():
        if not isinstance(text, str):
            raise InvalidRequest(f"{field}.{name}", f"must be a string, not {text!r:.60}")
        if message.get("role") != "assistant":
            raise InvalidRequest(f"{field}.{name}", "only an assistant's message has reasoning")
    if len(set(found.values())) > 1:
        raise InvalidRequest(f"{field}.reasoning", "is not what reasoning_content is; give one")
    return next(iter(found.values()), None)


def _content(
    field: str, message: Mapping[str, Any], *, may_lack: bool
) -> str | list[dict[str, str]] | None:
    """A string, or text parts with nothing else in them."""
    field, content = f"{field}.content", message.get("content")
    if content is None and may_lack:
        return None
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence):
        raise InvalidRequest(
            field, f"must be a string or a list of text parts, not {content!r:.80}"
        )
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise InvalidRequest(field, 'only parts {"type": "text", "text": ...} are accepted')
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(field, "the text of a part must be a string")
        parts.append({"type": "text", "text": str(part["text"])})
    return parts
