"""A prompt as a completion shows it before its answer. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from duetto.core.text import TextCodec, bytes_shown
from duetto.engine.detokenizer import TokenPlaces


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
    at = TokenPlaces(
        lambda ids, skip: codec.decode(ids, skip_special_tokens=skip), (), skip_special_tokens=False
    )
    starts = [at.push(token_id).start for token_id in token_ids]
    return Echo(text, starts, _shown(codec, token_ids, text, starts))


def _shown(
    codec: TextCodec, token_ids: Sequence[int], text: str, starts: Sequence[int]
) -> list[bytes]:
    parts = pairwise([*starts, len(text)])
    return [
        bytes_shown(codec.token_bytes(token_id), text[start:end])
        for token_id, (start, end) in zip(token_ids, parts, strict=True)
    ]
