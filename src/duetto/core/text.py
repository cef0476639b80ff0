"""The two things the deciding half needs from a tokenizer, as a protocol; models/ implements it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class TextCodec(Protocol):
    """Text to token ids and back, and messages to a prompt."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def max_token_bytes(self) -> int | None:
        """No token stands for more bytes of text than this; None if no bound is known.

        So a text of n bytes is at least n / max_token_bytes tokens, before anyone counts them.
        """
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """One token alone, as log-probabilities show it; half a character shows as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, also where they are half a character."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Apply the chat template. Raises InvalidRequest("messages", ...) if it refuses."""
        ...
