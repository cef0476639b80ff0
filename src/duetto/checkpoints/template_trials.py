"""What a chat template takes, found by trying: small conversations that say a marker, in each form
that there is. What shows the marker is what the template takes.

Runs in the template's own process, and knows no Jinja: it is given what renders.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import Any

from duetto.checkpoints.template_answer import NO_TOOLS
from duetto.checkpoints.template_content import Takes

_Message = dict[str, Any]
_Render = Callable[[Mapping[str, Any]], str]

_MARKER = "Kq7zWv"  # a text that no template writes by itself
_PRINTED_PART = re.compile(rf"""['"]text['"]\s*:\s*['"]{_MARKER}""")
_TOOL = "kq7_tool"
_ARGUMENT = "kq7_argument"
# An object that Python printed, and JSON within JSON: neither is what a model was trained on.
_PRINTED_ARGUMENTS = re.compile(rf"""'{_ARGUMENT}'\s*:\s*'|\\"{_ARGUMENT}""")
_SHORT_ID, _LONG_ID = "Kq7000000", "call_Kq7000000000000000000000"  # as Mistral; as OpenAI
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "a",
            "parameters": {
                "type": "object",
                "properties": {_ARGUMENT: {"type": "string", "description": "a"}},
                "required": [_ARGUMENT],
            },
        },
    }
]


class Trials:
    """Renders conversations with a template and these arguments."""

    def __init__(self, render: _Render, arguments: Mapping[str, Any]) -> None:
        self._render = render
        self._arguments = {k: v for k, v in arguments.items() if k != "tools"}

    def no_tools(self) -> str:
        """The name in NO_TOOLS of the first with which one user message is rendered."""
        for name, given in NO_TOOLS.items():
            for form in ("string", "parts"):
                if self._text([_said("user", form, "a")], given) is not None:
                    return name
        return "none"

    def contents(self, roles: Iterable[str], no_tools: str) -> dict[str, Takes | None]:
        """What each role's content is to be; None where trying does not tell."""
        given = NO_TOOLS[no_tools]
        user = self._takes(lambda form: [_said("user", form, _MARKER)], given)
        others, takes = user or "string", {"user": user}
        for role in roles:
            if role != "user":
                conversation = partial(_with_role, role, others)
                takes[role] = self._takes(conversation, given)
        return takes

    def tools(self, user: Takes, no_tools: str) -> dict[str, Any]:
        """Whether tools are shown (None: trying does not tell), and how calls are to be."""
        shown = [
            None if text is None else _TOOL in text
            for text in (
                self._text([_said("user", user, "a")], {"tools": _TOOLS}),
                self._text(
                    [{"role": "system", "content": "a"}, _said("user", user, "a")],
                    {"tools": _TOOLS},
                ),
            )
        ]
        shows_tools = True if True in shown else False if False in shown else None
        given = NO_TOOLS[no_tools] if shows_tools is False else {"tools": _TOOLS}
        return {"shows_tools": shows_tools, "calls": self._calls(_said("user", user, "a"), given)}

    def _calls(self, user: _Message, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """How calls are to be; None where no way is rendered, {} where none shows them."""
        is_rendered = False
        for result, content, arguments in product(
            ("string", "parts"), (None, ""), ("object", "string")
        ):
            answer = _said("tool", result, "a") | {"tool_call_id": _SHORT_ID, "name": _TOOL}
            call = _called(content, arguments)
            text = self._text([user, call, answer], given)
            is_rendered = is_rendered or text is not None
            if text is None or not _shows_call(text):
                continue
            if content is None and self._prints_none(text, [user, call, answer], given):
                continue
            return self._more_of_calls(user, call, answer, given) | {
                "content": content,
                "arguments": arguments,
            }
        return {} if is_rendered else None

    def _more_of_calls(
        self, user: _Message, call: _Message, answer: _Message, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a result's content is to be, which ids are taken, and whether a call that comes
        with a text is shown."""
        (made,) = call["tool_calls"]
        long = call | {"tool_calls": [made | {"id": _LONG_ID}]}
        said = self._text([user, call | {"content": "a"}, answer], given)
        result = _MARKER + "result"
        return {
            "result": self._takes(
                lambda form: [user, call, answer | _said("tool", form, result)], given, result
            ),
            "short_ids": self._text([user, long, answer | {"tool_call_id": _LONG_ID}], given)
            is None,
            "beside_text": said is None or _shows_call(said),
        }

    def _prints_none(self, text: str, messages: list[_Message], given: Mapping[str, Any]) -> bool:
        """Whether "None" in the text is the call's missing content."""
        if "None" not in text:
            return False
        user, call, answer = messages
        empty = self._text([user, call | {"content": ""}, answer], given)
        return empty is not None and empty.count("None") < text.count("None")

    def _takes(
        self,
        conversation: Callable[[str], list[_Message]],
        given: Mapping[str, Any],
        marker: str = _MARKER,
    ) -> Takes | None:
        shows = {}
        for form in ("string", "parts"):
            text = self._text(conversation(form), given) or ""
            shows[form] = marker in text and not _PRINTED_PART.search(text)
        if shows["string"]:
            return "either" if shows["parts"] else "string"
        return "parts" if shows["parts"] else None

    def _text(self, messages: list[_Message], given: Mapping[str, Any]) -> str | None:
        """The prompt; None if the template fails."""
        try:
            return self._render({**self._arguments, **given, "messages": messages})
        except MemoryError:
            raise
        except Exception:  # a template can raise whatever Python's operators raise
            return None


def _said(role: str, form: str, text: str) -> _Message:
    return {
        "role": role,
        "content": [{"type": "text", "text": text}] if form == "parts" else text,
    }


def _with_role(role: str, others: str, form: str) -> list[_Message]:
    """The shortest conversation that most templates take, in which `role` says the marker."""
    said = _said(role, form, _MARKER)
    if role == "assistant":
        return [_said("user", others, "a"), said, _said("user", others, "b")]
    return [said, _said("user", others, "a")]


def _called(content: str | None, arguments: str) -> _Message:
    values = {_ARGUMENT: _MARKER}
    text = f'{{"{_ARGUMENT}": "{_MARKER}"}}'
    function = {"name": _TOOL, "arguments": values if arguments == "object" else text}
    call = {"id": _SHORT_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _shows_call(text: str) -> bool:
    return _MARKER in text and not _PRINTED_ARGUMENTS.search(text)
