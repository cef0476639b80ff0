"""As many drafts as pay: for each step those that bring most tokens per second.

What a step takes, and what proposing takes, are prices that are handed in and learn
(pricing/). How often drafts are right is estimated per request and proposer (acceptance.py); what
follows for the step is arithmetic (worth.py). Where nothing pays, a proposer is still asked now and
then for one draft, which is compared with the token that is sampled anyway: that costs no
verification. What such trials take, and steps of sizes that were never tried, is paid from an
allowance of less than 1 % of the time, so speculation that is of no use costs no more than that.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from duetto.core.request import Request
from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.acceptance import Acceptance, Pool
from duetto.scheduler.drafts import NO_ASKS, NOTHING, Ask, Candidate, DraftOutcome, Planned
from duetto.scheduler.worth import (
    CHEAP,
    DraftingPrice,
    Slot,
    best_to_ask,
    best_to_verify,
    counts_of,
    ranked,
)

TRIAL_SHARE = 0.0075  # of the time, for trials
FIRST_ALLOWED = 2.0  # plain steps that the allowance begins with
MOST_OWED = 8.0  # plain steps that it may be below nothing while drafts promise much,
NUM_SEEN = 16  # and so many of them were seen
MOST_ALLOWED = 8.0  # plain steps that the allowance may grow to, for a trial that takes long
TRIAL_GAIN = 0.05  # by which a step of an untried size must seem to pay
MAX_WAIT = 4  # looks between two trials for a request whose trials fail
NUM_PROVEN = 64  # drafts seen of a tenant, before which a step verifies no more than were seen
MAX_POOLS = 1024  # of tenants and proposers
MOST_SLOTS = 96  # drafts of all requests that are thought about
REST = 7  # steps between two looks at what pays, where nothing does: a look takes time too
REVIEW_EVERY = 16  # outcomes of a request between two choices of its proposer
MAX_LATE_SENT = 16  # tokens: with more to send, a draft's cost is spread over the drafts to come
CLOSE = 1.2  # where drafts bring less than this beside none, a step without is taken now and then
RECALL_EVERY = 16  # steps, so that what it takes is not forgotten
SPREAD = 64  # steps over which what must be sent first is earned back


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


class _Drafted:
    """What is known of one request's drafts."""

    __slots__ = (
        "acceptances",
        "asked",
        "drafted_by",
        "drafts",
        "method",
        "num_reviewed",
        "tenant",
        "trial_in",
        "wait",
    )

    def __init__(self, tenant: bytes, method: str) -> None:
        self.tenant = tenant
        self.method = method  # to be asked next
        self.asked = ""  # the method that was asked last
        self.drafted_by = method
        self.drafts: tuple[int, ...] = ()  # seen by `choose`, until the outcome is in
        self.acceptances: dict[str, Acceptance] = {}
        self.num_reviewed = 0
        self.wait = self.trial_in = 1  # looks until the next trial


