"""Byte-level byte-pair encoding, learned from scratch: the twin of `tokenizers`, to be read.

A text is cut into words and each word into bytes. Then, again and again, the pair of neighbouring
pieces that occurs most often becomes one piece (Sennrich et al., Neural Machine Translation of
Rare Words with Subword Units, 2016; over bytes: Radford et al., GPT-2, 2019). The merges in order
are the whole tokenizer: to encode a word, apply them in that order.

Of pairs that are equally frequent, the one whose left piece was known first is merged, then the
one whose right piece was: as `tokenizers` does it, whose bytes come in GPT-2's order.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# GPT-2's rule: a word takes the space before it along; contractions, letters, digits and signs
# are kept apart. (Its \p{N} also has fractions and Roman numerals, which are letters to Python.)
_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

# Bytes in GPT-2's order: those that print as themselves, then the others.
PRINTABLE_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
GPT2_BYTES = (*PRINTABLE_BYTES, *(byte for byte in range(256) if byte not in PRINTABLE_BYTES))

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Merge:
    """One learned step: `left` followed by `right` became one piece."""

    rank: int  # from 0
    left: bytes
    right: bytes
    count: int  # how often the pair occurred when it was merged

    @property
    def piece(self) -> bytes:
        return self.left + self.right


def split_words(text: str) -> list[str]:
    """The words of a text; no merge reaches across them. They join to the text."""
    return _WORD.findall(text)


def learn_merges(text: str, num_merges: int, min_count: int = 2) -> Iterator[Merge]:
    """Yield up to `num_merges` merges as they are learned, while pairs occur `min_count` times.

    Counts are kept up to date where a merge changes words, so a merge costs what it changes and
    not another pass over the text.
    """
    pieces = [bytes([byte]) for byte in GPT2_BYTES]  # piece ids are places in this list
    id_of = {piece: i for i, piece in enumerate(pieces)}
    words = _Words(text, id_of)
    # Most frequent first. An entry whose count is not the pair's any more is out of date.
    heap = [(-count, pair) for pair, count in words.pair_counts.items()]
    heapq.heapify(heap)
    rank = 0
    while heap and rank < num_merges:
        negative_count, pair = heapq.heappop(heap)
        count = words.pair_counts[pair]
        if -negative_count != count:
            continue
        if count < min_count:
            return
        left, right = pieces[pair[0]], pieces[pair[1]]
        new = id_of.setdefault(left + right, len(pieces))  # two merges may make the same piece
        if new == len(pieces):
            pieces.append(left + right)
        for changed in words.merge(pair, new):
            heapq.heappush(heap, (-words.pair_counts[changed], changed))
        yield Merge(rank, left, right, count)
        rank += 1


class _Words:
    """The text's different words as lists of piece ids, and how often each pair occurs in all."""

    def __init__(self, text: str, id_of: dict[bytes, int]) -> None:
        counted = Counter(split_words(text))
        self._words = [[id_of[bytes([b])] for b in word.encode()] for word in counted]
        self._counts = list(counted.values())
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)  # words that had the pair
        self.pair_counts: Counter[Pair] = Counter()
        for index in range(len(self._words)):
            self._add(index, +1)

    def merge(self, pair: Pair, new: int) -> set[Pair]:
        """Replace the pair everywhere. Return the pairs whose counts changed and are not 0."""
        changed: set[Pair] = set()
        for index in self._where.pop(pair):
            changed |= self._add(index, -1)
            self._words[index] = _replaced(self._words[index], pair, new)
            changed |= self._add(index, +1)
        return {p for p in changed if self.pair_counts[p] > 0}

    def _add(self, index: int, sign: int) -> set[Pair]:
        """Count a word's pairs in, or out."""
        word, count = self._words[index], self._counts[index]
        pairs = list(pairwise(word))
        for pair in pairs:
            self.pair_counts[pair] += sign * count
            if sign > 0:
                self._where[pair].add(index)
        return set(pairs)


def _replaced(word: list[int], pair: Pair, new: int) -> list[int]:
    """The word with each occurrence of the pair, from the left, replaced by `new`."""
    result: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return result
