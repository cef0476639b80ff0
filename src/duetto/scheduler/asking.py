"""Who is asked for drafts after a step, and for how many.

As many as pay, by the price of the next step with them and of their making. Where nothing pays, one
draft of a request now and then, from the allowance: it is compared with the token that is sampled
anyway, which costs no verification. Knows nothing of the drafts at hand.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.allowance import Allowance
from duetto.scheduler.drafted import Drafted, DraftedRequests
from duetto.scheduler.drafts import NO_ASKS, Ask, Planned
from duetto.scheduler.thinking import Thinking
from duetto.scheduler.worth import (
    CHEAP,
    DraftingPrice,
    DraftPrices,
    best_to_ask,
    counts_of,
    ranked,
)

EXPLORE_EVERY = 4  # looks between two at sizes that were not tried, while others pay, where there
MOST_CURIOUS = 4  # are no more streams: many have many sizes, which differ little, to be tried
TRIAL_GAIN = 0.05  # by which a step of an untried size must seem to pay
MOST_SLOTS = 96  # drafts of all requests that are thought about
REVIEW_EVERY = 16  # drafts of a request between two choices of its proposer
MAX_LATE_SENT = 16  # tokens: with more to send, a draft's cost is spread over the drafts to come
SPREAD = 64  # steps over which what must be sent first is earned back


class _Stream(NamedTuple):
    """A request whose next token may have drafts after it."""

    request_id: str
    drafted: Drafted
    method: str
    num_tokens: int
    num_unsent: int  # tokens that this proposer has not been sent
    survivals: Sequence[float]  # of the drafts that may be asked for


class _Group(NamedTuple):
    """The streams of a step that ask one proposer, of all `num_streams`."""

    method: str
    price: DraftingPrice
    streams: Sequence[_Stream]
    num_streams: int
    plain_s: float  # the next step without drafts

    @property
    def num_drafts(self) -> int:
        return sum([len(stream.survivals) for stream in self.streams])


class Asker:
    """Asked once a step. Its state is the last look at what pays, and how long it rests."""

    def __init__(
        self,
        most_drafts: Mapping[str, int],
        prices: DraftPrices,
        requests: DraftedRequests,
        allowance: Allowance,
        thinking: Thinking,
    ) -> None:
        """`most_drafts`: by method, in the order of preference, the most drafts of a request."""
        self._most_drafts = most_drafts
        self._methods = tuple(most_drafts)
        self._prices = prices
        self._requests = requests
        self._allowance = allowance
        self._thinking = thinking
        self._rest = 0  # steps for which it is settled that nothing pays ...
        self._num_rested = 0  # ... and how many passed since the last look
        self.drafting_s = 0.0  # that the drafts which were asked for take, by the price
        self.is_hopeful = False  # more were asked for than seem to pay, to see what they take
        self.num_looks = 0
        self._token_s = 0.0  # what a step of next tokens took at the last look, by the price
        self._num_streams = 1  # in that step

    @property
    def is_resting(self) -> bool:
        """Nothing paid a moment ago."""
        return self._rest > 0

    @property
    def token_s(self) -> float:
        """What a token took at the last look, without drafts."""
        return self._token_s / self._num_streams

    def wake(self) -> None:
        """A draft was right: look again."""
        self._rest = 0

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:
        if self._rest:
            self._rest -= 1
            self._num_rested += 1
            return NO_ASKS
        begun = self._thinking.clock()
        asks = self._look([*planned])
        self._thinking.end_look(begun)
        return asks

    def method_of(self, drafted: Drafted) -> str:
        """The proposer that the request asks: chosen when it is new, and again now and then."""
        is_due = len(self._methods) > 1 and drafted.num_learned >= REVIEW_EVERY
        if is_due or not drafted.method:
            drafted.method = self._best_method(drafted)
            drafted.num_learned = 0
        return drafted.method

    # --- streams ---------------------------------------------------------------------------

    def _look(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        asks: dict[str, Ask] = {}
        self.drafting_s, self.is_hopeful = 0.0, False
        going_on = [each for each in planned if each.num_left > 0]
        deepest = MOST_SLOTS // len(going_on) if going_on else 0
        streams = [self._stream(each, max(1, deepest)) for each in going_on]
        if streams:
            self._ask_streams(streams, asks)
        if len(streams) < len(planned):
            self._keep_up([p for p in planned if p.num_left <= 0], len(streams) + 1, asks)
        for stream in streams:
            if stream.request_id in asks:
                stream.drafted.asked = stream.method
        return asks or NO_ASKS

    def _stream(self, each: Planned, deepest: int) -> _Stream:
        request, drafted = each.request, self._requests.of(each.request)
        method = self.method_of(drafted)
        most = min(each.num_left, self._most_drafts[method], deepest)
        # A proposer that was not the last one to be asked has been sent nothing.
        is_last = drafted.asked in ("", method)
        num_unsent = each.num_unsent if is_last else request.num_tokens
        survivals = self._requests.acceptance(drafted, method).survivals(most)
        size = request.num_tokens
        return _Stream(request.request_id, drafted, method, size, num_unsent, survivals)

    def _ask_streams(self, streams: Sequence[_Stream], asks: dict[str, Ask]) -> None:
        mean = sum([stream.num_tokens for stream in streams]) // len(streams)
        shape = BatchShape((RequestShape(1, mean),) * len(streams))  # its context is all the same
        times = self._prices.row_times(shape, sum([len(s.survivals) for s in streams]))
        plain_s = self._token_s = times[0]
        self._num_streams = len(streams)
        if plain_s <= 0.0:  # no step was seen yet
            return
        self._allowance.earn(plain_s, 1 + self._num_rested)
        self._num_rested = 0
        groups = self._groups(streams, plain_s)
        if len(times) > 1:
            extra_s = [time_s - plain_s for time_s in times]
            for group in groups:
                asks.update(self._asked(group, extra_s, shape))
        self._rest = 0 if asks else self._thinking.rest(plain_s)
        self._try(streams, {group.method: group for group in groups}, asks)

    def _groups(self, streams: Sequence[_Stream], plain_s: float) -> list[_Group]:
        by_method: dict[str, list[_Stream]] = {}
        for stream in streams:
            by_method.setdefault(stream.method, []).append(stream)
        return [
            _Group(method, self._price_of(method), members, len(streams), plain_s)
            for method, members in by_method.items()
        ]

    def _asked(self, group: _Group, extra_s: Sequence[float], shape: BatchShape) -> dict[str, Ask]:
        """Ask one proposer for the drafts that pay, all requests of the step considered; now and
        then, or if none pay, for as many as would pay if steps of untried sizes took little."""
        price, streams = group.price, group.streams
        # What a request that begins late must have sent first is spread over the drafts to come.
        sent = [n if (n := s.num_unsent) <= MAX_LATE_SENT else n / SPREAD for s in streams]
        fixed_s = price.call_s + price.sent_s * sum(sent)
        slots = ranked([stream.survivals for stream in streams])
        plain_s, num_streams = group.plain_s, group.num_streams
        chosen, rate = best_to_ask(slots, extra_s, num_streams, plain_s, price, fixed_s)
        if chosen and not self._allowance.may_try(rate * plain_s / num_streams, plain_s):
            chosen, rate = (), num_streams / plain_s
        is_curious = num_streams <= MOST_CURIOUS and self.num_looks % EXPLORE_EVERY == 0
        if (not chosen or is_curious) and self._may_explore(group):
            times = self._prices.hopeful_row_times(shape, len(extra_s) - 1)
            hopeful_s = [(1.0 + TRIAL_GAIN) * (time_s - times[0]) for time_s in times]
            hoped = best_to_ask(slots, hopeful_s, num_streams, plain_s, price, fixed_s)
            counts = counts_of(hoped[0], len(streams))
            cost_s = fixed_s + price.pass_s * max(counts) + price.draft_s * sum(counts)
            seems_better = hoped[1] > (1.0 + TRIAL_GAIN) * rate and len(hoped[0]) != len(chosen)
            if seems_better and self._allowance.covers(cost_s):
                return self._asked_for(group, hoped[0], fixed_s, is_hopeful=True)
        return self._asked_for(group, chosen, fixed_s) if chosen else {}

    def _asked_for(
        self, group: _Group, owners: Sequence[int], fixed_s: float, *, is_hopeful: bool = False
    ) -> dict[str, Ask]:
        price, streams = group.price, group.streams
        counts, waiting = counts_of(owners, len(streams)), _waiting(group)
        is_cheap = price.pass_s + price.draft_s * len(streams) < CHEAP * group.plain_s
        if is_cheap and group.num_streams <= MOST_CURIOUS:
            # One more says what would come of one more, also if it is not verified.
            counts = [
                count + (0 < count < len(stream.survivals))
                for stream, count in zip(streams, counts, strict=True)
            ]
        wanted = [
            (stream, count)
            for stream, count in zip(streams, counts, strict=True)
            if count and stream.request_id not in waiting
        ]
        num_passes = max([count for _, count in wanted], default=0)
        drafting_s = price.seconds(num_passes, sum([count for _, count in wanted]), 0)
        drafting_s += fixed_s - price.call_s
        self._allowance.spend(drafting_s)
        if is_hopeful:
            self.is_hopeful = True
        else:
            self.drafting_s += drafting_s
        return {stream.request_id: _ask(group, stream, count) for stream, count in wanted}

    def _may_explore(self, group: _Group) -> bool:
        """Whether the allowance covers the making of a few drafts."""
        sent = sum([stream.num_unsent for stream in group.streams])
        return self._allowance.covers(group.price.seconds(1, len(group.streams), sent))

    def _try(
        self, streams: Sequence[_Stream], groups: Mapping[str, _Group], asks: dict[str, Ask]
    ) -> None:
        """One draft for requests that have none coming, as far as the allowance goes. The turn
        moves on, so that each request has its chance."""
        self.num_looks += 1
        if len(asks) == len(streams):
            return
        first = self.num_looks % len(streams)
        for stream in (*streams[first:], *streams[:first]):
            if stream.request_id in asks:
                continue
            drafted = stream.drafted
            drafted.trial_in -= 1
            if drafted.trial_in > 0:
                continue
            group = groups[stream.method]
            cost_s = group.price.seconds(1, 1, stream.num_unsent)
            # One request is enough to know a price.
            is_unknown = not any(group.price) and bool(asks)
            if is_unknown or not self._allowance.covers(cost_s):
                drafted.trial_in = 1
                continue
            self._allowance.spend(cost_s)
            asks[stream.request_id] = _ask(group, stream, 1)
            drafted.trial_in = drafted.wait

    # --- prompts ---------------------------------------------------------------------------

    def _keep_up(self, prompts: Sequence[Planned], num_streams: int, asks: dict[str, Ask]) -> None:
        """Let proposers read prompts beside the model, where drafts for them should pay."""
        for request, _, num_unsent in prompts:
            if not num_unsent or request.max_tokens - request.num_output_tokens <= 2:
                continue
            drafted = self._requests.of(request)
            method = self.method_of(drafted)
            line = self._requests.acceptance(drafted, method).survivals(self._most_drafts[method])
            shape = BatchShape((RequestShape(1, request.num_prompt_tokens),) * num_streams)
            times = self._prices.row_times(shape, len(line) * num_streams)
            if times[0] <= 0.0:
                continue
            price = self._price_of(method)
            fixed_s = price.call_s + price.sent_s * 2 * num_streams
            extra_s = [t - times[0] for t in times]
            slots = ranked([line] * num_streams)
            if best_to_ask(slots, extra_s, num_streams, times[0], price, fixed_s)[0]:
                asks[request.request_id] = Ask(method, 0)
                drafted.asked = method

    # --- proposers -------------------------------------------------------------------------

    def _best_method(self, drafted: Drafted) -> str:
        """The proposer that should bring most: tokens that it adds to a step, less what it takes to
        make them in next tokens. One that is new has the prior of all, 1/2, and so is tried soon
        if the others are worse than that."""
        if len(self._methods) == 1:
            return self._methods[0]

        def worth(method: str) -> float:
            acceptance = self._requests.acceptance(drafted, method)
            survivals = acceptance.survivals(self._most_drafts[method])
            price, token_s = self._price_of(method), self._token_s
            best = gain = 0.0
            for count, survival in enumerate(survivals, 1):
                gain += survival
                cost = price.seconds(count, count, 2) / token_s if token_s else 0.0
                best = max(best, acceptance.answers * gain - cost)
            return best

        return max(self._methods, key=worth)

    def _price_of(self, method: str) -> DraftingPrice:
        """What it takes to decide about drafts is part of what a call takes."""
        call_s, *others = self._prices.drafting_prices(method)
        if not call_s and not any(others):  # nothing is known of it
            return DraftingPrice()
        return DraftingPrice(call_s + self._thinking.look_s, *others)


def _waiting(group: _Group) -> set[str]:
    """Of those whose proposer has much to read first one more starts in a step, so that what it
    brings is known before all have paid: the others. Its price unknown: one starts in all."""
    late = group.streams
    if any(group.price):
        late = [stream for stream in group.streams if stream.num_unsent > MAX_LATE_SENT]
        if len(late) < 2 or group.price.sent_s * MAX_LATE_SENT < CHEAP * group.plain_s:
            return set()
    first = min(late, key=lambda stream: stream.num_unsent)
    return {stream.request_id for stream in late if stream is not first}


def _ask(group: _Group, stream: _Stream, count: int) -> Ask:
    """Does not keep others waiting for longer than a step while a proposer reads what it has
    missed."""
    num_unsent, sent_s = stream.num_unsent, group.price.sent_s
    if num_unsent <= MAX_LATE_SENT or group.num_streams == 1 or not sent_s:
        return Ask(group.method, count)
    most = max(MAX_LATE_SENT, int(group.plain_s / sent_s))
    return Ask(group.method, count) if num_unsent <= most else Ask(group.method, 0, most)
