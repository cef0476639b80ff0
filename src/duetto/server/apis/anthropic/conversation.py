"""From a body of /v1/messages to a conversation. Knows no tokens and no engine.

A user's turn may hold results of tools beside texts; templates want each result as a message of its
own, so one turn becomes several messages, and places in them are named as the caller wrote them.
"""

import json
from collections.abc import Mapping
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.engine.tool_rules import ToolRules
from duetto.server.apis.anthropic.body import (
    InputTool,
    MessagesRequest,
    PromptRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    TurnMessage,
)
from duetto.server.apis.asked import Asked, AskedChat, ChatPrompt
from duetto.server.apis.sampling import json_schema_output
from duetto.server.apis.tool_names import check_tool_names, schema_names
from duetto.server.http.errors import invalid, refused

_NAMES = {
    "stop": "stop_sequences",
    "prompt": "messages",
    "structured_outputs.json": "output_config.format.schema",
    "thinking_budget": "thinking.budget_tokens",
}

_PROMPT_NAMES = {
    **_NAMES,
    "continue_final_message": "messages",
    "reasoning_effort": "output_config.effort",
    "reasoning": "thinking.type",
}
_USUAL_EFFORT = "high"  # as Anthropic has it


def read_messages(request: MessagesRequest, defaults: Mapping[str, Any]) -> AskedChat:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    prompt, names = chat_prompt_of(request)
    given = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "stop": tuple(request.stop_sequences or ()) or None,
        "seed": request.seed,
        "repetition_penalty": request.repetition_penalty,
        "ignore_eos": request.ignore_eos,
        "structured_outputs": _output(request),
        "thinking_budget": _budget(request),
    }
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        sampling = SamplingParams(**{**defaults, **asked})
    except InvalidRequest as error:
        raise refused(error, _NAMES) from None
    return AskedChat(
        asked=Asked(
            sampling=sampling,
            stream=bool(request.stream),
            cache_salt=request.cache_salt,
            priority=request.priority or 0,
            names=names,
        ),
        prompt=prompt,
        body=request,
        tools=_tool_rules(request),
    )


def _budget(request: MessagesRequest) -> int | None:
    """None where `max_tokens` keeps it anyway: no model need be able to reason for it."""
    thinking = request.thinking
    given = None if thinking is None else thinking.budget_tokens
    if thinking is not None and given is not None and thinking.type != "enabled":
        raise invalid("thinking.budget_tokens", f"is not for the type {thinking.type}")
    if given is None or given >= request.max_tokens - 1:
        return None
    return given


def chat_prompt_of(request: PromptRequest) -> tuple[ChatPrompt, dict[str, str]]:
    """What the template is given, and how the caller calls its parts. An assistant's message at the
    end is the beginning of the answer."""
    messages, names = list[Mapping[str, Any]](), dict[str, str]()
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
        names["messages[0]"] = "system"
    for index, turn in enumerate(request.messages):
        for message in _messages_of(turn, f"messages[{index}]"):
            ours, theirs = f"messages[{len(messages)}]", f"messages[{index}]"
            names |= {
                ours: theirs,
                f"{ours}.tool_calls": f"{theirs}.content",
                f"{ours}.tool_call_id": f"{theirs}.content{_place_of_result(turn, message)}",
            }
            messages.append(message)
    kwargs = dict(getattr(request, "chat_template_kwargs", None) or {})
    thinking, config = request.thinking, request.output_config
    effort = None if config is None else config.effort
    kind = None if thinking is None else thinking.type  # adaptive: as the template has it
    _check_switch(kind, kwargs)
    if kind == "disabled":
        effort = "none"
    continues = request.messages[-1].role == "assistant" if request.messages else False
    prompt = ChatPrompt(
        messages=messages,
        tools=() if _forbids_tools(request) else [_shown(tool) for tool in request.tools or ()],
        template_kwargs=kwargs,
        reasoning_effort=effort,
        usual_effort=_USUAL_EFFORT,
        wants_reasoning=kind == "enabled",
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )
    if request.output_format is not None:
        names["structured_outputs.json"] = "output_format.schema"
    names |= schema_names(len(request.tools or ()), "input_schema")
    return prompt, {**_PROMPT_NAMES, **names}


