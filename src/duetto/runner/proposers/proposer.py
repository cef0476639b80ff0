"""What proposes drafts: the protocol, and what crosses it.

A proposer guesses; the target's step that verifies its drafts decides. So nothing that a proposer
does can change an answer, and it may lose what it knows at any time.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from duetto.core.batch import SamplingInput


class DraftRequest(NamedTuple):
    """One request, as the proposer that is asked sees it after a step."""

    request_id: str
    num_wanted: int  # drafts, at most; 0: only keep up with the tokens
    start: int  # position of the first of token_ids; 0 is a new beginning
    token_ids: tuple[int, ...]  # tokens that were not sent before, those of this step among them
    num_prompt_tokens: int = 0  # positions from here on are the answer's
    tenant: bytes = b""
    block_table: tuple[int, ...] = ()  # of the target's KV: what it covers may be written
    sampling: SamplingInput | None = None  # of the first draft's place; None where none is wanted


class Proposer(Protocol):
    """Keeps what it needs of each request, in bounded memory.

    A request's tokens come in order, piece by piece. Where a piece does not begin where the last
    one ended, the tokens before its start are taken from what is known; if they are not known, the
    request gets no drafts, until it begins anew at 0.
    """

    needs_hidden: bool  # rows of the target's last layer; no step gives them yet

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[tuple[int, ...]]:
        """Drafts for each request, in order: the tokens that are to follow those it has."""
        ...
