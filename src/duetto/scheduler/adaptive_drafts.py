"""As many drafts as pay: for each step those that bring most tokens per second.

What a step takes, and what proposing takes, are prices that are handed in and learn (pricing/). How
often drafts are right is estimated per request and proposer (acceptance.py); what follows for the
step is arithmetic (worth.py). Here is decided which of the drafts at hand a step verifies, and
learned what came of them; who is asked for more is in asking.py, and what may be lost by all of
that in allowance.py.
"""

from collections.abc import Iterable, Mapping, Sequence

from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.scheduler.acceptance import Pool
from duetto.scheduler.allowance import CLOSE, Allowance
from duetto.scheduler.asking import MOST_SLOTS, TRIAL_GAIN, Asker
from duetto.scheduler.drafted import DraftedRequests
from duetto.scheduler.drafts import NOTHING, Ask, Candidate, DraftOutcome, Planned
from duetto.scheduler.thinking import Thinking
from duetto.scheduler.worth import DraftPrices, best_to_verify, counts_of, ranked

NUM_PROVEN = 64  # drafts seen of a tenant, before which a step verifies no more than were seen
RECALL_EVERY = 16  # looks: where drafts bring little, a step without is taken now and then, so that
# what it takes is not forgotten


class AdaptiveDrafts:
    """A DraftPolicy for one or more proposers. State is bounded by the requests that live."""

    is_on = True

    def __init__(
        self,
        most_drafts: Mapping[str, int],
        prices: DraftPrices,
        thinking: Thinking | None = None,
    ) -> None:
        """`most_drafts`: by method, in the order of preference, the most drafts of a request.
        `thinking` learns what the policy takes itself. None: nothing."""
        assert most_drafts, "at least one proposer"
        self._prices = prices
        self._requests = DraftedRequests()
        self._allowance = Allowance()
        self._thinking = thinking or Thinking()
        self._asker = Asker(
            dict(most_drafts), prices, self._requests, self._allowance, self._thinking
        )

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        begun = self._thinking.clock()
        counts = self._choose(candidates, shape, room, limit_s)
        self._thinking.add(begun)
        return counts

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:
        return self._asker.ask(planned)

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        begun = self._thinking.clock()
        self._learn(outcomes, drafting_s)
        self._thinking.add(begun)

    def forget(self, request: Request) -> None:
        self._requests.forget(request)

    def _choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None,
    ) -> Mapping[str, int]:
        lines = self._lines(candidates)
        if self._asker.is_resting:
            return NOTHING
        slots = ranked(lines)
        most = min(len(slots.chances), room)
        if most <= 0:
            return NOTHING
        times = self._prices.row_times(shape, most)
        start_s = times[0]
        extra_s = [t - start_s for t in times if limit_s is None or t <= limit_s]
        if len(extra_s) < 2 or start_s <= 0.0:  # a price of nothing: no step was seen yet
            return NOTHING
        count = self._num_to_verify(slots.chances, shape, start_s, extra_s)
        if not count:
            return NOTHING
        counts = counts_of(slots.owners[:count], len(lines))
        return {c.request.request_id: n for c, n in zip(candidates, counts, strict=True) if n}

    def _learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        work: dict[str, tuple[int, int, int]] = {}
        num_compared = num_saved = 0
        has_right = False
        for outcome in outcomes:
            drafted = self._requests.find(outcome.request)
            if drafted is None:
                continue
            if drafted.drafts:
                num_compared += 1
                num_saved += len(outcome.tokens) - 1
                has_right = bool(drafted.compare(outcome.tokens)) or has_right
            ask = outcome.ask
            if ask is None:
                continue
            passes, drafts, sent = work.get(ask.method, (0, 0, 0))
            num_drafts = outcome.num_proposed
            work[ask.method] = max(passes, num_drafts), drafts + num_drafts, sent + outcome.num_sent
            if ask.num_wanted:
                self._requests.pool(drafted.tenant, ask.method).note_answer(num_drafts > 0)
        self._allowance.give_back(num_saved * self._asker.token_s, num_compared)
        if has_right:
            self._asker.wake()
        if work:
            self._prices.observe_drafting(work, drafting_s)

    def _lines(self, candidates: Sequence[Candidate]) -> list[Sequence[float]]:
        """For each request the probabilities that its drafts are reached and right."""
        lines, quota = list[Sequence[float]](), dict[Pool, int]()
        deepest = max(1, MOST_SLOTS // len(candidates))
        for request, drafts in candidates:
            drafted = self._requests.of(request)
            drafted.drafts = drafts
            method = drafted.asked or self._asker.method_of(drafted)
            acceptance = self._requests.acceptance(drafted, method)
            most, pool = min(len(drafts), deepest), acceptance.pool
            if pool.num_seen < NUM_PROVEN:
                most = min(most, quota.get(pool, 1 + pool.num_seen))
                quota[pool] = quota.get(pool, 1 + pool.num_seen) - most
            drafted.acceptance = acceptance
            survivals = acceptance.survivals(deepest)  # whom to ask needs as many
            lines.append(survivals if most >= len(survivals) else survivals[:most])
        return lines

    def _num_to_verify(
        self, chances: Sequence[float], shape: BatchShape, start_s: float, extra_s: Sequence[float]
    ) -> int:
        """Of the ranked drafts, `extra_s[n]` for n of them."""
        num_streams, plain_s = self._streams(shape, start_s)
        drafting_s = self._asker.drafting_s
        choice = best_to_verify(chances, extra_s, num_streams, plain_s, drafting_s)
        gain = choice.rate * plain_s / num_streams
        if gain < CLOSE and self._asker.num_looks % RECALL_EVERY == 0:
            return 0
        count = choice.num_slots
        if not self._allowance.may_try(gain, plain_s):
            count = 0
        if not count or self._asker.is_hopeful:
            untried = self._num_untried(chances, shape, extra_s, num_streams, choice.rate, count)
            count = untried or count
        self._allowance.spend(extra_s[count])  # what is accepted comes back
        return count

    def _streams(self, shape: BatchShape, start_s: float) -> tuple[int, float]:
        """How many next tokens the step has, and what they would take without its chunks: a chunk
        must not make drafts look cheap beside it."""
        requests = shape.requests
        if shape.num_tokens == len(requests):
            return len(requests), start_s
        alone = tuple([r for r in requests if r.num_new == 1])  # who has drafts is one of them
        return len(alone), self._prices.row_times(BatchShape(alone), 0)[0]

    def _num_untried(
        self,
        chances: Sequence[float],
        shape: BatchShape,
        extra_s: Sequence[float],
        num_streams: int,
        rate: float,
        count: int,
    ) -> int:
        """Drafts that do not seem to pay, or less than the best `count` do, but might pay more if
        their step took less than is thought. 0: there are none."""
        if not self._allowance.covers(0.0):
            return 0
        hopeful = self._prices.hopeful_row_times(shape, len(extra_s) - 1)
        best, gain = 0, 0.0
        best_net = sum(chances[:count]) - rate * extra_s[count] + TRIAL_GAIN * num_streams
        for n, chance in enumerate(chances[: len(extra_s) - 1], 1):
            gain += chance
            net = gain - rate * (hopeful[n] - hopeful[0])
            if net > best_net and self._allowance.covers(extra_s[n] - gain / rate):
                best, best_net = n, net
        return best
