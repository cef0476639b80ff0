"""How often a proposer's drafts are right, for one request: running estimates by position.

The estimate at a position is the probability that the draft there is right if those before it are.
By position, because the first draft of a suffix match is right less often than those after it. What
a request has shown counts beside what its tenant's requests have shown (the prior), that beside the
estimate of the position before, and the first position's beside 1/2. Old observations fade. Knows
no prices and no schedules.
"""

from collections.abc import Sequence

from duetto.core.speculation import MAX_DRAFTS

FIRST_GUESS = 0.5  # before anything is known
KEEP = 1 - 1 / 32  # of what a request has shown at a position, when it shows more there
POOL_KEEP = 1 - 1 / 256  # of what a tenant's requests have shown
WEIGHT = 6.0  # of a tenant's estimate, in observations of the request
POOL_WEIGHT = 2.0  # of the position before, in observations of the tenant
LEAST_SURVIVAL = 0.02  # drafts that are reached and right less often are not worth a thought


class Tally:
    """Faded counts of drafts that were right, and of all, by position."""

    __slots__ = ("_keep", "right", "seen")

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.right = [0.0] * MAX_DRAFTS
        self.seen = [0.0] * MAX_DRAFTS

    def add(self, position: int, is_right: bool) -> None:
        self.right[position] = self._keep * self.right[position] + is_right
        self.seen[position] = self._keep * self.seen[position] + 1.0


class Pool:
    """What the requests of one tenant have shown of one proposer."""

    __slots__ = ("_estimates", "_is_old", "_tally", "num_answered", "num_asked", "num_seen")

    def __init__(self) -> None:
        self._tally = Tally(POOL_KEEP)
        self.num_seen = 0
        self.num_asked = 1.0  # faded; how often it was asked, and had something to propose
        self.num_answered = 1.0
        self._estimates = [FIRST_GUESS] * MAX_DRAFTS
        self._is_old = False

    @property
    def estimates(self) -> Sequence[float]:
        """By position: that the draft there is right if those before it are."""
        if self._is_old:  # not with each of the drafts of a step
            self._is_old = False
            before, self._estimates = FIRST_GUESS, []
            for right, seen in zip(self._tally.right, self._tally.seen, strict=True):
                before = (right + POOL_WEIGHT * before) / (seen + POOL_WEIGHT)
                self._estimates.append(before)
        return self._estimates

    def add(self, position: int, is_right: bool) -> None:
        self._tally.add(position, is_right)
        self.num_seen += 1
        self._is_old = True

    def note_answer(self, has_drafts: bool) -> None:
        self.num_asked = POOL_KEEP * self.num_asked + 1.0
        self.num_answered = POOL_KEEP * self.num_answered + has_drafts


class Acceptance:
    """What is expected of one proposer's drafts for one request."""

    __slots__ = ("_is_old", "_survivals", "_tally", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._tally = Tally(KEEP)
        self._survivals: list[float] = []
        self._is_old = True

    @property
    def survivals(self) -> list[float]:
        """By position: that the draft is reached and is right. They never grow, and end where they
        are too small to matter."""
        if self._is_old:  # not before all of a step's drafts have been seen
            self._is_old = False
            self._renew()
        return self._survivals

    @property
    def answers(self) -> float:
        """How often the proposer has drafts when it is asked."""
        return self.pool.num_answered / self.pool.num_asked

    def observe(self, drafts: Sequence[int], tokens: Sequence[int]) -> int:
        """What was sampled where `drafts` were proposed, verified or not: as a draft is accepted if
        it is the token that is sampled, the first difference tells as much as a verification.
        Returns how many were right."""
        num_right = 0
        for position, (draft, token) in enumerate(zip(drafts, tokens, strict=False)):
            if position == MAX_DRAFTS:
                break
            is_right = draft == token
            self._tally.add(position, is_right)
            self.pool.add(position, is_right)
            num_right += is_right
            if not is_right:
                break
        self._is_old = True
        return num_right

    def _renew(self) -> None:
        right, seen = self._tally.right, self._tally.seen
        survival, survivals = 1.0, []
        for i, prior in enumerate(self.pool.estimates):
            survival *= (right[i] + WEIGHT * prior) / (seen[i] + WEIGHT)
            if survival < LEAST_SURVIVAL:
                break
            survivals.append(survival)
        self._survivals = survivals
