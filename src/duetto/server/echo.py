"""A prompt as a completion shows it before its answer. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from duetto.core.text import TextCodec
from duetto.engine.detokenizer import TokenStarts


@dataclass(frozen=True, slots=True)
class Echo:
    """The text, and of each token where it begins in it and the bytes that it shows there.

    The two lists are empty where no log-probabilities are asked for.
    """

    text: str
    starts: Sequence[int] = ()
    token_bytes: Sequence[bytes] = ()


def echo_of_text(
    codec: TextCodec, text: str, *, add_special_tokens: bool, with_tokens: bool
) -> Echo:
    """The client's own text. Special tokens are shown where the client spelt them."""
    if not with_tokens:
        return Echo(text)
    ids, starts = codec.encode_with_starts(text, add_special_tokens=add_special_tokens)
    return Echo(text, starts, _shown(codec, ids, text, starts))


def echo_of_ids(codec: TextCodec, token_ids: Sequence[int], *, with_tokens: bool) -> Echo:
    """What the ids decode to, special tokens shown."""
    text = codec.decode(token_ids, skip_special_tokens=False)
    if not with_tokens:
        return Echo(text)
    at = TokenStarts(
        lambda ids, skip: codec.decode(ids, skip_special_tokens=skip), (), skip_special_tokens=False
    )
    starts = [at.push(token_id) for token_id in token_ids]
    return Echo(text, starts, _shown(codec, token_ids, text, starts))


def _shown(
    codec: TextCodec, token_ids: Sequence[int], text: str, starts: Sequence[int]
) -> list[bytes]:
    """The bytes of each token, without the space that a tokenizer puts in front of a text."""
    found = [codec.token_bytes(token_id) for token_id in token_ids]
    for index, (start, data) in enumerate(zip(starts, found, strict=True)):
        if start > 0:
            break
        end = starts[index + 1] if index + 1 < len(starts) else len(text)
        if data.startswith(b" ") and text[start:end] == data[1:].decode(errors="replace"):
            found[index] = data[1:]
    return found
