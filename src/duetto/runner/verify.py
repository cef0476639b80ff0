"""Which drafts are right: those that are the very tokens that the request would have sampled.

Each row is sampled as if it were the only one, with its own penalties, forbidden tokens and place
in the random stream. So what is sampled does not depend on what was proposed, at any temperature.
"""

from collections.abc import Sequence

from duetto.backends.backend import FloatArray
from duetto.core.batch import SampledToken, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.runner.sampler import RowConstraint, sample_token


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
    if not request.num_drafts:
        constraint = None if constraints is None else constraints[0]
        return (sample_token(logits[first], request.rows[0], constraint),)
    tokens: list[SampledToken] = []
    drafts = request.token_ids[len(request.token_ids) - request.num_drafts :]
    rows = logits[first : first + len(request.rows)]
    each = [None] * len(rows) if constraints is None else constraints
    for row, sampling, draft, constraint in zip(
        rows, request.rows, (*drafts, None), each, strict=False
    ):
        try:
            tokens.append(sample_token(row, sampling, constraint))
        except EngineError:
            if not tokens:
                raise
            break
        if tokens[-1].token_id != draft:
            break
    return tuple(tokens)
