"""Chat completions: their body to a conversation. Knows no tokens and no engine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from duetto.engine.prompts import begins_answer
from duetto.engine.tool_rules import ToolRules
from duetto.server.apis.asked import USUAL_EFFORT, AskedChat, ChatPrompt
from duetto.server.apis.protocol import ChatRequest, NamedTool, TokenizeRequest
from duetto.server.apis.sampling import chat_asked
from duetto.server.apis.tool_names import check_tool_names
from duetto.server.http.errors import cut, invalid


def read_chat(request: ChatRequest, defaults: Mapping[str, Any]) -> AskedChat:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    rules = tool_rules(request)
    prompt = chat_prompt(request)
    if rules is None:
        prompt = replace(prompt, tools=())  # what may not be called is not shown
    asked = chat_asked(request, defaults)
    return AskedChat(asked=asked, prompt=prompt, body=request, tools=rules)


def tool_rules(request: ChatRequest) -> ToolRules | None:
    """None: nothing may be called. Raises ApiError 400, naming the caller's field."""
    choice, tools = request.tool_choice, request.tools or []
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return None
    names = [tool.function.name for tool in tools]
    check_tool_names(names, "tools[{}].function.name")
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if only is not None and only not in names:
        raise invalid("tool_choice.function.name", f"{cut(only)!r} is none of the tools")
    if choice == "none":
        return None
    return ToolRules(
        tools=[tool.shown() for tool in tools],
        is_required=choice == "required" or only is not None,
        only=only,
        strict=frozenset([tool.function.name for tool in tools if tool.function.strict]),
        parallel=request.parallel_tool_calls is not False,
    )


def chat_prompt(request: ChatRequest | TokenizeRequest) -> ChatPrompt:
    continues = request.continue_final_message is True
    return ChatPrompt(
        messages=[message.shown() for message in request.messages or ()],
        tools=[tool.shown() for tool in request.tools or ()],
        documents=request.documents or (),
        template_kwargs=request.chat_template_kwargs or {},
        reasoning_effort=request.reasoning_effort,
        add_generation_prompt=begins_answer(request.add_generation_prompt, continues),
        continue_final_message=continues,
        add_special_tokens=request.add_special_tokens is True,
    )


def check_text_or_chat(request: TokenizeRequest) -> None:
    """Raises ApiError 400 unless there is either a text or a conversation, with its own fields."""
    if (request.prompt is None) == (request.messages is None):
        field = "prompt" if request.prompt is None else "messages"
        raise invalid(field, "exactly one of prompt and messages is needed")
    templated = {
        "chat_template_kwargs": bool(request.chat_template_kwargs),
        "add_generation_prompt": request.add_generation_prompt is False,
        "continue_final_message": request.continue_final_message is True,
        "reasoning_effort": request.reasoning_effort not in (None, "none", USUAL_EFFORT),
        "documents": bool(request.documents),
        "tools": bool(request.tools),
    }
    for name, is_asked in templated.items():
        if request.prompt is not None and is_asked:
            raise invalid(name, "is for messages; a prompt has no template")
