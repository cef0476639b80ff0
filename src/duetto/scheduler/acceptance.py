"""How often a proposer's drafts are right, for one request: running estimates by position.

The estimate at a position is the probability that the draft there is right if those before it are.
By position, because the first draft of a suffix match is right less often than those after it. What
a request has shown counts beside what its tenant's requests have shown (the prior), that beside
what they have shown at the position before and at all positions, and that beside 1/2. Old
observations fade. Knows no prices and no schedules.
"""

from collections.abc import Sequence

from duetto.core.speculation import MAX_DRAFTS

FIRST_GUESS = 0.5  # before anything is known
KEEP = 1 - 1 / 32  # of what a request has shown at a position, when it shows more there
POOL_KEEP = 1 - 1 / 256  # of what a tenant's requests have shown
WEIGHT = 10.0  # of a tenant's estimate, in observations of the request
POOL_WEIGHT = 10.0  # of other positions, in observations of the tenant
GUESS_WEIGHT = 2.0  # of the first guess
LEAST_SURVIVAL = 0.02  # drafts that are reached and right less often are not worth a thought


class Tally:
    """Faded counts of drafts that were right, and of all, by position."""

    __slots__ = ("_keep", "right", "seen")

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.right = [0.0] * MAX_DRAFTS
        self.seen = [0.0] * MAX_DRAFTS

    def add(self, num_right: int, has_wrong: bool) -> None:
        """A chain: its first drafts were right, and the one after them was wrong, if there is."""
        keep, right, seen = self._keep, self.right, self.seen
        for i in range(num_right):
            right[i] = keep * right[i] + 1.0
            seen[i] = keep * seen[i] + 1.0
        if has_wrong:
            right[num_right] *= keep
            seen[num_right] = keep * seen[num_right] + 1.0


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
            tally, self._estimates = self._tally, []
            guess = GUESS_WEIGHT * FIRST_GUESS
            before = overall = (sum(tally.right) + guess) / (sum(tally.seen) + GUESS_WEIGHT)
            for right, seen in zip(tally.right, tally.seen, strict=True):
                prior = (before + overall) / 2
                before = (right + POOL_WEIGHT * prior) / (seen + POOL_WEIGHT)
                self._estimates.append(before)
        return self._estimates

    def add(self, num_right: int, has_wrong: bool) -> None:
        self._tally.add(num_right, has_wrong)
        self.num_seen += num_right + has_wrong
        self._is_old = True

    def note_answer(self, has_drafts: bool) -> None:
        self.num_asked = POOL_KEEP * self.num_asked + 1.0
        self.num_answered = POOL_KEEP * self.num_answered + has_drafts


class Acceptance:
    """What is expected of one proposer's drafts for one request."""

    __slots__ = ("_known", "_survivals", "_tally", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._tally = Tally(KEEP)
        self._survivals: list[float] = []
        self._known = 0  # positions that were looked at since the last observation

    def survivals(self, most: int = MAX_DRAFTS) -> list[float]:
        """By position: that the draft is reached and is right. They never grow, and end where they
        are too small to matter."""
        if self._known < most:  # not before all of a step's drafts have been seen
            self._known = most
            self._renew(most)
        survivals = self._survivals
        return survivals if len(survivals) <= most else survivals[:most]

    @property
    def answers(self) -> float:
        """How often the proposer has drafts when it is asked."""
        return self.pool.num_answered / self.pool.num_asked

    def observe(self, drafts: Sequence[int], tokens: Sequence[int]) -> int:
        """What was sampled where `drafts` were proposed, verified or not: as a draft is accepted if
        it is the token that is sampled, the first difference tells as much as a verification.
        Returns how many were right."""
        num_right, length = 0, min(len(drafts), len(tokens), MAX_DRAFTS)
        while num_right < length and drafts[num_right] == tokens[num_right]:
            num_right += 1
        self._tally.add(num_right, num_right < length)
        self.pool.add(num_right, num_right < length)
        self._known = 0
        return num_right

    def _renew(self, most: int) -> None:
        tally = self._tally
        priors, right, seen = self.pool.estimates[:most], tally.right, tally.seen
        survival, survivals = 1.0, list[float]()
        for prior, num_right, num_seen in zip(priors, right, seen, strict=False):
            survival *= (num_right + WEIGHT * prior) / (num_seen + WEIGHT)
            if survival < LEAST_SURVIVAL:
                break
            survivals.append(survival)
        self._survivals = survivals
