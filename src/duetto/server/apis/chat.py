"""Chat completions: their body to a conversation. Knows no tokens and no engine."""

from collections.abc import Mapping
from typing import Any

from duetto.engine.prompts import begins_answer
from duetto.server.apis.asked import AskedChat, ChatPrompt
from duetto.server.apis.protocol import ChatRequest, TokenizeRequest
from duetto.server.apis.sampling import chat_asked
from duetto.server.http.errors import invalid


def read_chat(request: ChatRequest, defaults: Mapping[str, Any]) -> AskedChat:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    return AskedChat(asked=chat_asked(request, defaults), prompt=chat_prompt(request))


def chat_prompt(request: ChatRequest | TokenizeRequest) -> ChatPrompt:
    continues = request.continue_final_message is True
    return ChatPrompt(
        messages=[message.shown() for message in request.messages or ()],
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
        "reasoning_effort": request.reasoning_effort not in (None, "none"),
        "documents": bool(request.documents),
    }
    for name, is_asked in templated.items():
        if request.prompt is not None and is_asked:
            raise invalid(name, "is for messages; a prompt has no template")
