"""What the deciding half needs from a tokenizer, as a protocol; models/ implements it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

THINK = "<think>"  # opens what a model thinks, in most families that do


@dataclass(frozen=True, slots=True)
class ChatTemplateFacts:
    """What a model's chat template tells of how its model speaks."""

    source: str
    reads: frozenset[str]  # what a chat may give it: tools, enable_thinking, reasoning_effort, ...
    shows_calls: bool  # of messages with tool_calls
    shows_reasoning: bool  # of messages with reasoning_content
    generation_prompt: str | None  # what begins an answer; None if a plain chat is not rendered

    @property
    def opens_think(self) -> bool:
        """Whether an answer begins within what the model thinks, where a chat says nothing of it.

        A chat may turn it off (enable_thinking): of a prompt that is there, ask `opens_thinking`.
        """
        return opens_thinking(self.generation_prompt or "")


def opens_thinking(prompt: str) -> bool:
    """Whether an answer to this prompt begins within what the model thinks."""
    return prompt.rstrip().endswith(THINK)


class TextCodec(Protocol):
    """Text to token ids and back, and messages to a prompt."""

    @property
    def vocab_size(self) -> int:
        """The rows of the model's embedding: the ids below are those of prompts and answers.

        Some may have no token; they decode to nothing. A token may have no row; it is never an id.
        """
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def max_token_bytes(self) -> int | None:
        """No token stands for more bytes of text than this; None if no bound is known.

        So a text of n bytes is at least n / max_token_bytes tokens, before anyone counts them.
        """
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest("prompt", ...) if the model cannot read the text."""
        ...

    def encode_plain(self, text: str, apart: frozenset[str], *, begins: bool = True) -> list[int]:
        """The ids of a text in which nothing is a special token, nor one of the tokens `apart`,
        which are the same each time. `begins`: it is the beginning of a text, before which some
        tokenizers put a space. May take a second the first time."""
        ...

    def token_id(self, token: str) -> int | None:
        """Of a token as the vocabulary spells it; None if there is none, or the model has no row
        for it."""
        ...

    def encode_with_starts(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """As `encode`, and where in `text` each token begins."""
        ...

    def encode_apart(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The ids of the text alone, and what `encode` puts before and after them."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Raises InvalidRequest("prompt", ...) if the ids have no text."""
        ...

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text that has begun; half a character shows as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """As token_text, but exact, also where it is half a character."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """Apply the chat template. Raises InvalidRequest("messages", ...) if it refuses, "tools" or
        "documents" if it reads none, and others for what is wrong in them, with its place.

        May wait for another process: not to be called on an event loop.
        """
        ...

    def chat_template_facts(self, *, with_tools: bool = False) -> ChatTemplateFacts | None:
        """Of the template of chats with tools, or without; None if the model has none."""
        ...


def bytes_in_place(codec: TextCodec, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token adds to the text of them all, special tokens shown.

    As token_bytes, but of the one that begins the text, of which a tokenizer may drop a space.
    """
    found = [codec.token_bytes(token_id) for token_id in token_ids]
    index = next((i for i, data in enumerate(found) if data), None)
    if index is not None:
        text = codec.decode(token_ids[: index + 1], skip_special_tokens=False)
        if text != found[index].decode(errors="replace"):
            found[index] = text.encode()
    return found


def bytes_shown(data: bytes, text: str) -> bytes:
    """The bytes of a token that has added `text`: without the space in front, if there is none.

    Tokenizers put one before a text and after a special token; the text shows none there.
    """
    if data.startswith(b" ") and data[1:].decode(errors="replace") == text:
        return data[1:]
    return data
