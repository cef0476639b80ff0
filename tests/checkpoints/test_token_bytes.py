"""A token's bytes are what it adds to a text that has begun, whatever kind of token it is."""

import random

import pytest
from tiny_tokenizers import ALL_KINDS, TEXT, gemma_like, phi3_like, qwen_like
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.text import bytes_in_place


def test_what_added_tokens_decode_to() -> None:
    cases = {
        gemma_like: {
            "▁▁": "  ",
            "▁▁▁▁": "    ",
            "▁" * 8: " " * 8,
            "\n\n": "\n\n",
            "<table>": "<table>",
            "<0x0G>": "<0x0G>",
            "</s>": "</s>",
            "▁the": " the",
            "<0x41>": "A",
        },
        phi3_like: {"<|user|>": "<|user|>", "<|sys|>": "<|sys|>", "▁<PRE>": " <PRE>"},
        qwen_like: {"<|im_start|>": "<|im_start|>", "<think>": "<think>", "Ġx y": "Ġx y"},
    }
    for make, tokens in cases.items():
        codec, library = Tokenizer(make()), make()
        for token, text in tokens.items():
            assert codec.token_text(library.token_to_id(token)) == text, token
    # Written as byte-level pieces are, and decoded as they are: one byte of a longer character.
    assert codec.token_bytes(library.token_to_id("é")) == b"\xe9"


def every_way(library: Library) -> list[list[int]]:
    """Ids: random ones, those of texts, each one twice and between two others."""
    rng = random.Random(0)
    size = library.get_vocab_size()
    found = [[rng.randrange(size + 3) for _ in range(rng.randrange(12))] for _ in range(400)]
    found += [library.encode(text).ids for text in TEXT]
    around = library.encode("the dog", add_special_tokens=False).ids
    for token_id in range(0, size, 1 + size // 150):
        found += [[token_id, token_id], [*around, token_id, *around]]
    return found


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_tokens_show_joins_to_what_they_decode_to(kind: str) -> None:
    codec = Tokenizer(ALL_KINDS[kind]())
    for ids in every_way(ALL_KINDS[kind]()):
        text = codec.decode(ids, skip_special_tokens=False)
        assert b"".join(bytes_in_place(codec, ids)).decode(errors="replace") == text
        begun = codec.encode("the", add_special_tokens=False) + ids
        text = codec.decode(begun, skip_special_tokens=False)
        joined = b"".join(map(codec.token_bytes, begun)).decode(errors="replace")
        assert joined in (text, " " + text)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 2)]),
        decoders.Sequence(
            [decoders.Sequence([decoders.Metaspace()]), decoders.ByteFallback(), decoders.Fuse()]
        ),
        decoders.Metaspace(),
    ],
    ids=["strip left", "strip right", "strip two", "nested", "metaspace"],
)
def test_spaces_are_shown_whatever_a_decoder_does_to_the_ends_of_a_text(decoder) -> None:
    library = gemma_like()
    library.decoder = decoder
    codec = Tokenizer(library)
    expected = {"▁the": b" the", "▁": b" ", "▁▁▁▁": b"    ", "th": b"th"}
    assert {t: codec.token_bytes(library.token_to_id(t)) for t in expected} == expected
