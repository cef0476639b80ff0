"""A prompt that ends within its last message, for the model to go on with it.

As transformers does it: the message is rendered with a word at its end, and the prompt is cut
there, so that what a template writes after a message (an end of turn) is not in it.
"""

from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any

from duetto.core.errors import InvalidRequest

FIELD = "continue_final_message"


class ContinuedMessage:
    """Marks the end of a conversation's last message, and finds it in the prompt."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """`messages` are plain_messages. Raises InvalidRequest for a last one that cannot be
        continued."""
        last = messages[-1]
        if last["role"] != "assistant":
            raise InvalidRequest(
                FIELD, f"the last message must be the assistant's, not of {last['role']!r:.60}"
            )
        if "tool_calls" in last or last["content"] is None:
            raise InvalidRequest(FIELD, "the last message must have a text, and no tool_calls")
        self._word = f"Kq7{token_hex(12)}zWv"  # that nobody can know beforehand
        content = last["content"]
        self._parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        self._is_text = isinstance(content, str)

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, with the word at their end. The blank after it shows whether the template
        takes blank space off a message's end."""
        parts = [*self._parts[:-1], {"type": "text", "text": f"{self._text}{self._word} "}]
        content = parts[-1]["text"] if self._is_text else parts
        return [*messages[:-1], {**messages[-1], "content": content}]

    def cut(self, prompt: str) -> str:
        """What the prompt holds before the word. Raises InvalidRequest if it is not there."""
        at = prompt.rfind(self._word)
        if at < 0 or self._text.strip() not in prompt:
            raise InvalidRequest(
                FIELD, "this model's chat template does not show the last message as it is"
            )
        is_whole = prompt.startswith(" ", at + len(self._word))
        return prompt[:at] if is_whole else prompt[:at].rstrip()

    @property
    def _text(self) -> str:
        return self._parts[-1]["text"] if self._parts else ""
