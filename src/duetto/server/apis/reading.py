"""From a body's bytes to its struct, or to a 400 that names the cause and what would be accepted.

Of several faults the one that is named is what the caller was after: a feature that is not here,
then what the parser met first. Runs on any thread.
"""

import re
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import msgspec

from duetto.server.apis.accepted import (
    ABSENT,
    NOT_SUPPORTED,
    Only,
    inner_refusals,
    limited,
    refusals,
    unread,
)
from duetto.server.apis.choices import choices_at
from duetto.server.apis.protocol import (
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    Function,
    Message,
    SamplingRequest,
    SegmentedPrompt,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
    WireSegment,
)
from duetto.server.apis.structured import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from duetto.server.http.body import check_structure
from duetto.server.http.errors import MAX_ECHO, ApiError, cut, invalid

T = TypeVar("T")

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$|$)", re.DOTALL)
_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
_PLACE = re.compile(r"\(byte ([0-9]+)\)")
_NOT_A_NUMBER = re.compile(rb'"(\w+)"\s*:\s*-?(?:nan|infinity)', re.IGNORECASE)
_MISSING = re.compile(r"Object missing required field `(.*?)`(?: - at `\$|$)", re.DOTALL)
_TOKEN_ID = re.compile(r"-?(0|[1-9][0-9]{0,17})")
# The structs within bodies, by their path without indexes.
_INNER: dict[str, type[msgspec.Struct]] = {
    "messages[]": Message,
    "messages[].content[]": TextPart,
    "messages[].tool_calls[]": ToolCall,
    "messages[].tool_calls[].function": CalledFunction,
    "tools[]": Tool,
    "tools[].function": Function,
    "prompt": SegmentedPrompt,
    "prompt[]": SegmentedPrompt,
    "prompt.segments[]": WireSegment,
    "prompt[].segments[]": WireSegment,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchemaFormat,
    "structured_outputs": StructuredOutputs,
}
_ELSEWHERE = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_MAX_SEARCHED_BYTES = 2**18  # of a body, for the key at fault
_MAX_SEARCHED_FOR_NULLS = 2**20  # bytes of a body; reading it once more takes 30 ms at most
_MAX_FIELDS = 1000  # of an object that is searched


class _Format(msgspec.Struct):
    response_format: ResponseFormat | None = None


class _Said(msgspec.Struct):
    """Of a message, what a client may have been after; before its content, which it may lack."""

    function_call: Annotated[msgspec.Raw, Only()] = ABSENT
    audio: Annotated[msgspec.Raw, Only()] = ABSENT


class _Messages(msgspec.Struct):
    messages: list[_Said] | None = None


class _Biases(msgspec.Struct):
    logit_bias: dict[str, msgspec.Raw] = {}


def decode(body: bytes, into: type[T]) -> T:
    """Read a body, or raise a 400 that names the field at fault."""
    check_structure(body)
    try:
        request = _decode(body, into)
    except msgspec.ValidationError as error:
        raise _cause(str(error), body, into) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(body, str(error)) from None
    except RecursionError:
        raise invalid(None, "the body is nested too deeply") from None
    for refusal in refusals(request, into):
        raise refusal
    messages = getattr(request, "messages", None)
    _check_messages(messages if isinstance(messages, list) else [])
    if isinstance(request, msgspec.Struct):
        for refusal in inner_refusals(request):
            raise refusal
    return request


def _decode(body: bytes, into: type[T]) -> T:
    """Also with fields that nobody here knows, if they are null: those ask for nothing."""
    try:
        return msgspec.json.decode(body, type=into)
    except msgspec.ValidationError as error:
        if not _UNKNOWN.match(str(error)) or len(body) > _MAX_SEARCHED_FOR_NULLS:
            raise
    return msgspec.json.decode(_without_nulls(msgspec.Raw(body), into), type=into)


def _without_nulls(value: msgspec.Raw, kind: type, path: str = "") -> msgspec.Raw:
    """An object without those fields that `kind` does not have and that are null."""
    known = kind.__struct_fields__  # type: ignore[attr-defined]
    fields = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
    if len(fields) > _MAX_FIELDS:
        return value
    kept = {
        name: field for name, field in fields.items() if name in known or bytes(field) != b"null"
    }
    for name, field in kept.items():
        place, start = f"{path}.{name}".lstrip("."), bytes(field)[:1]
        if start == b"{" and (inner := _INNER.get(place)) is not None:
            kept[name] = _without_nulls(field, inner, place)
        elif start == b"[" and (inner := _INNER.get(f"{place}[]")) is not None:
            items = msgspec.json.decode(field, type=list[msgspec.Raw])
            cleaned = [
                _without_nulls(item, inner, f"{place}[]") if bytes(item)[:1] == b"{" else item
                for item in items
            ]
            kept[name] = msgspec.Raw(msgspec.json.encode(cleaned))
    return msgspec.Raw(msgspec.json.encode(kept))


