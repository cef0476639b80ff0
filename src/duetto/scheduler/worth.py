"""How many drafts are worth their time: the arithmetic, without state. Knows no requests.

Drafts of all requests are ranked by the probability that they are reached and right. That
probability never grows along a request's drafts, so the first n of the ranking are the best n, and
they are the first drafts of each request. The price of a step is not convex in n (a kernel takes
rows in tiles), so every n is looked at.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from duetto.core.shape import BatchShape

CHEAP = 1e-3  # of a step: not worth a thought


class DraftPrices(Protocol):
    """What steps and proposing take, as far as was learned."""

    def row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        """Seconds of the step with 0, 1, ... `num_more` drafts in addition; never less for more."""
        ...

    def hopeful_row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        """As `row_times`, but the least that sizes may take which were hardly measured."""
        ...

    def drafting_prices(self, method: str) -> tuple[float, float, float, float]:
        """Seconds per call, pass, draft and token sent; zeros while nothing is known."""
        ...

    def observe_drafting(self, work: Mapping[str, tuple[int, int, int]], seconds: float) -> None:
        """What proposing took in a step: by method its passes, drafts and tokens sent."""
        ...


class Choice(NamedTuple):
    num_slots: int  # the first so many
    rate: float  # tokens per second that this, or nothing, brings at best


class Slots(NamedTuple):
    """Drafts of some requests, best first; of one request the shallow ones come first."""

    chances: Sequence[float]  # that the draft is reached and right
    owners: Sequence[int]  # whose it is

    def within(self, limit: int) -> "Slots":
        """The first `limit` drafts of each request."""
        seen, kept = [0] * (max(self.owners, default=-1) + 1), list[int]()
        for i, owner in enumerate(self.owners):
            seen[owner] += 1
            if seen[owner] <= limit:
                kept.append(i)
        return Slots([self.chances[i] for i in kept], [self.owners[i] for i in kept])


def ranked(survivals: Sequence[Sequence[float]]) -> Slots:
    """The slots of all requests. Raises nothing; equal input gives equal order."""
    if len(survivals) == 1:
        return Slots(survivals[0], [0] * len(survivals[0]))
    chances, owners = list[float](), list[int]()
    for owner, line in enumerate(survivals):
        chances += line
        owners += [owner] * len(line)
    # Of equals the first stays first, so the order along a request's drafts stays.
    order = sorted(range(len(chances)), key=chances.__getitem__, reverse=True)
    return Slots([chances[i] for i in order], [owners[i] for i in order])


def counts_of(owners: Sequence[int], num_owners: int) -> list[int]:
    counts = [0] * num_owners
    for owner in owners:
        counts[owner] += 1
    return counts


def best_to_verify(
    chances: Sequence[float],
    extra_s: Sequence[float],
    num_streams: int,
    plain_s: float,
    drafting_s: float,
) -> Choice:
    """The drafts to verify of those that are there.

    `extra_s[n]` is the time that n drafts add to the step, `plain_s` what the streams' next tokens
    take, and `drafting_s` what it takes to make the next drafts. The rate of a policy that verifies
    n each step is (num_streams + expected accepted) / (plain_s + extra_s[n] + drafting_s), and
    without speculation num_streams / plain_s. The drafts at hand are paid for: those are verified
    that gain most against the best of these rates.
    """
    best_rate, tokens = num_streams / plain_s, float(num_streams)
    fixed_s = plain_s + drafting_s
    more_s = extra_s[1:]
    for chance, add_s in zip(chances, more_s, strict=False):
        tokens += chance
        rate = tokens / (fixed_s + add_s)
        if rate > best_rate:
            best_rate = rate
    best, best_gain, gain = 0, 0.0, 0.0
    for n, (chance, add_s) in enumerate(zip(chances, more_s, strict=False), 1):
        gain += chance
        net = gain - best_rate * add_s
        if net > best_gain:
            best, best_gain = n, net
    return Choice(best, best_rate)


class DraftingPrice(NamedTuple):
    """Seconds that one proposer takes for a step's drafts."""

    call_s: float = 0.0
    pass_s: float = 0.0  # for each draft of the request with most of them
    draft_s: float = 0.0  # for each draft
    sent_s: float = 0.0  # for each token that it is sent

    def seconds(self, num_passes: int, num_drafts: int, num_sent: int) -> float:
        each = self.pass_s * num_passes + self.draft_s * num_drafts + self.sent_s * num_sent
        return self.call_s + each


def best_to_ask(
    slots: Slots,
    extra_s: Sequence[float],
    num_streams: int,
    plain_s: float,
    price: DraftingPrice,
    fixed_s: float,
) -> tuple[Sequence[int], float]:
    """Whose drafts to ask for, and the rate (tokens per second) of asking for so many each step.

    As `best_to_verify`, but the drafts are not made yet: `fixed_s` is what asking at all takes
    besides what the number of drafts does. Each greatest depth is looked at, as a proposer that
    drafts for all requests at once takes one pass for each. None pay: no slots, and the plain rate.
    """
    best: Sequence[int] = ()
    best_rate, draft_s = num_streams / plain_s, price.draft_s
    deepest = max(counts_of(slots.owners, max(slots.owners, default=-1) + 1), default=0)
    is_dear = price.pass_s > CHEAP * plain_s
    limits = range(1, deepest + 1) if is_dear else (deepest,)
    more_s = extra_s[1:]
    for limit in limits:
        within = slots.within(limit) if limit < deepest else slots
        tokens, base_s = float(num_streams), plain_s + fixed_s + price.pass_s * limit
        count = 0
        for n, (chance, add_s) in enumerate(zip(within.chances, more_s, strict=False), 1):
            tokens += chance
            rate = tokens / (base_s + add_s + draft_s * n)
            if rate > best_rate:
                best_rate, count = rate, n
        if count:
            best = within.owners[:count]
    return best, best_rate
