"""What the last steps sampled: a step that was planned before their results were known asks for it.

One token for each request and step is all that the executor knows before the scheduler does.
"""

from collections import deque
from collections.abc import Sequence

from duetto.core.batch import PLACEHOLDER, RequestResult, ScheduledBatch, ScheduledRequest

# Of a request that has failed: the scheduler, which does not know it yet, drops what it gives.
NOBODYS_TOKEN = 0


class LastSteps:
    def __init__(self, depth: int) -> None:
        """`depth`: steps whose results may be on their way to the scheduler while the next one is
        submitted; none, and nothing is kept."""
        self._steps: deque[dict[str, RequestResult]] = deque(maxlen=depth)  # newest first

    def keep(self, batch: ScheduledBatch, results: Sequence[RequestResult]) -> None:
        each = zip(batch.requests, results, strict=True)
        self._steps.appendleft(
            {item.request_id: result for item, result in each if result.tokens or result.error}
        )

    def resolved(self, batch: ScheduledBatch) -> ScheduledBatch:
        """The batch with a token for each placeholder."""
        return ScheduledBatch(tuple([self.with_token(item) for item in batch.requests]))

    def with_token(self, item: ScheduledRequest) -> ScheduledRequest:
        """The request with a token for its placeholder, if it has one. Where no proposer has been
        sent that token yet, it is added to those that it is sent."""
        if item.token_ids[-1] != PLACEHOLDER:
            return item
        token_id = self._last_token(item.request_id)
        item = item._replace(token_ids=(*item.token_ids[:-1], token_id))
        drafting, position = item.drafting, item.end - 1
        if drafting is None or drafting.start + len(drafting.token_ids) != position:
            return item
        sent = (*drafting.token_ids, token_id)
        return item._replace(drafting=drafting._replace(token_ids=sent))

    def _last_token(self, request_id: str) -> int:
        for results in self._steps:
            result = results.get(request_id)
            if result is not None:
                return result.tokens[-1].token_id if result.tokens else NOBODYS_TOKEN
        raise AssertionError(f"no step has sampled a token of {request_id}")
