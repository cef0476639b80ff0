"""Closes an answer's reasoning once its tokens are used up, whatever grammar it follows.

Stands between a Matcher and llguidance, whose own limits of tokens cannot be gone back over. What
it lets follow is a function of the grammar, the budget and the tokens followed: for each of them it
keeps where the reasoning is.
"""

from copy import copy
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from duetto.core.structured import ReasoningBudget
from duetto.grammars.spelling import Spelling

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bits = NDArray[np.uint8]


class _Phase(IntEnum):
    BEFORE = 0  # what has come may be the opening marker, or become it
    WITHIN = 1
    BEHIND = 2  # or there was none


class _Place(NamedTuple):
    """Where an answer is, behind some token."""

    phase: _Phase
    num_tokens: int = 0  # within
    tail: bytes = b""  # what a marker may begin in


class BudgetedEngine:
    """An LLMatcher, as far as a Matcher asks one."""

    def __init__(self, engine: "LLMatcher", budget: ReasoningBudget, spelling: Spelling) -> None:
        self._engine, self._spelling = engine, spelling
        self._num_tokens = budget.num_tokens
        self._opening = spelling.encoded(budget.opening)
        self._closing = spelling.encoded(budget.closing)
        first = _Place(_Phase.WITHIN if budget.has_begun else _Phase.BEFORE)
        self._places = [first]  # behind each of the tokens

    def consume_token(self, token_id: int) -> bool:
        is_taken = self._engine.consume_token(token_id)
        if is_taken:
            self._places.append(self._behind(token_id))
        return is_taken

    def try_consume_tokens(self, token_ids: list[int]) -> int:
        count = self._engine.try_consume_tokens(token_ids)
        for token_id in token_ids[:count]:
            self._places.append(self._behind(token_id))
        return count

    def rollback(self, count: int) -> None:
        self._engine.rollback(count)
        del self._places[len(self._places) - count :]

    def is_accepting(self) -> bool:
        return self._engine.is_accepting()

    def is_error(self) -> bool:
        return self._engine.is_error()

    def get_error(self) -> str:
        return self._engine.get_error()

    def deep_copy(self) -> "BudgetedEngine":
        copied = copy(self)
        copied._engine, copied._places = self._engine.deep_copy(), [*self._places]
        return copied

    def compute_ff_bytes(self) -> bytes:
        rest = self._rest_of_closing()
        return self._engine.compute_ff_bytes() if rest is None else rest

    def compute_bitmask(self) -> bytes:
        bitmask = self._engine.compute_bitmask()
        rest = self._rest_of_closing()
        if rest is None or self._engine.is_error():
            return bitmask
        bits = np.frombuffer(bitmask, np.uint8)
        # Within a character there is no place for a marker: the character is ended first.
        for wanted in (self._spelling.beginnings(rest), self._spelling.continuing()):
            ids = np.array(wanted, np.intp)
            ids = ids[(bits[ids >> 3] >> (ids & 7)) & 1 == 1]
            if len(ids):
                kept = np.zeros_like(bits)
                np.bitwise_or.at(kept, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
                return kept.tobytes()
        return bitmask

    def _rest_of_closing(self) -> bytes | None:
        """What must follow, as the tokens are used up; None: what the grammar says."""
        phase, num_tokens, tail = self._places[-1]
        if phase is not _Phase.WITHIN or num_tokens < self._num_tokens:
            return None
        closing = self._closing
        sizes = range(min(len(closing) - 1, len(tail)), 0, -1)
        begun = next((size for size in sizes if tail.endswith(closing[:size])), 0)
        return closing[begun:]

    def _behind(self, token_id: int) -> _Place:
        phase, num_tokens, tail = self._places[-1]
        if phase is _Phase.BEHIND:
            return self._places[-1]
        tail += self._spelling.bytes_of(token_id)
        if phase is _Phase.BEFORE:
            opening = self._opening
            if tail.startswith(opening):
                return _Place(_Phase.WITHIN, 0, tail[len(opening) :])
            return _Place(phase if opening.startswith(tail) else _Phase.BEHIND, 0, tail)
        if self._closing in tail:
            return _Place(_Phase.BEHIND)
        return _Place(phase, num_tokens + 1, tail[-len(self._closing) :])