class AdaptiveDrafts:
    """A DraftPolicy for one or more proposers. State is bounded by the requests that live."""

    is_on = True

    def __init__(self, most_drafts: Mapping[str, int], prices: DraftPrices) -> None:
        """`most_drafts`: by method, in the order of preference, the most drafts of a request."""
        assert most_drafts, "at least one proposer"
        self._most_drafts = dict(most_drafts)
        self._methods = tuple(most_drafts)
        self._prices = prices
        self._requests: dict[str, _Drafted] = {}
        self._pools: dict[tuple[bytes, str], Pool] = {}
        self._allowance_s = 0.0  # earned and not spent
        self._num_seen = 0  # drafts compared with what was sampled
        self._is_first = True
        self._rest = 0  # steps for which it is settled that nothing pays ...
        self._num_rested = 0  # ... and how many passed since the last look
        self._drafting_s = 0.0  # that the drafts at hand took, by the price
        self._token_s = 0.0  # what a step of next tokens took last, by the price
        self._num_streams = 1  # in that step
        self._turn = 0

    # --- the three questions of a step -----------------------------------------------------

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        lines, quota = [], dict[Pool, int]()
        deepest = max(1, MOST_SLOTS // len(candidates))
        for request, drafts in candidates:
            state = self._state(request)
            state.drafts, state.drafted_by = drafts, state.asked or state.method
            acceptance = self._acceptance(state, state.drafted_by)
            most, pool = min(len(drafts), deepest), acceptance.pool
            if pool.num_seen < NUM_PROVEN:
                most = min(most, quota.get(pool, 1 + pool.num_seen))
                quota[pool] = quota.get(pool, 1 + pool.num_seen) - most
            lines.append(acceptance.survivals[:most])
        if self._rest:  # nothing paid a moment ago
            return NOTHING
        slots = ranked(lines)
        most = min(len(slots), room)
        if most <= 0:
            return NOTHING
        times = self._prices.row_times(shape, most)
        start_s = times[0]
        extra_s = [t - start_s for t in times if limit_s is None or t <= limit_s]
        if len(extra_s) < 2 or start_s <= 0.0:  # a price of nothing: no step was seen yet
            return NOTHING
        num_streams, plain_s = self._streams(shape, start_s)
        choice = best_to_verify(slots, extra_s, num_streams, plain_s, self._drafting_s)
        is_close = choice.rate * plain_s < CLOSE * num_streams
        if is_close and self._turn % RECALL_EVERY == 0:
            return NOTHING
        may = self._may_spend(choice.rate * plain_s / num_streams, plain_s)
        count = choice.num_slots if may else 0
        self._allowance_s -= extra_s[count]
        count = count or self._untried(slots, shape, extra_s, num_streams, choice.rate)
        if not count:
            return NOTHING
        counts = counts_of(slots[:count], len(lines))
        return {c.request.request_id: n for c, n in zip(candidates, counts, strict=True) if n}

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        if self._rest:
            self._rest -= 1
            self._num_rested += 1
            return NO_ASKS
        streams = [self._known(each) for each in planned if each.num_left > 0]
        prompts = [each for each in planned if each.num_left <= 0]
        self._drafting_s = 0.0
        asks: dict[str, Ask] = {}
        if streams:
            self._ask_streams(streams, asks)
        for each in prompts:
            request = each.request
            if request.max_tokens - request.num_output_tokens > 2 and each.num_unsent:
                self._keep_up(each, len(streams) + 1, asks)
        for request_id, ask in asks.items():
            self._requests[request_id].asked = ask.method
        return asks or NO_ASKS

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        work: dict[str, tuple[int, int, int]] = {}
        for outcome in outcomes:
            state = self._requests.get(outcome.request.request_id)
            if state is None:
                continue
            if state.drafts:
                self._learn_drafts(state, outcome)
            ask = outcome.ask
            if ask is None:
                continue
            passes, drafts, sent = work.get(ask.method, (0, 0, 0))
            num_drafts = outcome.num_proposed
            work[ask.method] = max(passes, num_drafts), drafts + num_drafts, sent + outcome.num_sent
            if ask.num_wanted:
                self._pool(state.tenant, ask.method).note_answer(num_drafts > 0)
        if work:
            self._prices.observe_drafting(work, drafting_s)

    def forget(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)

    # --- what is verified ------------------------------------------------------------------

    def _streams(self, shape: BatchShape, start_s: float) -> tuple[int, float]:
        """How many next tokens the step has, and what they would take without its chunks: a chunk
        must not make drafts look cheap beside it."""
        requests = shape.requests
        if shape.num_tokens == len(requests):
            return len(requests), start_s
        alone = tuple([r for r in requests if r.num_new == 1])
        if not alone:
            return 1, start_s
        return len(alone), self._prices.row_times(BatchShape(alone), 0)[0]

    def _may_spend(self, gain: float, plain_s: float) -> bool:
        """Whether drafts that promise `gain` times the plain rate may be tried. Where little is
        promised, what was spent must have come back, but for the allowance: a price that is a
        little wrong must not cost for ever. What promises much and was seen may owe more."""
        owes = MOST_OWED * plain_s if gain >= CLOSE and self._num_seen >= NUM_SEEN else 0.0
        return self._allowance_s > -owes

    def _untried(
        self,
        slots: Sequence[Slot],
        shape: BatchShape,
        extra_s: Sequence[float],
        num_streams: int,
        rate: float,
    ) -> int:
        """Drafts that do not seem to pay, but might if their step took less than is thought."""
        hopeful = self._prices.hopeful_row_times(shape, len(extra_s) - 1)
        best, best_net, gain = 0, 0.0, 0.0
        for n, slot in enumerate(slots[: len(extra_s) - 1], 1):
            gain += slot[0]
            net = gain - rate * (hopeful[n] - hopeful[0])
            cost_s = extra_s[n] - gain / rate
            is_worth_it = net > TRIAL_GAIN * num_streams and cost_s <= self._allowance_s
            if is_worth_it and net > best_net:
                best, best_net = n, net
        self._allowance_s -= extra_s[best]  # what is accepted comes back
        return best

    # --- who is asked ----------------------------------------------------------------------

    def _ask_streams(self, streams: Sequence[Planned], asks: dict[str, Ask]) -> None:
        states = [self._state(each.request) for each in streams]
        lines, groups = [], dict[str, list[int]]()
        deepest = max(1, MOST_SLOTS // len(streams))
        for index, (each, state) in enumerate(zip(streams, states, strict=True)):
            survivals = self._acceptance(state, state.method).survivals
            most = min(each.num_left, self._most_drafts[state.method], deepest)
            lines.append(survivals[:most])
            groups.setdefault(state.method, []).append(index)
        most = sum([len(line) for line in lines])
        shape = BatchShape(tuple([RequestShape(1, each.request.num_tokens) for each in streams]))
        times = self._prices.row_times(shape, most)
        plain_s = self._token_s = times[0]
        self._num_streams = len(streams)
        if plain_s <= 0.0:
            return
        most_s = MOST_ALLOWED * plain_s
        if self._is_first:
            self._allowance_s, self._is_first = FIRST_ALLOWED * plain_s, False
        earned_s = TRIAL_SHARE * plain_s * (1 + self._num_rested)
        self._allowance_s, self._num_rested = min(self._allowance_s + earned_s, most_s), 0
        if most:
            extra_s = [t - plain_s for t in times]
            for method, members in groups.items():
                self._ask_group(method, members, streams, lines, extra_s, plain_s, asks)
                if method not in {ask.method for ask in asks.values()}:
                    self._ask_hopefully(method, members, streams, lines, shape, plain_s, asks)
        self._rest = 0 if asks else REST
        self._try(streams, states, asks, plain_s)

    def _ask_group(
        self,
        method: str,
        members: Sequence[int],
        streams: Sequence[Planned],
        lines: Sequence[Sequence[float]],
        extra_s: Sequence[float],
        plain_s: float,
        asks: dict[str, Ask],
    ) -> bool:
        """Ask one proposer for the drafts that pay, all requests of the step considered."""
        price = self._price_of(method)
        slots = ranked([lines[i] for i in members])
        sent = [streams[i].num_unsent for i in members]
        # What a request that begins late must have sent first is spread over the drafts to come.
        sent_tokens = sum([n if n <= MAX_LATE_SENT else n / SPREAD for n in sent])
        fixed_s = price.call_s + price.sent_s * sent_tokens
        chosen, rate = best_to_ask(slots, extra_s, len(streams), plain_s, price, fixed_s)
        if not chosen or not self._may_spend(rate * plain_s / len(streams), plain_s):
            return False
        starters = self._starters(members, streams, price)
        counts = [
            count if i in starters else 0
            for i, count in zip(members, counts_of(chosen, len(members)), strict=True)
        ]
        drafting_s = fixed_s + price.pass_s * max(counts) + price.draft_s * sum(counts)
        self._drafting_s += drafting_s
        self._allowance_s -= drafting_s
        for index, count in zip(members, counts, strict=True):
            if count:
                each = streams[index]
                asks[each.request.request_id] = self._asked(
                    method, count, each.num_unsent, price, plain_s, len(streams)
                )
        return True

    def _starters(
        self, members: Sequence[int], streams: Sequence[Planned], price: DraftingPrice
    ) -> Sequence[int]:
        """Those who may be asked for: of those whose proposer has much to read first, one more a
        step, so that what it brings is known before all have paid. Its price unknown: one."""
        late = [i for i in members if streams[i].num_unsent > MAX_LATE_SENT]
        if not any(price):
            return [min(members, key=lambda i: streams[i].num_unsent)]
        if len(late) < 2 or price.sent_s * MAX_LATE_SENT < CHEAP * self._token_s:
            return members
        first = min(late, key=lambda i: streams[i].num_unsent)
        return [i for i in members if i == first or streams[i].num_unsent <= MAX_LATE_SENT]

    def _ask_hopefully(
        self,
        method: str,
        members: Sequence[int],
        streams: Sequence[Planned],
        lines: Sequence[Sequence[float]],
        shape: BatchShape,
        plain_s: float,
        asks: dict[str, Ask],
    ) -> None:
        """As many drafts as would pay if steps of untried sizes took little, where the allowance
        covers their making."""
        most = sum([len(lines[i]) for i in members])
        times = self._prices.hopeful_row_times(shape, most)
        price = self._price_of(method)
        sent = sum([streams[i].num_unsent for i in members])
        if price.seconds(1, len(members), sent) > self._allowance_s:
            return
        before_s, asked = self._drafting_s, dict[str, Ask]()
        extra_s = [(1.0 + TRIAL_GAIN) * (t - times[0]) for t in times]
        if self._ask_group(method, members, streams, lines, extra_s, plain_s, asked):
            cost_s, self._drafting_s = self._drafting_s - before_s, before_s
            if self._allowance_s >= 0.0:
                asks.update(asked)
            else:
                self._allowance_s += cost_s

    def _asked(
        self,
        method: str,
        count: int,
        num_unsent: int,
        price: DraftingPrice,
        plain_s: float,
        num_streams: int,
    ) -> Ask:
        """An Ask that does not keep others waiting for longer than a step while a proposer reads
        what it has missed."""
        if num_unsent <= MAX_LATE_SENT or num_streams == 1 or not price.sent_s:
            return Ask(method, count)
        most = max(MAX_LATE_SENT, int(plain_s / price.sent_s))
        return Ask(method, count) if num_unsent <= most else Ask(method, 0, most)

    def _keep_up(self, each: Planned, num_streams: int, asks: dict[str, Ask]) -> None:
        """Let a proposer read a prompt beside the model, if drafts for it should pay."""
        state = self._state(each.request)
        method = state.method
        line = self._acceptance(state, method).survivals[: self._most_drafts[method]]
        request_shape = RequestShape(1, each.request.num_prompt_tokens)
        shape = BatchShape((request_shape,) * num_streams)
        times = self._prices.row_times(shape, len(line) * num_streams)
        price = self._price_of(method)
        fixed_s = price.call_s + price.sent_s * 2 * num_streams
        if times[0] <= 0.0:
            return
        extra_s = [t - times[0] for t in times]
        slots = ranked([line] * num_streams)
        chosen, _ = best_to_ask(slots, extra_s, num_streams, times[0], price, fixed_s)
        if chosen:
            asks[each.request.request_id] = Ask(method, 0)

    def _known(self, each: Planned) -> Planned:
        """A proposer that was not the last one has been sent nothing."""
        state = self._state(each.request)
        if state.asked in ("", state.method):
            return each
        return each._replace(num_unsent=each.request.num_tokens)

    def _try(
        self,
        streams: Sequence[Planned],
        states: Sequence[_Drafted],
        asks: dict[str, Ask],
        plain_s: float,
    ) -> None:
        """One draft for requests that have none coming, as far as the allowance goes. The turn
        moves on, so that each request has its chance."""
        size = len(streams)
        self._turn += 1
        for step in range(size):
            index = (self._turn + step) % size
            each, state = streams[index], states[index]
            if each.request.request_id in asks:
                continue
            state.trial_in -= 1
            if state.trial_in > 0:
                continue
            price = self._price_of(state.method)
            cost_s = price.seconds(1, 1, each.num_unsent)
            is_unknown = not any(price) and bool(asks)  # one request is enough to know the price
            if is_unknown or cost_s > self._allowance_s:
                state.trial_in = 1
                continue
            self._allowance_s -= cost_s
            asks[each.request.request_id] = self._asked(
                state.method, 1, each.num_unsent, price, plain_s, size
            )
            state.trial_in = state.wait

    # --- what is learned -------------------------------------------------------------------

    def _learn_drafts(self, state: _Drafted, outcome: DraftOutcome) -> None:
        self._allowance_s += (len(outcome.tokens) - 1) * self._token_s / self._num_streams
        acceptance = self._acceptance(state, state.drafted_by)
        num_right = acceptance.observe(state.drafts, outcome.tokens)
        self._num_seen += 1
        if num_right:
            self._rest = 0
        state.drafts = ()
        state.wait = 1 if num_right else min(2 * state.wait, MAX_WAIT)
        state.trial_in = min(state.trial_in, state.wait)
        state.num_reviewed += 1
        if len(self._methods) > 1 and state.num_reviewed % REVIEW_EVERY == 0:
            state.method = self._best_method(state)

    def _best_method(self, state: _Drafted) -> str:
        """The proposer that should bring most: tokens that it adds to a step, less what it takes to
        make them in next tokens. One that is new has the prior of all, 1/2, and so is tried soon
        if the others are worse than that."""
        if len(self._methods) == 1:
            return self._methods[0]

        def worth(method: str) -> float:
            acceptance = self._acceptance(state, method)
            survivals = acceptance.survivals[: self._most_drafts[method]]
            price, token_s = self._price_of(method), self._token_s
            best = gain = 0.0
            for count, survival in enumerate(survivals, 1):
                gain += survival
                cost = price.seconds(count, count, 2) / token_s if token_s else 0.0
                best = max(best, acceptance.answers * gain - cost)
            return best

        return max(self._methods, key=worth)

    def _price_of(self, method: str) -> DraftingPrice:
        return DraftingPrice(*self._prices.drafting_prices(method))

    # --- state -----------------------------------------------------------------------------

    def _state(self, request: Request) -> _Drafted:
        state = self._requests.get(request.request_id)
        if state is None:
            state = _Drafted(request.tenant, self._methods[0])
            self._requests[request.request_id] = state
            state.method = self._best_method(state)
        return state

    def _acceptance(self, state: _Drafted, method: str) -> Acceptance:
        found = state.acceptances.get(method)
        if found is None:
            found = state.acceptances[method] = Acceptance(self._pool(state.tenant, method))
        return found

    def _pool(self, tenant: bytes, method: str) -> Pool:
        """Made when first asked for; of very many tenants the oldest is forgotten."""
        pool = self._pools.pop((tenant, method), None) or Pool()
        self._pools[tenant, method] = pool
        if len(self._pools) > MAX_POOLS:
            del self._pools[next(iter(self._pools))]
        return pool
