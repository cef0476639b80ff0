"""A conversation to the text of its prompt, through the model's chat template.

Templates agree neither on how they are told to reason less nor on the names for it: what turns off
what a template does not have is left out. Knows no HTTP and no sampling.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.text import TextCodec
from duetto.engine.marked_chat import Conversation, RenderedChat, render_marked
from duetto.server.apis.asked import ChatPrompt

_THINKING = ("enable_thinking", "thinking")  # what templates call the switch


def render(codec: TextCodec, prompt: ChatPrompt, *, always_reasons: bool = False) -> RenderedChat:
    """`always_reasons`: the model does, where its template has no switch for it. Raises
    InvalidRequest, naming the field. May wait for another process."""
    given = prompt.template_kwargs
    for switch in _THINKING if prompt.wants_reasoning else ():
        try:
            return _render_with_some(codec, {switch: True, **given}, prompt)
        except InvalidRequest as error:
            if error.field != "chat_template_kwargs":
                raise
    chat = _render_with_some(codec, given, prompt)
    if prompt.wants_reasoning and not always_reasons:
        words = "this model's chat template has no reasoning to turn on"
        raise InvalidRequest("reasoning", words)
    return chat


def _render_with_some(
    codec: TextCodec, given: Mapping[str, Any], prompt: ChatPrompt
) -> RenderedChat:
    """With these arguments, as far as the template does not lack what they turn off."""
    first_error: InvalidRequest | None = None
    for some in _without_idle(given):
        try:
            return _render_with(codec, some, prompt)
        except InvalidRequest as error:
            if error.field != "chat_template_kwargs":
                raise
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _render_with(codec: TextCodec, given: Mapping[str, Any], prompt: ChatPrompt) -> RenderedChat:
    effort = prompt.reasoning_effort

    def render(more: dict[str, Any]) -> RenderedChat:
        def render_chat(conversation: Conversation, documents: Conversation) -> str:
            return codec.render_chat(
                conversation,
                add_generation_prompt=prompt.add_generation_prompt,
                template_kwargs={**more, **given},
                documents=documents,
                tools=prompt.tools,
                continue_final_message=prompt.continue_final_message,
            )

        return render_marked(render_chat, prompt.messages, prompt.documents)

    for more in _template_words(effort):
        try:
            return render(more)
        except InvalidRequest as error:
            if error.field != "chat_template_kwargs" and effort != "none":
                raise
    text = render({})
    usual = prompt.usual_effort
    if effort not in (None, "none", usual):
        words = f"this model's chat template has no levels of it; accepted: none, {usual}"
        raise InvalidRequest("reasoning_effort", words)
    return text


def _template_words(effort: str | None) -> tuple[dict[str, Any], ...]:
    """How templates are told how much to reason, as they may read it: no two agree."""
    if effort is None:
        return ()
    if effort == "none":
        off = tuple({name: False} for name in _THINKING)
        return (*off, {"reasoning_effort": "none"})
    return ({"reasoning_effort": effort},)


def _without_idle(given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The arguments for a template, then without those that turn off what it may not have."""
    idle = [name for name in _THINKING if given.get(name) is False]
    for count in range(len(idle) + 1):
        for left_out in combinations(idle, count):
            yield {name: value for name, value in given.items() if name not in left_out}
