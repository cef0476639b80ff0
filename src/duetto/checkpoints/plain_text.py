"""A tokenizer to which nothing in a text is a special token: for text that others wrote, between
markers that we put.
"""

import json
import secrets
from collections.abc import Collection
from typing import Any

import tokenizers

from duetto.checkpoints.tokenizer_library import call

_ANCHOR = "☺"  # no piece joins it, so what follows is not the beginning of a text


class PlainText:
    def __init__(self, tokenizer: tokenizers.Tokenizer, apart: Collection[str]) -> None:
        """A copy of the tokenizer, which reads the special tokens, and those of `apart`, as the
        characters that spell them. Takes as long as loading it."""
        whole = json.loads(tokenizer.to_str())
        hidden = {
            token["content"]
            for token in whole["added_tokens"]
            if token["special"] or token["content"] in apart
        }
        secret = secrets.token_hex(16)  # nobody can spell it
        names = {content: f"\0{secret}{place}\0" for place, content in enumerate(sorted(hidden))}
        _rename_pieces(whole["model"], names)
        kept = []
        for token in whole["added_tokens"]:
            # They stay, or those behind them had other ids; but for some of the vocabulary.
            if token["content"] not in hidden or token["content"] in names:
                kept.append(token | {"content": names.get(token["content"], token["content"])})
        whole |= {"added_tokens": kept, "post_processor": None}
        self._tokenizer = call(tokenizers.Tokenizer.from_str, json.dumps(whole))
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


def _rename_pieces(model: dict[str, Any], names: dict[str, str]) -> None:
    """Pieces of the vocabulary that are to be spelled no more. What stands for the unknown does so
    whatever a text spells, and so does what is made of other pieces: both stay, and `names` without
    them."""
    vocabulary: Any = model.get("vocab") or {}
    stay = {"".join(pair) for pair in model.get("merges") or ()} | {model.get("unk_token")}
    if not isinstance(vocabulary, dict) and (unknown := model.get("unk_id")) is not None:
        stay.add(vocabulary[unknown][0])
    for name in [name for name in names if name in stay]:
        del names[name]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
