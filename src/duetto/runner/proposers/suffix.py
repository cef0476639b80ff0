"""Drafts are what followed the last tokens in earlier answers of the same tenant, or in the
request itself, whichever match is longer.

The idea of SuffixDecoding (Oliaro et al., 2024, arXiv 2411.04975): the longest match, the most
frequent continuation, more drafts the longer the match. Pays where answers are alike: agents that
repeat themselves, extraction, the same question asked again. Nothing crosses from one tenant to
another, not even as a guess.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import count

from duetto.core.speculation import SuffixOptions
from duetto.runner.proposers.histories import Histories, TokenHistory
from duetto.runner.proposers.ngram import OwnText
from duetto.runner.proposers.proposer import DraftRequest
from duetto.runner.proposers.text_index import TextIndex, Writer

MIN_MATCH = 2
LEAD = 8  # last tokens of the prompt, that stand before the answer in the tenant's index
_MAX_TOKENS = 2**20  # of all tenants, and of all requests' own tokens: about 70 bytes each
_MAX_TENANT_TOKENS = 2**19
_MAX_TENANTS = 1024  # an index takes some kilobytes, however little is in it
_MAX_INDEXED = 2048  # in one call, as for ngram


class _Text(OwnText):
    """One request: its own text, and where its answer is written for later ones."""

    __slots__ = ("num_written", "writer", "written_in")

    def __init__(self, max_match: int) -> None:
        super().__init__(MIN_MATCH, max_match)
        self.writer = Writer()
        self.written_in = 0  # serial number of the answers that it belongs to
        self.num_written = 0


class _Answers:
    """The newest answers of one tenant."""

    def __init__(self, serial: int, max_match: int, max_requests: int) -> None:
        self.serial = serial  # from 1: a tenant that was forgotten begins with others
        self.index = TextIndex(MIN_MATCH, max_match, _MAX_TENANT_TOKENS)
        self._max_requests = max_requests
        self._first_nodes: deque[int] = deque()  # of the answers that are kept

    def begin(self) -> Writer:
        self._first_nodes.append(self.index.num_nodes)
        if len(self._first_nodes) > self._max_requests:
            self._first_nodes.popleft()
            self.index.floor = max(self.index.floor, self._first_nodes[0])
        return Writer()


class SuffixProposer:
    needs_hidden = False

    def __init__(self, options: SuffixOptions, max_requests: int) -> None:
        """`max_requests` that are remembered as running."""
        self._options = options
        max_match = max(MIN_MATCH, options.suffix_decoding_max_tree_depth // 2)
        self._max_match = max_match
        self._histories = Histories(lambda: _Text(max_match), max_requests, _MAX_TOKENS)
        self._tenants: OrderedDict[bytes, _Answers] = OrderedDict()
        self._serials = count(1)
        self.num_cached_tokens = 0  # of earlier answers, of all tenants

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        left = _MAX_INDEXED
        proposed = list[tuple[int, ...]]()
        for request in requests:
            history = self._histories.update(request)
            if history is None:
                proposed.append(())
                continue
            left -= history.state.catch_up(history.token_ids, left)
            answers = self._answers(request.tenant)
            if answers is not None:
                left -= self._write(answers, history, request.num_prompt_tokens, left)
            proposed.append(self._drafts(answers, history, request.num_wanted))
        self._evict()
        return proposed

    def _answers(self, tenant: bytes) -> _Answers | None:
        max_requests = self._options.suffix_decoding_max_cached_requests
        if not max_requests:
            return None
        if tenant not in self._tenants:
            self._tenants[tenant] = _Answers(next(self._serials), self._max_match, max_requests)
        self._tenants.move_to_end(tenant)
        return self._tenants[tenant]

    def _write(
        self, answers: _Answers, history: TokenHistory[_Text], num_prompt_tokens: int, most: int
    ) -> int:
        """Add what the answer has grown by. Its first token comes with the prompt's last ones, so
        that the beginning of an answer is found too."""
        text, token_ids = history.state, history.token_ids
        if len(token_ids) <= num_prompt_tokens:
            return 0
        num_before = answers.index.num_kept
        if text.written_in != answers.serial:
            text.writer, text.written_in = answers.begin(), answers.serial
            text.num_written = max(0, num_prompt_tokens - LEAD)
        new = token_ids[text.num_written : text.num_written + most]
        answers.index.append(text.writer, new)
        text.num_written += len(new)
        self.num_cached_tokens += answers.index.num_kept - num_before
        return len(new)

    def _drafts(
        self, answers: _Answers | None, history: TokenHistory[_Text], num_wanted: int
    ) -> tuple[int, ...]:
        text, token_ids = history.state, history.token_ids
        if not num_wanted:
            return ()
        own = text.index.find(token_ids) if text.num_indexed == len(token_ids) else None
        other = answers.index.find(token_ids) if answers is not None else None
        index, match = text.index, own
        if answers is not None and other is not None and (own is None or other.length > own.length):
            index, match = answers.index, other
        if match is None:
            return ()
        options = self._options
        most = min(
            num_wanted,
            int(options.suffix_decoding_max_spec_factor * match.length),
            options.suffix_decoding_max_tree_depth - match.length,
        )
        return index.follow(match, most, options.suffix_decoding_min_token_prob)

    def _evict(self) -> None:
        """Forget the tenants that asked least recently, but never the last one."""
        tenants = self._tenants
        while len(tenants) > _MAX_TENANTS or (
            len(tenants) > 1 and self.num_cached_tokens > _MAX_TOKENS
        ):
            _, forgotten = tenants.popitem(last=False)
            self.num_cached_tokens -= forgotten.index.num_kept
