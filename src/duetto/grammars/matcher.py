"""An answer's way through a grammar: which tokens may follow, and how it ends soonest.

What is told is a function of the grammar and the tokens followed, however they were: one by one,
all at once, or back from others. Knows no logits and no requests.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from duetto.core.errors import EngineError
from duetto.core.structured import Vocabulary
from duetto.grammars.spelling import Spelling

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from duetto.grammars.budget import BudgetedEngine

Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]
Ceiling = NDArray[np.float32]
Scores = NDArray[np.int32]  # [vocabulary]: what is tried first, of what may follow

MAX_SAID = 160  # characters of what a library says
MAX_WALK = 256  # tokens of an end that is searched
WATCHED = 64  # last tokens of an answer, beside twice what its shortest one takes
_LETTERS = (b"q", b"Z", b"j", b"X")  # that texts have, and names seldom
_VALUES = frozenset((b"null", b"true", b"false", b"[]", b"{}", b'""', b"0"))
_SPACE = b" \t\r\n"


# Of the eight tokens that a byte of a mask stands for.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_CEILINGS: Ceiling = np.where(_BITS, np.inf, -np.inf).astype(np.float32)


class Ways:
    """In which order tokens are tried on the way to an end, and which end it is."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size = len(vocabulary.tokens)
        self.eos_token_ids = vocabulary.eos_token_ids
        self.end = min(vocabulary.eos_token_ids)
        size = _column(_size, vocabulary)
        brackets = _column(lambda token: _num_of(token, b"}]"), vocabulary)
        values = _column(_VALUES.__contains__, vocabulary)
        closed = _column(lambda token: _num_of(token.removeprefix(b'"'), b"}]", 1), vocabulary)
        closed *= _column(lambda token: token[:1] == b'"', vocabulary)
        quote = _column(b'"'.__eq__, vocabulary)
        self._in_text = size + 2**20 * closed
        self._elsewhere = size + 2**20 * brackets + 2**18 * values
        self._before_text = self._elsewhere + 2**17 * quote
        # Where a text may have no end but a marker, one that has not been tried may be it.
        special = np.zeros(self.vocab_size, np.int32)
        special[[*vocabulary.special.values()]] = 1
        self.markers = 2**24 * (special | _column(_looks_like_a_marker, vocabulary))
        self._letters = _places(_LETTERS, vocabulary)
        self.spelling = Spelling(vocabulary)
        self._quoted = _places(tuple(b'"' + letter for letter in _LETTERS), vocabulary)

    def order(self, allowed: Bools) -> Scores:
        """What is tried first is what has the most. Within a text, which any letter may go on, a
        quote ends something; elsewhere brackets do, and a quote begins a text, the shortest of
        which is empty."""
        if len(self._letters) > 1 and allowed[self._letters].all():
            return self._in_text
        if len(self._quoted) > 1 and allowed[self._quoted].all():
            return self._before_text
        return self._elsewhere


