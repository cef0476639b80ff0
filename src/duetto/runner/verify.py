"""Which drafts are right: those that are the very tokens that the request would have sampled.

Each row is sampled as if it were the only one, with its own penalties, forbidden tokens and place
in the random stream. So what is sampled does not depend on what was proposed, at any temperature.
"""

from collections.abc import Callable, Sequence

from duetto.backends.backend import FloatArray
from duetto.backends.device import NOT_FINITE
from duetto.core.batch import SampledToken, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.runner.sampler import RowConstraint, not_finite, sample_token


def verify(
    request: ScheduledRequest,
    logits: FloatArray,
    first: int = 0,
    constraints: Sequence[RowConstraint] | None = None,
) -> tuple[SampledToken, ...]:
    """The longest beginning of the drafts that is what its rows sample, and the token after it.

    From row `first` on, `logits` [rows, vocabulary] has those after the token before the drafts
    and after each of them, 1 + num_drafts. None is sampled after the first draft that is wrong.
    Raises EngineError if the first row leaves no token. If a later one does, the accepted drafts
    are returned alone: the request has them, computes the last of them once more, and that row then
    is its first. `constraints` are those of the first rows, at least one, where there is a grammar:
    rows without one are behind a draft that is wrong, or that ends the answer.
    """
    if not request.num_drafts:  # nearly always
        constraint = None if constraints is None else constraints[0]
        return (sample_token(logits[first], request.rows[0], constraint),)
    each = [None] * len(request.rows) if constraints is None else constraints

    def sampled(place: int) -> SampledToken:
        return sample_token(logits[first + place], request.rows[place], each[place])

    return _verified(request, min(len(request.rows), len(each)), sampled)


def verify_sampled(request: ScheduledRequest, token_ids: Sequence[int]) -> tuple[SampledToken, ...]:
    """As `verify`, of rows that a device has sampled: a token for each, or NOT_FINITE."""

    def sampled(place: int) -> SampledToken:
        if token_ids[place] == NOT_FINITE:
            raise not_finite()
        return SampledToken(token_ids[place])

    if not request.num_drafts:
        return (sampled(0),)
    return _verified(request, len(request.rows), sampled)


def _verified(
    request: ScheduledRequest, num_rows: int, sampled: Callable[[int], SampledToken]
) -> tuple[SampledToken, ...]:
    tokens: list[SampledToken] = []
    drafts = request.token_ids[len(request.token_ids) - request.num_drafts :]
    for place, draft in zip(range(num_rows), (*drafts, None), strict=False):
        try:
            tokens.append(sampled(place))
        except EngineError:
            if not tokens:
                raise
            break
        if tokens[-1].token_id != draft:
            break
    return tuple(tokens)
