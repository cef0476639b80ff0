"""From a body of /v1/responses, and what came before it, to a conversation.

Knows no tokens and no engine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.engine.tool_rules import ToolRules
from duetto.server.apis.asked import Asked, AskedChat, ChatPrompt
from duetto.server.apis.responses.body import (
    FunctionTool,
    InputItem,
    NamedFunctionTool,
    ResponsesRequest,
)
from duetto.server.apis.sampling import json_object_output, json_schema_output
from duetto.server.apis.tool_names import check_tool_names, schema_names
from duetto.server.http.errors import invalid, refused
from duetto.server.http.json_parts import Json

REASONING = ("reasoning_text", "summary_text")  # parts of what the model wrote for itself
_INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")
_NAMES = {
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "prompt": "input",
    "reasoning_effort": "reasoning.effort",
    "structured_outputs.json": "text.format.schema",
}
_FIELDS = {
    "message": {"role", "content"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"content", "summary", "encrypted_content"},
}
_OWN_FIELDS = set[str]().union(*_FIELDS.values())
_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "thinking_budget",
)


def read_response(
    request: ResponsesRequest, before: Sequence[Json], defaults: Mapping[str, Any]
) -> AskedChat:
    """`before` are messages of a stored conversation that this one goes on with. Raises ApiError
    400, naming the caller's field. `defaults` are the model's own."""
    messages, names = messages_of(request, before)
    wanted = {name: getattr(request, name) for name in _SAME_NAME}
    wanted["max_tokens"] = request.max_output_tokens
    wanted["logprobs"] = _logprobs(request)
    wanted["structured_outputs"] = _output(request)
    given = {name: value for name, value in wanted.items() if value is not None}
    names = {**_NAMES, **names, **schema_names(len(request.tools or ()), "parameters")}
    try:
        sampling = SamplingParams(**{**defaults, "max_tokens": None, **given})
    except InvalidRequest as error:
        raise refused(error, names) from None
    rules = _tool_rules(request)
    return AskedChat(
        asked=Asked(
            sampling=sampling,
            default_max_tokens=defaults.get("max_tokens"),
            stream=bool(request.stream),
            cache_salt=request.cache_salt,
            priority=request.priority or 0,
            names=names,
        ),
        prompt=ChatPrompt(
            messages=messages,
            tools=() if rules is None else rules.tools,
            template_kwargs=request.chat_template_kwargs or {},
            reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        ),
        body=request,
        tools=rules,
    )


def messages_of(
    request: ResponsesRequest, before: Sequence[Json]
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Instructions, what was stored, the new items; and how the caller calls each of them.

    Items that follow one another as parts of one assistant's turn (reasoning, text, calls) become
    one message, as templates want it.
    """
    messages, names = list[Mapping[str, Any]](), dict[str, str]()
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        names["messages[0]"] = "instructions"
    for message in before:
        names[f"messages[{len(messages)}]"] = "previous_response_id"
        messages.append(message)
    for message, place in input_messages(request):
        ours = f"messages[{len(messages)}]"
        names |= {
            ours: place,
            f"{ours}.tool_calls": place,
            f"{ours}.tool_call_id": f"{place}.call_id",
        }
        messages.append(message)
    if not messages:
        raise invalid("input", "is required" if request.input is None else "must not be empty")
    return messages, names


def input_messages(request: ResponsesRequest) -> list[tuple[Json, str]]:
    """The new messages, each with its place."""
    if isinstance(request.input, str):
        return [({"role": "user", "content": request.input}, "input")] if request.input else []
    if request.input is None:
        return []
    messages, turn = list[tuple[Json, str]](), None
    for index, item in enumerate(request.input):
        place = f"input[{index}]"
        _check_fields(item, place)
        if not _is_assistant(item):
            messages.append((_other(item, place), place))
            turn = None
            continue
        if turn is None:
            turn = {"role": "assistant", "content": None}
            messages.append((turn, place))
        _add_to_turn(turn, item, place)
    for message, _ in messages:
        if message["role"] == "assistant" and not message.get("tool_calls"):
            message["content"] = message["content"] or ""
    return messages


def _check_fields(item: InputItem, place: str) -> None:
    """What its type does not have would be ignored."""
    for name in _OWN_FIELDS - _FIELDS[item.type]:
        if getattr(item, name) is not None:
            raise invalid(f"{place}.{name}", f"does not belong into an item of type {item.type}")


def _is_assistant(item: InputItem) -> bool:
    is_message = item.type == "message" and item.role == "assistant"
    return is_message or item.type in ("reasoning", "function_call")


def _other(item: InputItem, place: str) -> Json:
    if item.type == "function_call_output":
        for name in ("call_id", "output"):
            if getattr(item, name) is None:
                raise invalid(f"{place}.{name}", "is required")
        return {
            "role": "tool",
            "tool_call_id": item.call_id,
            "content": _text(item.output, f"{place}.output"),
        }
    if item.role is None:
        raise invalid(f"{place}.role", "is required")
    if item.content is None:
        raise invalid(f"{place}.content", "is required")
    return {"role": item.role, "content": _text(item.content, f"{place}.content")}


def _add_to_turn(turn: Json, item: InputItem, place: str) -> None:
    if item.type == "function_call":
        for name in ("call_id", "name", "arguments"):
            if getattr(item, name) is None:
                raise invalid(f"{place}.{name}", "is required")
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else item.summary or []
        thought = "".join([part.text for part in parts])
        if item.encrypted_content and not thought:
            raise invalid(f"{place}.encrypted_content", "cannot be read here: leave the item out")
        if thought:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
    else:
        if item.content is None:
            raise invalid(f"{place}.content", "is required")
        turn["content"] = (turn["content"] or "") + _text(item.content, f"{place}.content")


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for at, part in enumerate(content):
        if part.type in REASONING:
            raise invalid(f"{place}[{at}].type", "belongs into an item of type reasoning")
        parts.append(part.refusal or "" if part.type == "refusal" else part.text)
    return "".join(parts)


def _logprobs(request: ResponsesRequest) -> int | None:
    for index, wanted in enumerate(request.include or ()):
        if wanted not in _INCLUDES:
            accepted = ", ".join(_INCLUDES)
            words = f"{wanted!r:.60} is not supported in this version; accepted: {accepted}"
            raise invalid(f"include[{index}]", words)
    if request.top_logprobs is not None or _INCLUDES[0] in (request.include or ()):
        return request.top_logprobs or 0
    return None


def _output(request: ResponsesRequest) -> Any:
    wanted = None if request.text is None else request.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_object_output()
    if wanted.schema is None:
        raise invalid("text.format.schema", "is required")
    return json_schema_output(wanted.schema, "text.format.schema")


def _tool_rules(request: ResponsesRequest) -> ToolRules | None:
    choice, tools = request.tool_choice, request.tools or []
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return None
    check_tool_names([tool.name for tool in tools], "tools[{}].name")
    if choice == "none":
        return None
    only = choice.name if isinstance(choice, NamedFunctionTool) else None
    if only is not None and only not in [tool.name for tool in tools]:
        raise invalid("tool_choice.name", f"{only!r:.60} is none of the tools")
    return ToolRules(
        tools=[_shown(tool) for tool in tools],
        is_required=choice == "required" or only is not None,
        only=only,
        strict=frozenset([tool.name for tool in tools if tool.strict]),
        parallel=request.parallel_tool_calls is not False,
    )


def _shown(tool: FunctionTool) -> Json:
    given = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    named = {name: value for name, value in given.items() if value is not None}
    return {"type": "function", "function": named}
