"""Drafts are what followed the last tokens where they stood before in prompt or answer.

Prompt lookup (Saxena, 2023) with the most frequent continuation instead of the first one. Pays
where text is copied or edited: answers from documents, code, JSON that is returned with a change.
"""

from collections.abc import Sequence

from duetto.core.speculation import NgramOptions
from duetto.runner.proposers.histories import Histories, TokenHistory
from duetto.runner.proposers.proposer import DraftRequest
from duetto.runner.proposers.text_index import TextIndex, Writer

_MAX_TOKENS = 2**20  # of all requests, about 100 bytes each
_MAX_INDEXED = 2048  # tokens in one call (some milliseconds): the streams of others are waiting


class OwnText:
    """An index over one request's own tokens, which may lag behind them."""

    __slots__ = ("_index", "_writer", "num_indexed")

    def __init__(self, min_match: int, max_match: int) -> None:
        self._index = TextIndex(min_match, max_match, _MAX_TOKENS)
        self._writer = Writer()
        self.num_indexed = 0

    def catch_up(self, token_ids: Sequence[int], most: int) -> int:
        """Add at most so many of the tokens that are missing. Returns how many were added."""
        new = token_ids[self.num_indexed : self.num_indexed + most]
        self._index.append(self._writer, new)
        self.num_indexed += len(new)
        return len(new)

    @property
    def index(self) -> TextIndex:
        return self._index


class NgramProposer:
    needs_hidden = False

    def __init__(self, options: NgramOptions, max_requests: int) -> None:
        """`max_requests` that are remembered at one time."""
        least, most = options.prompt_lookup_min, options.prompt_lookup_max
        self._histories = Histories(lambda: OwnText(least, most), max_requests, _MAX_TOKENS)

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        left = _MAX_INDEXED
        proposed = list[tuple[int, ...]]()
        for request in requests:
            history = self._histories.update(request)
            if history is None:
                proposed.append(())
                continue
            left -= history.state.catch_up(history.token_ids, left)
            proposed.append(_drafts(history, request.num_wanted))
        return proposed


def _drafts(history: TokenHistory[OwnText], num_wanted: int) -> tuple[int, ...]:
    own = history.state
    if not num_wanted or own.num_indexed < len(history.token_ids):
        return ()
    match = own.index.find(history.token_ids)
    return own.index.follow(match, num_wanted) if match is not None else ()
