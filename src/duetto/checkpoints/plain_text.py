"""A tokenizer to which nothing in a text is a special token: for text that others wrote, between
markers that we put.
"""

import json
import secrets
from collections.abc import Collection

import tokenizers

from duetto.checkpoints.tokenizer_library import call

_ANCHOR = "☺"  # no piece joins it, so what follows is not the beginning of a text


class PlainText:
    def __init__(self, tokenizer: tokenizers.Tokenizer, apart: Collection[str]) -> None:
        """A copy of the tokenizer, which reads the special tokens, and those of `apart`, as the
        characters that spell them. Takes as long as loading it."""
        whole = json.loads(tokenizer.to_str())
        vocabulary = whole["model"].get("vocab") or {}
        known = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
        kept, secret = [], secrets.token_hex(16)
        for token in whole["added_tokens"]:
            if token["special"] or token["content"] in apart:
                if token["content"] in known:
                    continue
                # The library counts: without it those behind it would have other ids.
                token["content"] = f"\0{secret}{token['id']}\0"
            kept.append(token)
        whole |= {"added_tokens": kept, "post_processor": None}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
        self._anchor = self._ids(_ANCHOR)
        self._puts_a_space = self._ids("a") != self._behind_anchor("a")

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """`begins`: the text is the beginning of one, before which some tokenizers put a space."""
        return self._ids(text) if begins or not self._puts_a_space else self._behind_anchor(text)

    def _ids(self, text: str) -> list[int]:
        (encoding,) = call(self._tokenizer.encode_batch_fast, [text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _behind_anchor(self, text: str) -> list[int]:
        ids, count = self._ids(_ANCHOR + text), len(self._anchor)
        return ids[count:] if ids[:count] == self._anchor else self._ids(text)
