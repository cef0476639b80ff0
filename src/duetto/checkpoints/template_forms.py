"""The form in which a template is given what conversations hold, as it was found by trying.

Knows no Jinja: what was found comes from the template's process (template_trials.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from duetto.checkpoints.chat_messages import SentArguments
from duetto.core.errors import InvalidRequest

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
# What families call the text that an assistant thought.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class TemplateForms:
    """What a template takes. As it stands: as transformers gives it, with contents as strings."""

    default_content: str = "string"
    contents: Mapping[str, str | None] = field(default_factory=dict)  # by role
    reasoning_keys: tuple[str, ...] = ()
    shows_calls: bool = True
    calls_beside_text: bool = True
    call_content: str | None = None  # of a message that has calls and says nothing
    call_arguments: str = "object"
    has_short_ids: bool = False

    @staticmethod
    def of(
        facts: Mapping[str, Any], takes: Mapping[str, Any], calls: Mapping[str, Any] | None
    ) -> "TemplateForms":
        """From what its source tells, and from what trying told: `calls` is None where that told
        nothing, and empty where no call is shown."""
        found, keys = calls or {}, facts["keys"]
        contents = dict(takes)
        if found.get("result") is not None:
            contents["tool"] = found["result"]
        return TemplateForms(
            default_content=facts["takes"],
            contents=contents,
            reasoning_keys=tuple(key for key in _REASONING_KEYS if key in keys),
            shows_calls=bool(found) if calls is not None else "tool_calls" in keys,
            calls_beside_text=found.get("beside_text", True),
            call_content=found.get("content"),
            call_arguments=found.get("arguments", "object"),
            has_short_ids=found.get("short_ids", False),
        )

    def shown(self, place: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message of plain_messages as the template takes it. Raises InvalidRequest for calls
        that it would leave out."""
        made = {**message, "content": self._content(message)}
        if (reasoning := made.pop("reasoning_content", None)) is not None:
            made |= dict.fromkeys(self.reasoning_keys, reasoning)
        if message["role"] == "tool":
            made["tool_call_id"] = self._id(message["tool_call_id"])
        if "tool_calls" in message:
            self._check_calls(place, message)
            made["content"] = self._content(message) if message["content"] else self.call_content
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return made

    def _check_calls(self, place: str, message: Mapping[str, Any]) -> None:
        if not self.shows_calls:
            raise InvalidRequest(
                f"{place}.tool_calls",
                "this model's chat template leaves calls out; leave them and their results out, "
                "or serve it with --chat-template and one that shows them",
            )
        if message["content"] and not self.calls_beside_text:
            raise InvalidRequest(
                f"{place}.content",
                "this model's chat template leaves calls out where the message has a text too; "
                "send them as two messages, or the calls alone",
            )

    def _content(self, message: Mapping[str, Any]) -> str | list[dict[str, str]]:
        content: str | list[dict[str, str]] = message["content"]
        if content is None:
            content = ""
        takes = self.contents.get(message["role"]) or self.default_content
        if takes == "parts" and isinstance(content, str):
            return [{"type": "text", "text": content}]
        if takes == "string" and not isinstance(content, str):
            return "\n".join(part["text"] for part in content)  # as vLLM joins them
        return content

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments: SentArguments = function["arguments"]
        is_object = self.call_arguments == "object"
        shown = arguments.values if is_object else arguments.text
        return {
            **call,
            "id": self._id(call["id"]),
            "function": {**function, "arguments": shown},
        }

    def _id(self, call_id: str) -> str:
        """Mistral's templates raise for ids that are not of nine letters and digits. An id is a
        name: any other that is the same for a call and its result says the same."""
        if not self.has_short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return sha256(call_id.encode(errors="replace")).hexdigest()[:9]