def _check_switch(kind: str | None, template_kwargs: Mapping[str, Any]) -> None:
    """Raises ApiError 400 where what the template is told contradicts `thinking`."""
    opposite = {"enabled": False, "disabled": True}.get(kind or "")
    for name in ("enable_thinking", "thinking"):
        if opposite is not None and template_kwargs.get(name) is opposite:
            told = "true" if opposite else "false"
            words = f"{kind!r} contradicts chat_template_kwargs.{name}: {told}"
            raise invalid("thinking.type", words)


def _messages_of(turn: TurnMessage, place: str) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    if not turn.content:
        raise invalid(f"{place}.content", "must hold at least one block")
    return _assistant(turn, place) if turn.role == "assistant" else _user(turn, place)


def _place_of_result(turn: TurnMessage, message: Mapping[str, Any]) -> str:
    """Of the block that a message of role tool was made of; "" for other messages."""
    for at, block in enumerate(turn.content if isinstance(turn.content, list) else []):
        if isinstance(block, ToolResultBlock) and block.tool_use_id == message.get("tool_call_id"):
            return f"[{at}].tool_use_id"
    return ""


def _user(turn: TurnMessage, place: str) -> list[dict[str, Any]]:
    messages, texts = list[dict[str, Any]](), list[dict[str, str]]()
    for at, block in enumerate(turn.content):
        match block:
            case TextBlock():
                texts.append({"type": "text", "text": block.text})
            case ToolResultBlock():
                if texts:
                    messages.append({"role": "user", "content": texts})
                    texts = []
                content = _result(block)
                messages.append(
                    {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                )
            case _:
                raise invalid(f"{place}.content[{at}].type", "belongs into an assistant's message")
    return [*messages, {"role": "user", "content": texts}] if texts else messages


def _assistant(turn: TurnMessage, place: str) -> list[dict[str, Any]]:
    texts, reasoning, calls = list[str](), list[str](), list[dict[str, Any]]()
    for at, block in enumerate(turn.content):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                reasoning.append(block.thinking)
            case ToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = {"name": block.name, "arguments": arguments}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                raise invalid(f"{place}.content[{at}].type", "belongs into a user's message")
            case RedactedThinkingBlock() if block.data:
                words = "redacted_thinking cannot be read here: leave the block out"
                raise invalid(f"{place}.content[{at}].type", words)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    return [message]


def _result(block: ToolResultBlock) -> str:
    """As the model is shown it: no template has a place for whether a call failed."""
    text = _text(block.content)
    if not block.is_error:
        return text
    return f"Error: {text}" if text else "Error"


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join([block.text for block in content])


def _shown(tool: InputTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    told = [] if tool.description is None else [tool.description]
    if tool.input_examples:  # templates have no place of their own for them
        shown = [json.dumps(example, ensure_ascii=False) for example in tool.input_examples]
        told.append("\n".join(["Examples of its input:", *shown]))
    if told:
        function["description"] = "\n\n".join(told)
    return {"type": "function", "function": function}


def _forbids_tools(request: PromptRequest) -> bool:
    return request.tool_choice is not None and request.tool_choice.type == "none"


def _tool_rules(request: MessagesRequest) -> ToolRules | None:
    choice, tools = request.tool_choice, request.tools or ()
    if not tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise invalid("tool_choice", f"{choice.type!r} needs tools")
        return None
    if _forbids_tools(request):
        return None
    names, chosen = [tool.name for tool in tools], "auto"
    check_tool_names(names, "tools[{}].name")
    if choice is not None and choice.type == "any":
        chosen = "required"
    only = None
    if choice is not None and choice.type == "tool":
        chosen, only = "required", choice.name
        if only not in names:
            raise invalid("tool_choice.name", f"{only!r:.60} is none of the tools")
    elif choice is not None and choice.name is not None:
        raise invalid("tool_choice.name", "is for the type tool")
    return ToolRules(
        tools=[_shown(tool) for tool in tools],
        is_required=chosen == "required",
        only=only,
        strict=frozenset([tool.name for tool in tools if tool.strict]),
        parallel=not (choice is not None and choice.disable_parallel_tool_use),
    )


def _output(request: MessagesRequest) -> Any:
    config = request.output_config
    wanted = request.output_format or (None if config is None else config.format)
    if wanted is None:
        return None
    field = "output_format" if request.output_format is not None else "output_config.format"
    return json_schema_output(wanted.schema, f"{field}.schema")
