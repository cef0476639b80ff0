"""What may be spent on drafts that do not seem to pay: less than 1 % of the time.

Earned with time, spent on trials at their price, and given back by the drafts that are accepted.
So speculation that is of no use costs no more than that. Knows no requests and no clock.
"""

TRIAL_SHARE = 0.0075  # of the time, for trials
FIRST_ALLOWED = 2.0  # plain steps that it begins with
MOST_ALLOWED = 8.0  # plain steps that it may grow to, for a trial that takes long
MOST_OWED = 8.0  # plain steps that it may be below nothing while drafts promise much,
NUM_SEEN = 16  # and so many of them were seen
CLOSE = 1.2  # times the plain rate: what promises less does not promise much


class Allowance:
    """Seconds that were earned and not spent."""

    __slots__ = ("_is_first", "_num_seen", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_seen = 0  # drafts compared with what was sampled
        self._is_first = True

    def earn(self, plain_s: float, num_steps: int) -> None:
        """So many steps have passed, each of which takes `plain_s` without drafts."""
        if self._is_first:
            self._seconds, self._is_first = FIRST_ALLOWED * plain_s, False
        earned_s = TRIAL_SHARE * plain_s * num_steps
        self._seconds = min(self._seconds + earned_s, MOST_ALLOWED * plain_s)

    def spend(self, seconds: float) -> None:
        self._seconds -= seconds

    def give_back(self, seconds: float, num_compared: int) -> None:
        """Drafts of some requests were compared, and those accepted have saved so much."""
        self._num_seen += num_compared
        self._seconds += seconds

    def covers(self, seconds: float) -> bool:
        return seconds <= self._seconds

    def may_try(self, gain: float, plain_s: float) -> bool:
        """Whether drafts that promise `gain` times the plain rate may be tried. Where little is
        promised, what was spent must have come back: a price that is a little wrong must not cost
        for ever. What promises much and was seen may owe more."""
        owes = MOST_OWED * plain_s if gain >= CLOSE and self._num_seen >= NUM_SEEN else 0.0
        return self._seconds > -owes