class Matcher:
    """Follows the tokens of one answer. One thread at a time."""

    def __init__(
        self,
        engine: "LLMatcher | BudgetedEngine",
        ways: Ways,
        ask_least: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`ask_least` tells how long the shortest answer is that is found; it may take a while."""
        self._engine = engine
        self._ways = ways
        self._ask_least = ask_least
        self._tokens: list[int] = []  # that it has followed
        # An end that fits, and behind which tokens it was found.
        self._end: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def seek(self, tokens: Sequence[int]) -> bool:
        """Be behind these tokens; False if the grammar has no such answer, or it has ended."""
        if tokens and tokens[-1] in self._ways.eos_token_ids:
            return False
        same = _num_same(self._tokens, tokens)
        back = len(self._tokens) - same
        if back:
            self._engine.rollback(back)
            del self._tokens[same:]
        wanted = [*tokens[same:]]
        if not wanted:
            return True
        count = self._engine.try_consume_tokens(wanted)
        self._check()
        self._tokens += wanted[:count]
        return count == len(wanted)

    def allowed(self) -> Bools:
        """Which tokens may follow [vocabulary]. Raises EngineError where it takes too much work to
        tell."""
        bits = np.unpackbits(self._bits(), count=self._ways.vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def ceiling(self) -> Ceiling:
        """The same as the most that each logit may be: -inf, or inf."""
        return _CEILINGS.take(self._bits(), axis=0).reshape(-1)[: self._ways.vocab_size]

    def what_must_follow(self, most: int) -> tuple[int, ...]:
        """Where one text only may follow: tokens that spell it, the longest first; at most `most`.
        Another way to spell it may be allowed too."""
        # Of a copy: an engine that has told it may find no token that goes on, some tokens later.
        return self._ways.spelling.of(self._engine.deep_copy().compute_ff_bytes(), most)

    def shortest_end(self, most: int) -> tuple[int, ...] | None:
        """The shortest end that is found: at most `most` tokens, without the end of sequence.
        Searched greedily, closing what is open first."""
        found = [self._walk(most, fair=fair) for fair in (False, True)]
        return min((path for path in found if path is not None), key=len, default=None)

    def watches(self, num_left: int) -> bool:
        """Whether it is seen to it that the answer ends in time, where so many tokens are left."""
        if num_left > WATCHED + 2 * MAX_WALK:
            return False
        least = self._ask_least()
        return least is not None and num_left <= WATCHED + 2 * least

    def steered(self, tokens: Sequence[int], token_id: int, num_left: int) -> int:
        """The token that is taken where `token_id` was sampled behind `tokens` and `num_left` may
        be taken, it among them: another one if the answer could no longer end in time."""
        if token_id in self._ways.eos_token_ids or not self.watches(num_left):
            return token_id
        behind = (*tokens, token_id)
        if self._end is not None and self._end[0] == tuple(tokens) and self._end[1]:
            first, *rest = self._end[1]
            if first == token_id:
                self._end = behind, tuple(rest)
                return token_id
        self._end = None
        if self.seek(behind) and self._ends_within(num_left - 2):
            return token_id
        self.seek(tokens)
        path = self.shortest_end(num_left - 1)
        if path is None:
            return token_id
        return path[0] if path else self._ways.end

    def _ends_within(self, most: int) -> bool:
        path = self._walk(most)
        if path is None:
            path = self._walk(most, fair=True)
        if path is None:
            return False
        self._end = tuple(self._tokens), path
        return True

    def _walk(self, most: int, *, fair: bool = False) -> tuple[int, ...] | None:
        """Take what is first in the order, again and again, until it may end. A fair walk takes
        what the answer has least often, markers before all else, so it leaves circles. Either goes
        on in the same way from each of its tokens on: who follows one sees the end come nearer."""
        if most < 0:
            return None
        path: list[int] = []
        used: Scores | None = None
        if fair:
            used = np.bincount(self._tokens, minlength=self._ways.vocab_size).astype(np.int32)
        try:
            while not self._engine.is_accepting():
                if len(path) >= min(most, MAX_WALK):
                    return None
                allowed = self.allowed()
                ids = np.flatnonzero(allowed)
                if not len(ids):
                    return None
                scores = self._ways.order(allowed)[ids]
                if used is not None:
                    ids, scores = _least_used(ids, scores + self._ways.markers[ids], used)
                token_id = int(ids[scores.argmax()])
                if used is not None:
                    used[token_id] += 1
                if not self._engine.consume_token(token_id):
                    self._check()
                    return None
                path.append(token_id)
            return tuple(path)
        finally:
            self._engine.rollback(len(path))

    def _bits(self) -> NDArray[np.uint8]:
        data = np.frombuffer(self._engine.compute_bitmask(), np.uint8)
        self._check()
        return data

    def _check(self) -> None:
        if self._engine.is_error():
            message = first_line(self._engine.get_error())
            if message.startswith("NoExtension"):
                message = "no token of this model spells what must follow"
            raise EngineError(f"the answer's grammar: {message}")


def first_line(message: str) -> str:
    """What a library says, as far as a reply may show it."""
    return message.strip().partition("\n")[0][:MAX_SAID]


def _num_same(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are the same in both."""
    most = min(len(some), len(others))
    if [*some[:most]] == [*others[:most]]:  # nearly always
        return most
    pairs = enumerate(zip(some, others, strict=False))
    return next(i for i, (one, other) in pairs if one != other)


def _size(token: bytes) -> int:
    """How far a token leads: what is no space of it counts, and space is last."""
    return 8 * len(token.strip(_SPACE)) - min(len(token), 7)


def _num_of(token: bytes, characters: bytes, more: int = 0) -> int:
    """How many there are, if there is nothing else; and `more`."""
    return 0 if token.strip(characters) else len(token) + more


def _looks_like_a_marker(token: bytes) -> bool:
    return re.fullmatch(rb"</?[A-Za-z_:|]+>|<\|.+\|>|\[/?[A-Z_]{3,}\]", token) is not None


def _least_used(ids: Indices, scores: Scores, used: Scores) -> tuple[Indices, Scores]:
    counts = used[ids]
    least = counts == counts.min()
    return ids[least], scores[least]


def _places(tokens: Sequence[bytes], vocabulary: Vocabulary) -> NDArray[np.intp]:
    """The ids of those that the vocabulary has."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if token in tokens}
    return np.array([*ids.values()], np.intp)


def _column(told: Callable[[bytes], int], vocabulary: Vocabulary) -> Scores:
    return np.array([told(token) for token in vocabulary.tokens], np.int32)
