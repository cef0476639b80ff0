"""Asks the proposers after a step, and lets none of them do harm.

A proposer that raises, or proposes what is no draft, costs its drafts, never a request.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from duetto.core.batch import RequestResult, SamplingInput, ScheduledRequest
from duetto.runner.proposers.proposer import DraftRequest, Proposer

logger = logging.getLogger(__name__)


class Drafters:
    """The proposers of one engine, by method."""

    def __init__(self, proposers: Mapping[str, Proposer], vocab_size: int) -> None:
        self._proposers, self._vocab_size = dict(proposers), vocab_size
        self._logged: set[tuple[str, str]] = set()

    def propose(
        self, requests: Sequence[ScheduledRequest], results: Sequence[RequestResult]
    ) -> tuple[list[RequestResult], float]:
        """The results with the drafts that were asked for, and how long that took in seconds."""
        begin = time.perf_counter()
        drafted = list(results)
        by_method: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            if request.drafting is not None and results[place].error is None:
                by_method.setdefault(request.drafting.method, []).append(place)
        for method, places in by_method.items():
            asked = [_draft_request(requests[i], results[i]) for i in places]
            for place, drafts in zip(places, self._ask(method, asked), strict=True):
                if drafts:
                    drafted[place] = drafted[place]._replace(drafts=drafts)
        return drafted, time.perf_counter() - begin if by_method else 0.0

    def _ask(self, method: str, asked: list[DraftRequest]) -> list[tuple[int, ...]]:
        nothing: list[tuple[int, ...]] = [()] * len(asked)
        try:
            proposed = self._proposers[method].propose(asked)
            if len(proposed) != len(asked):
                raise ValueError(f"{len(proposed)} proposals for {len(asked)} requests")
            return [
                self._checked(method, request, drafts)
                for request, drafts in zip(asked, proposed, strict=True)
            ]
        except Exception as error:
            self._log(method, type(error).__name__, f"failed: {error!r:.200}")
            return nothing

    def _checked(self, method: str, request: DraftRequest, drafts: object) -> tuple[int, ...]:
        """The drafts, or nothing where some of them are none."""
        if not isinstance(drafts, tuple | list) or len(drafts) > request.num_wanted:
            self._log(method, "count", f"proposed other than {request.num_wanted} drafts or fewer")
            return ()
        if not all(type(each) is int and 0 <= each < self._vocab_size for each in drafts):
            self._log(method, "id", f"proposed an id outside the vocabulary of {self._vocab_size}")
            return ()
        return tuple(drafts)

    def _log(self, method: str, kind: str, what: str) -> None:
        if (method, kind) not in self._logged:
            self._logged.add((method, kind))
            logger.warning(
                "speculation: %s %s; its drafts are dropped, answers stay as they are (said once)",
                method,
                what,
            )


def _draft_request(request: ScheduledRequest, result: RequestResult) -> DraftRequest:
    """What the proposer is sent: the known tokens, then those that this step sampled."""
    drafting = request.drafting
    assert drafting is not None
    num_wanted, token_ids, sampling = drafting.num_wanted, drafting.token_ids, None
    known = request.end - request.num_drafts
    if result.tokens and drafting.start + len(token_ids) == known:
        sampled = tuple([token.token_id for token in result.tokens])
        token_ids += sampled
        sampling = advanced(request.rows[len(sampled) - 1], sampled[-1])
    else:
        num_wanted = 0  # what the drafts would follow is not known, or was not sent
    return DraftRequest(
        request_id=request.request_id,
        num_wanted=num_wanted,
        start=drafting.start,
        token_ids=token_ids,
        num_prompt_tokens=drafting.num_prompt_tokens,
        tenant=drafting.tenant,
        block_table=request.block_table,
        sampling=sampling,
    )


def advanced(sampling: SamplingInput, token_id: int) -> SamplingInput:
    """How the token after this one is sampled, as far as can be said without the scheduler.

    Bad words that the token makes possible are not known here: a draft may be one, and is then
    not accepted.
    """
    place = sampling.num_output_tokens + 1
    needs_history = sampling.params.needs_history
    return sampling._replace(
        num_output_tokens=place,
        forbidden_token_ids=(
            sampling.forbidden_token_ids if sampling.params.min_tokens > place else ()
        ),
        output_token_ids=(*sampling.output_token_ids, token_id) if needs_history else (),
    )
