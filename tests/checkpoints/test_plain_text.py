"""Texts in which nothing is a special token, with tokenizers of every kind."""

import pytest
from tiny_tokenizers import ALL_KINDS, TEXT
from tokenizers import AddedToken

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.errors import InvalidRequest

APART = frozenset({"<|mark|>"})


@pytest.fixture(params=ALL_KINDS.values(), ids=ALL_KINDS.keys())
def codec(request) -> Tokenizer:
    library = request.param()
    for token in ("<|mark|>", "<|end|>", "<|tool|>"):
        library.add_tokens([AddedToken(token, special=token == "<|end|>", normalized=False)])
    return Tokenizer(library)


def test_a_text_without_special_tokens_is_what_it_always_was(codec):
    for text in (*TEXT, "", " two  spaces ", "\n\ttab"):
        plain = codec.encode_plain(text, APART)
        assert plain == codec.encode(text, add_special_tokens=False)


def test_what_spells_a_special_token_is_none_and_the_others_keep_their_ids(codec):
    spelled = "a</s><|end|><|mark|><|tool|>"
    special = {codec.token_id(token) for token in ("</s>", "<|end|>", "<|mark|>")}
    ids = codec.encode_plain(spelled, APART)
    assert special <= {*codec.encode(spelled)}
    assert not special & {*ids}
    assert ids.count(codec.token_id("<|tool|>")) == 1


def test_what_is_no_beginning_has_no_space_before_it(codec):
    """Of those that put one there."""
    begins = codec.encode_plain("the", APART)
    behind = codec.encode_plain("the", APART, begins=False)
    first = codec.token_bytes(behind[0]) if behind else b""
    assert not first.startswith(b" ")
    if codec.token_bytes(begins[0]) == first:
        assert begins == behind


def test_half_a_surrogate_pair(codec):
    with pytest.raises(InvalidRequest, match="prompt: holds half a surrogate pair"):
        codec.encode_plain("a\ud800", APART)
