"""The readable trainer learns what the `tokenizers` library learns."""

import json
import random
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from duetto.checkpoints.bpe_trainer import Merge, learn_merges, split_words
from duetto.checkpoints.tokenizer import Tokenizer as OurTokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))


def library_merges(text: str, num_merges: int) -> list[tuple[bytes, bytes]]:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([text], trainer)
    library.decoder = decoders.ByteLevel()
    codec = OurTokenizer(library)
    from_character = {piece: codec.token_bytes(i) for piece, i in library.get_vocab().items()}
    merges = json.loads(library.to_str())["model"]["merges"]
    return [(from_character[left], from_character[right]) for left, right in merges]


def ours(text: str, num_merges: int) -> list[tuple[bytes, bytes]]:
    return [(merge.left, merge.right) for merge in learn_merges(text, num_merges)]


@pytest.mark.parametrize("name", ["textwrap.py", "heapq.py"])
def test_the_same_merges_as_the_library(name: str) -> None:
    text = (STDLIB / name).read_text(encoding="utf-8")
    expected = library_merges(text, 200)
    assert len(expected) == 200
    assert ours(text, 200) == expected


def test_the_same_merges_on_many_scripts_where_most_counts_are_ties() -> None:
    text = "\n".join(TEXT)
    expected = library_merges(text, 10_000)
    assert len(expected) > 40
    assert ours(text, 10_000) == expected


@given(st.text("ab \n", max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_same_as_counting_again_each_time(text: str) -> None:
    words = [[bytes([b]) for b in word.encode()] for word in split_words(text)]
    for merge in learn_merges(text, 20, min_count=1):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        assert merge.count == max(counts.values()) == counts[merge.left, merge.right]
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (merge.left, merge.right):
                    word[i : i + 2] = [merge.piece]
                i += 1
    if text:
        total = sum(len(word) for word in words)
        assert total >= 1 and b"".join(p for word in words for p in word) == text.encode()


def test_words_join_to_the_text() -> None:
    rng = random.Random(0)
    alphabet = "ab1 \n\t_'s.é你½\u0301🙂\u2028"
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        assert "".join(split_words(text)) == text
    assert split_words("I don't, 12 x_y  z") == [
        *("I", " don", "'t", ",", " 12", " x", "_", "y", " ", " z")
    ]


def test_a_merge_is_described() -> None:
    assert list(learn_merges("low low low", 2)) == [
        Merge(0, b"l", b"o", 3),
        Merge(1, b"lo", b"w", 3),
    ]
    assert list(learn_merges("", 5)) == []
    assert list(learn_merges("abc", 5)) == []  # nothing occurs twice


def test_a_megabyte_takes_seconds() -> None:
    texts = (file.read_text(encoding="utf-8") for file in sorted(STDLIB.glob("*.py")))
    text = "".join(texts)[:1_000_000]
    start = time.process_time()
    merges = list(learn_merges(text, 1000))
    assert len(merges) == 1000
    assert time.process_time() - start < 20.0  # about 3 s
