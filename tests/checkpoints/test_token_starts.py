"""Where the tokens of a text begin in it, whatever was done to the text on the way to ids."""

import random
from itertools import pairwise

import pytest
from tiny_tokenizers import (
    ALL_KINDS,
    TEXT,
    bert_like,
    byte_fallback_bpe,
    gpt2_like,
    mistral_like,
    phi3_like,
    qwen_like,
    t5_like,
)

from duetto.checkpoints.tokenizer import Tokenizer

# (tokenizer, text, the part of the text that each token stands for)
CASES = [
    # A dummy space in front is no character of the text; the start token is before all.
    (byte_fallback_bpe, "the th", ["", "", "th", "e", " ", "th"]),
    (mistral_like, "the th", ["", "", "th", "e", " ", "th"]),
    (gpt2_like, "The the", None),
    # Bytes that make a character together: all begin where it does, the last one ends it.
    (byte_fallback_bpe, "界é", ["", "", "", "", "界", "é"]),
    # Special tokens that the client spelt are text of the prompt.
    (byte_fallback_bpe, "a</s>th", ["", "", "a", "</s>", "", "th"]),
    (phi3_like, "<|user|>  th", ["", "<|user|>  ", "", "th"]),
    # Composition: two characters of the text are one of what is encoded.
    (qwen_like, "ae\u0301b", ["a", "e\u0301", "b"]),
    # NFKC: one character is two.
    (t5_like, "ﬁs", None),
    # Accents and case are gone, and spaces stand before what follows them.
    (bert_like, "THE  dog", None),
]


def parts(text: str, starts: list[int]) -> list[str]:
    assert starts == sorted(starts) and all(0 <= start <= len(text) for start in starts)
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


@pytest.mark.parametrize(("make", "text", "expected"), CASES)
def test_the_part_of_a_text_that_each_token_stands_for(make, text, expected) -> None:
    codec = Tokenizer(make())
    ids, starts = codec.encode_with_starts(text)
    assert ids == codec.encode(text)
    shown = parts(text, starts)
    assert "".join(shown) == text
    if expected is not None:
        pieces = [make().id_to_token(i) for i in ids]
        assert shown == expected, list(zip(pieces, shown, strict=True))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tokens_tile_any_text(kind: str, special: bool) -> None:
    codec = Tokenizer(ALL_KINDS[kind]())
    rng = random.Random(1)
    alphabet = [*"".join(TEXT), "the ", " ", "\n", "e\u0301", "ﬁ", "👩\u200d👧", "<s>", "</s>"]
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(20)))
        ids, starts = codec.encode_with_starts(text, add_special_tokens=special)
        assert ids == codec.encode(text, add_special_tokens=special)
        shown = parts(text, starts)
        assert "".join(shown) == text[starts[0] if starts else len(text) :]
        if kind in ("byte_level_bpe", "gemma_like"):  # these keep a text as it is
            for token_id, part in zip(ids, shown, strict=True):
                token = codec.token_text(token_id)
                assert not part or "\ufffd" in token or token == part


def test_tokens_after_a_text_begin_where_it_ends() -> None:
    codec = Tokenizer(gpt2_like())
    ids, starts = codec.encode_with_starts("the dog \n")
    assert ids[0] == 1 and ids[-1] == 2
    assert starts[0] == 0 and starts[-1] == len("the dog \n")
    assert Tokenizer(gpt2_like()).encode_with_starts("") == ([1, 2], [0, 0])
