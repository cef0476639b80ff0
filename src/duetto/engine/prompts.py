"""A prompt as callers in this process write it: a text, ids or segments, and a conversation.

Knows no requests and no engine: it asks the codec, and changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from duetto.core.errors import InvalidRequest
from duetto.core.reuse import TokenRange
from duetto.core.text import TextCodec
from duetto.engine.infill import NO_TOKENS, Infill
from duetto.engine.marked_chat import Conversation, render_marked
from duetto.engine.segments import PromptSegment, encode_segments, read_segments

Prompt = str | Mapping[str, Any]
PROMPT_KEYS = {
    "prompt",
    "prompt_token_ids",
    "segments",
    "suffix",
    "why_not_reusable",
    "cache_salt",
}
A_PROMPT = f"a text or a mapping of {', '.join(sorted(PROMPT_KEYS))}"


class ReadPrompt(NamedTuple):
    text: str | None
    token_ids: Sequence[int]
    cache_salt: bytes = b""
    reusable: tuple[TokenRange, ...] = ()
    refusal: InvalidRequest | None = None  # why what was marked has no place of its own
    end_token_ids: frozenset[int] = frozenset()  # of the answer, beside the model's own


def read_prompt(prompt: Prompt, codec: TextCodec) -> ReadPrompt:
    """Raises InvalidRequest for what is no prompt, or cannot be read by the model."""
    if isinstance(prompt, str):
        return ReadPrompt(prompt, codec.encode(prompt))
    if not isinstance(prompt, Mapping) or not prompt.keys() <= PROMPT_KEYS:
        raise InvalidRequest("prompt", f"must be {A_PROMPT}, not {prompt!r:.80}")
    salt = prompt.get("cache_salt", "")
    if not isinstance(salt, str):
        raise InvalidRequest("cache_salt", f"must be a text, not {salt!r:.80}")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if prompt.get("suffix"):
        return _read_middle(prompt, codec, salt.encode())
    if (segments := prompt.get("segments")) is not None:
        if token_ids is not None:
            raise InvalidRequest("segments", "with prompt_token_ids: give one of them")
        ids, reusable = encode_segments(codec, read_segments(segments))
        return ReadPrompt(text, ids, salt.encode(), reusable)
    if token_ids is None and isinstance(text, str):
        token_ids = codec.encode(text)
    if not isinstance(token_ids, Sequence) or any(type(i) is not int for i in token_ids):
        raise InvalidRequest("prompt", "needs a text, or whole numbers as prompt_token_ids")
    return ReadPrompt(text, [*token_ids], salt.encode(), (), _refusal(prompt))


def _read_middle(prompt: Mapping[str, Any], codec: TextCodec, salt: bytes) -> ReadPrompt:
    """A text with a hole: what stands before it is the prompt, what stands behind it the suffix."""
    before, suffix = prompt.get("prompt"), prompt["suffix"]
    if not isinstance(suffix, str):
        raise InvalidRequest("suffix", f"must be a text, not {suffix!r:.80}")
    if not isinstance(before, str) or not prompt.keys() <= {"prompt", "suffix", "cache_salt"}:
        raise InvalidRequest("suffix", "needs a text as prompt, and goes with nothing else")
    infill = Infill.of(codec)
    if infill is None:
        raise InvalidRequest("suffix", NO_TOKENS)
    ids = infill.prompt(before, suffix)
    return ReadPrompt(before, ids, salt, end_token_ids=infill.end_token_ids)


def prompt_of_chat(
    codec: TextCodec,
    messages: Conversation,
    *,
    add_generation_prompt: bool | None,
    template_kwargs: Mapping[str, Any] | None,
    documents: Conversation = (),
    tools: Sequence[Mapping[str, Any]] = (),
    continue_final_message: bool = False,
) -> dict[str, Any]:
    """The prompt that a conversation becomes, as `read_prompt` takes it. Where texts are marked,
    its segments; where the template leaves them no place of their own, why."""
    begins = begins_answer(add_generation_prompt, continue_final_message)

    def render(shown: Conversation, shown_documents: Conversation) -> str:
        return codec.render_chat(
            shown,
            add_generation_prompt=begins,
            template_kwargs=template_kwargs,
            documents=shown_documents,
            tools=tools,
            continue_final_message=continue_final_message,
        )

    chat = render_marked(render, messages, documents)
    # The template has written the special tokens; the tokenizer must not add them again.
    if chat.segments:
        segments = [_encoded(codec, segment) for segment in chat.segments]
        return {"prompt": chat.text, "segments": segments}
    token_ids = codec.encode(chat.text, add_special_tokens=False)
    why = {} if chat.refusal is None else {"why_not_reusable": str(chat.refusal)}
    return {"prompt": chat.text, "prompt_token_ids": token_ids, **why}


def begins_answer(add_generation_prompt: bool | None, continue_final_message: bool | None) -> bool:
    """Whether a prompt ends with the beginning of an answer: unless it is said, where it does not
    end within one."""
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt


def _encoded(codec: TextCodec, segment: PromptSegment) -> dict[str, Any]:
    ids, _ = encode_segments(codec, [segment], add_special_tokens=False)
    return {"token_ids": ids, "reusable": segment.is_reusable}


def _refusal(prompt: Mapping[str, Any]) -> InvalidRequest | None:
    why = prompt.get("why_not_reusable")
    if why is None:
        return None
    field, _, message = str(why).partition(": ")
    return InvalidRequest(field, message)
