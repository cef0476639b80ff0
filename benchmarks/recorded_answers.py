"""An instrument: a proposer of drafts that knows the answers, and is right as often as it is told.

Knows no model. Used by speculation.py and by the tests of equal answers.
"""

import random
from collections.abc import Mapping, Sequence

from duetto.runner.proposers.proposer import DraftRequest


class RecordedAnswers:
    """Proposes the tokens that follow in a plain run, each with a given probability, and another
    token else. What is wrong depends on the seed, the request and the position alone."""

    needs_hidden = False

    def __init__(
        self,
        texts: Mapping[str, Sequence[int]],
        accuracy: float,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        """`texts`: by request, prompt and answer. `accuracy`: the probability that a draft is
        right, if those before it are."""
        self._drafts = {
            request_id: _drafts(text, accuracy, vocab_size, f"{seed}/{request_id}")
            for request_id, text in texts.items()
        }

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        return [self._of(request) for request in requests]

    def _of(self, request: DraftRequest) -> tuple[int, ...]:
        start = request.start + len(request.token_ids)
        return self._drafts.get(request.request_id, ())[start : start + request.num_wanted]


def _drafts(text: Sequence[int], accuracy: float, vocab_size: int, seed: str) -> tuple[int, ...]:
    """The draft at each position. A text of one token alone cannot be got wrong."""
    rng = random.Random(seed)
    return tuple(
        [
            token
            if rng.random() < accuracy
            else (token + rng.randrange(1, vocab_size)) % vocab_size
            for token in text
        ]
    )
