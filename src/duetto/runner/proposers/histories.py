"""What a proposer remembers of each request: its tokens, and something made of them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from duetto.runner.proposers.proposer import DraftRequest

S = TypeVar("S")


class TokenHistory(Generic[S]):
    """The tokens of one request, and what a proposer made of them so far."""

    __slots__ = ("state", "token_ids")

    def __init__(self, token_ids: list[int], state: S) -> None:
        self.token_ids = token_ids
        self.state = state


class Histories(Generic[S]):
    """The histories of the requests that were asked for last, within bounds of their number and
    of their tokens together. Nobody says that a request has ended."""

    def __init__(self, new_state: Callable[[], S], max_requests: int, max_tokens: int) -> None:
        self._new_state = new_state
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._histories: OrderedDict[str, TokenHistory[S]] = OrderedDict()
        self.num_tokens = 0  # of all histories

    def __len__(self) -> int:
        return len(self._histories)

    def update(self, request: DraftRequest) -> TokenHistory[S] | None:
        """The request's history, which ends with the tokens that it brings; None if those before
        them are not known. The state is new where the tokens that were known have changed."""
        history = self._histories.pop(request.request_id, None)
        if history is not None:
            self.num_tokens -= len(history.token_ids)
        start, token_ids = request.start, request.token_ids
        if start and (history is None or start > len(history.token_ids)):
            return None
        if history is None:
            history = TokenHistory(list(token_ids), self._new_state())
        else:
            known = history.token_ids
            if known[start:] == list(token_ids[: len(known) - start]):
                known += token_ids[len(known) - start :]
            else:
                history = TokenHistory([*known[:start], *token_ids], self._new_state())
        self._keep(request.request_id, history)
        return history

    def _keep(self, request_id: str, history: TokenHistory[S]) -> None:
        self._histories[request_id] = history
        self.num_tokens += len(history.token_ids)
        while len(self._histories) > 1 and (
            len(self._histories) > self._max_requests or self.num_tokens > self._max_tokens
        ):
            _, oldest = self._histories.popitem(last=False)
            self.num_tokens -= len(oldest.token_ids)