def _check_messages(messages: list[Any]) -> None:
    """What chat's own messages cannot be. Those of other APIs are their parsers' to read."""
    for index, message in enumerate(messages):
        if not isinstance(message, Message):
            return
        for refusal in refusals(message, Message, f"messages[{index}]."):
            raise refusal
        if message.content is None and not message.tool_calls:
            raise invalid(f"messages[{index}].content", "is required")
        if message.tool_calls and message.role != "assistant":
            raise invalid(f"messages[{index}].tool_calls", "belong into an assistant's message")
        if message.role == "tool" and not message.tool_call_id:
            raise invalid(f"messages[{index}].tool_call_id", "is required")
        parts = message.content if isinstance(message.content, list) else []
        for at, part in enumerate(parts):
            for refusal in refusals(part, TextPart, f"messages[{index}].content[{at}]."):
                raise refusal


def _cause(message: str, body: bytes, into: type) -> ApiError:
    try:
        return _asked_feature(body, into) or _explain(message, body, into)
    except RecursionError:
        return invalid(None, "the body is nested too deeply")


def _asked_feature(body: bytes, into: type) -> ApiError | None:
    """The refusal of a feature that a body with faults asks for, wherever in it."""
    try:
        values = msgspec.json.decode(body, type=unread(into))
    except msgspec.MsgspecError:  # not an object
        return None
    for refusal in refusals(values, into):
        return refusal
    try:
        said = msgspec.json.decode(body, type=_Messages).messages or []
    except msgspec.ValidationError:
        said = []
    for index, message in enumerate(said):
        for refusal in refusals(message, _Said, f"messages[{index}]."):
            return refusal
    if issubclass(into, SamplingRequest):
        try:
            msgspec.json.decode(body, type=_Format)
        except msgspec.ValidationError as error:
            return _explain(str(error), body, into)
    return None


def _malformed(body: bytes, message: str) -> ApiError:
    """JSON has no NaN and no Infinity, but Python's json module writes them."""
    if place := _PLACE.search(message):
        at = int(place.group(1))
        named = _NOT_A_NUMBER.search(body[max(0, at - MAX_ECHO) : at + 9])
        if named:
            return invalid(named.group(1).decode(), "NaN and Infinity are no JSON numbers")
    return invalid(None, "the body is not valid JSON in UTF-8")


def _explain(message: str, body: bytes, into: type) -> ApiError:
    """Turn msgspec's "Expected `int`, got `str` - at `$.n`" into a field and a reason."""
    found = _PATH.search(message)
    path = found.group(1) if found else ""
    reason = message[: found.start()] if found else message
    before = f"{path}." if path else ""
    if named := _UNKNOWN.match(message):
        field = named.group(1)
        return invalid(before + cut(field), "is not a known field" + _hint(field, path, into))
    if named := _MISSING.match(message):
        return invalid(before + named.group(1), "is required")
    if " - at `key` in `$.logit_bias`" in message:
        return invalid(path, _wrong_key(body))
    if reason.startswith("Expected `null`"):
        reason = NOT_SUPPORTED
    elif named := _VALUE.match(reason):
        reason = f"{cut(named.group(1))} {NOT_SUPPORTED}"
        if choices := choices_at(into, path):
            reason += f"; accepted: {', '.join(choices)}"
    reason = reason.replace("`", "")
    return invalid(path or None, reason if path else f"the body: {reason}")


def _hint(field: str, path: str, into: type) -> str:
    """What the caller of an unknown field may have meant."""
    kind = _INNER.get(re.sub(r"\[[0-9]+\]", "[]", path), into)
    for place, other in {**getattr(into, "ELSEWHERE", {}), **_ELSEWHERE}.items():
        if not path and field in _honoured(other):
            return f"; it is one of {place}"
    if field in ("enable_thinking", "thinking"):
        return "; templates read it from chat_template_kwargs"
    close = get_close_matches(field[:MAX_ECHO].lower(), _honoured(kind), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _honoured(kind: type) -> list[str]:
    """The fields that do what they say; a field of which nothing is read is no suggestion."""
    refused = {name for name, _ in limited(kind)}
    return [
        field.name
        for field in msgspec.structs.fields(kind)
        if field.name not in refused and field.type is not msgspec.Raw
    ]


def _wrong_key(body: bytes) -> str:
    words = "a key must be a token id, a whole number in quotes"
    if len(body) > _MAX_SEARCHED_BYTES:
        return words
    keys = msgspec.json.decode(body, type=_Biases).logit_bias
    wrong = next((key for key in keys if not _TOKEN_ID.fullmatch(key)), None)
    return words if wrong is None else f"the key {cut(repr(wrong))} is wrong: {words}"
