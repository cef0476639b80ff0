"""Speculation in virtual time: a policy of drafts against a machine and proposers that are given.

Each of `batch` places runs one request after the other. Its true tokens are random; a proposer's
draft is the true one with a given probability. A step takes what the machine says, give or take
`spread`, and the learned price hears of it. Where the machine has neighbours, all steps take longer
for seconds at a time; what a policy is worth is then told by `quiet_s`, what its steps take without
noise. Standard library only; equal seeds give equal runs.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fakes import make_request

from duetto.core.request import Request
from duetto.core.shape import BatchShape, RequestShape, StepTime
from duetto.pricing.drafting import SpeculationPrices
from duetto.pricing.learned import LearnedStepTime
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, DraftPolicy, Planned

Machine = Callable[[int], float]  # seconds of a step of so many rows


def memory_bound(rows: int) -> float:
    """Weights are read in 10 ms, each row takes 0.6 ms of arithmetic, in tiles of four."""
    tiles = -(-rows // 4)
    return max(10e-3, tiles * 2.4e-3) + 0.1e-3 * rows


def compute_bound(rows: int) -> float:
    """Each row costs nearly as much as the first."""
    return 4e-3 + 3e-3 * rows


def with_cliff(rows: int) -> float:
    """A second row doubles the step, and three more are free."""
    return 5e-3 * (1 if rows == 1 else 2 + (rows - 2) // 4)


MEASURED = {1: 1.0, 2: 1.19, 3: 1.47, 4: 1.77, 5: 1.65, 6: 1.64, 7: 1.64, 8: 2.03, 9: 1.96} | {
    12: 2.24, 16: 2.97, 24: 4.4, 32: 5.6}  # fmt: skip


def server(rows: int) -> float:
    """As measured: a model of 1.2 B weights in int8 on two cores of an AVX2 server."""
    if rows > 32:
        return 60e-3 * (5.6 + 0.16 * (rows - 32))
    low = max(n for n in MEASURED if n <= rows)
    high = min(n for n in MEASURED if n >= rows)
    part = (rows - low) / max(1, high - low)
    return 60e-3 * (MEASURED[low] + part * (MEASURED[high] - MEASURED[low]))


MACHINES: dict[str, Machine] = {
    "memory": memory_bound,
    "compute": compute_bound,
    "cliff": with_cliff,
}


@dataclass(frozen=True)
class Proposer:
    accuracy: float | tuple[float, ...]  # of each draft, given that those before it are right
    call_s: float = 0.0
    pass_s: float = 0.0
    draft_s: float = 0.0
    sent_s: float = 0.0

    def at(self, position: int) -> float:
        if isinstance(self.accuracy, float):
            return self.accuracy
        return self.accuracy[min(position, len(self.accuracy) - 1)]

    def expected(self, num_drafts: int) -> float:
        """Drafts accepted of so many that are verified."""
        survival, total = 1.0, 0.0
        for position in range(num_drafts):
            survival *= self.at(position)
            total += survival
        return total


class Phases:
    """A machine with neighbours: for seconds at a time all steps take longer."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._left_s, self._factor = self._rng.expovariate(1 / QUIET_S), 1.0

    def factor(self, step_s: float) -> float:
        """Of a step that begins now and takes so long without neighbours."""
        while self._left_s <= 0:
            is_slow = self._factor == 1.0
            self._factor = self._rng.uniform(*SLOWER) if is_slow else 1.0
            self._left_s += self._rng.expovariate(1 / (SLOW_S if is_slow else QUIET_S))
        self._left_s -= step_s * self._factor
        return self._factor


QUIET_S, SLOW_S, SLOWER = 4.0, 3.0, (1.3, 1.6)
NGRAM = {"call_s": 3e-6, "draft_s": 1e-6, "sent_s": 5e-7}


@dataclass
class Place:
    """A request and what its proposer has of it."""

    request: Request
    drafts: tuple[int, ...] = ()
    method: str = ""
    num_sent: int = 0


@dataclass
class Totals:
    num_tokens: int = 0
    seconds: float = 0.0
    quiet_s: float = 0.0  # the same without noise
    num_expected: float = 0.0  # tokens, with as many drafts accepted as should be
    num_verified: int = 0
    num_accepted: int = 0
    by_method: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def quiet_rate(self) -> float:
        """Without luck."""
        return self.num_expected / self.quiet_s


class FixedDrafts:
    """Always `count` drafts of one method: to compare."""

    is_on = True

    def __init__(self, method: str, count: int) -> None:
        self._method, self._count = method, count

    def choose(self, candidates, shape, room, limit_s=None):  # type: ignore[no-untyped-def]
        return {c.request.request_id: min(self._count, len(c.drafts)) for c in candidates}

    def ask(self, planned):  # type: ignore[no-untyped-def]
        return {
            p.request.request_id: Ask(self._method, min(self._count, p.num_left))
            for p in planned
            if p.num_left > 0 and self._count
        }

    def learn(self, outcomes, drafting_s):  # type: ignore[no-untyped-def]
        pass

    def forget(self, request):  # type: ignore[no-untyped-def]
        pass


class World:
    def __init__(
        self,
        machine: Machine,
        proposers: Mapping[str, Proposer],
        batch: int,
        *,
        max_tokens: int = 200,
        prompt: int = 64,
        spread: float = 0.05,
        seed: int = 0,
        has_neighbours: bool = False,
        start: StepTime | None = None,
    ) -> None:
        self._machine, self._proposers = machine, proposers
        self._max_tokens, self._prompt, self._spread = max_tokens, prompt, spread
        self._rng = random.Random(seed)
        self._num_requests = 0
        self._phases = Phases(seed) if has_neighbours else None
        self.times = LearnedStepTime(start)
        self.prices = SpeculationPrices(self.times)
        self.places = [self._new(stagger=i) for i in range(batch)]

    def adaptive(self, most: int = 8) -> AdaptiveDrafts:
        return AdaptiveDrafts(dict.fromkeys(self._proposers, most), self.prices)

    def run(self, policy: DraftPolicy, num_steps: int) -> Totals:
        totals = Totals()
        for _ in range(num_steps):
            self._step(policy, totals)
        return totals

    def _new(self, stagger: int = 0) -> Place:
        self._num_requests += 1
        tokens = max(4, self._max_tokens - 13 * stagger % self._max_tokens)
        request = make_request(f"r{self._num_requests}", [1] * self._prompt, tokens)
        request.token_ids.append(1)  # the prompt is computed, and its first token sampled
        return Place(request)

    def _step(self, policy: DraftPolicy, totals: Totals) -> None:
        places = self.places
        shape = BatchShape(tuple([RequestShape(1, p.request.num_tokens - 1) for p in places]))
        candidates = [Candidate(p.request, p.drafts) for p in places if p.drafts]
        counts = policy.choose(candidates, shape, 10_000) if candidates else {}
        before = {p.request.request_id: p.request.num_tokens for p in places}
        planned = [
            Planned(p.request, _left(p), before[p.request.request_id] - p.num_sent) for p in places
        ]
        asks = policy.ask(planned)
        rows = len(places) + sum(counts.values())
        quiet_s = self._machine(rows)
        noise = self._rng.lognormvariate(0, self._spread)
        if self._phases is not None:
            noise *= self._phases.factor(quiet_s)
        step_s = quiet_s * noise
        outcomes = [self._compute(p, counts, asks, totals) for p in places]
        drafting_s = self._drafting_s(outcomes)
        wide = [
            RequestShape(1 + n, p.request.num_tokens, 1 + n)
            for p in places
            for n in [counts.get(p.request.request_id, 0)]
        ]
        self.times.observe(BatchShape(tuple(wide)), step_s)
        known = [
            o
            for o in outcomes
            if o.ask is not None
            or o.request.request_id in {c.request.request_id for c in candidates}
        ]
        if known:
            policy.learn(known, drafting_s)
        totals.seconds += step_s + drafting_s
        totals.quiet_s += quiet_s + drafting_s
        for index, place in enumerate(places):
            if place.request.num_output_tokens >= place.request.max_tokens:
                policy.forget(place.request)
                places[index] = self._new()

    def _compute(
        self, place: Place, counts: Mapping[str, int], asks: Mapping[str, Ask], totals: Totals
    ) -> DraftOutcome:
        request, name = place.request, place.request.request_id
        num_drafts, drafts = counts.get(name, 0), place.drafts
        assert num_drafts <= len(drafts)
        tokens: list[int] = []  # 1 is true and 2 is false
        for draft in drafts[:num_drafts]:
            tokens.append(1)
            if draft != 1:
                break
        else:
            tokens.append(1)
        request.token_ids += tokens
        totals.num_tokens += len(tokens)
        totals.num_expected += 1 + (
            self._proposers[place.method].expected(num_drafts) if num_drafts else 0
        )
        totals.num_verified += num_drafts
        totals.num_accepted += len(tokens) - 1
        ask = asks.get(name)
        num_sent = 0
        place.drafts = ()
        if ask is not None:
            if ask.method != place.method:
                place.method, place.num_sent = ask.method, 0
            num_sent = request.num_tokens - place.num_sent
            if ask.max_sent is not None:
                num_sent = min(num_sent, ask.max_sent)
            place.num_sent += num_sent
            proposer = self._proposers[ask.method]
            num_left = request.max_tokens - request.num_output_tokens - 1
            place.drafts = tuple(
                [
                    1 if self._rng.random() < proposer.at(i) else 2
                    for i in range(max(0, min(ask.num_wanted, num_left)))
                ]
            )
            totals.by_method[ask.method] = totals.by_method.get(ask.method, 0) + 1
        return DraftOutcome(request, num_drafts, tuple(tokens), ask, num_sent, len(place.drafts))

    def _drafting_s(self, outcomes: list[DraftOutcome]) -> float:
        seconds = 0.0
        for method, proposer in self._proposers.items():
            mine = [o for o in outcomes if o.ask is not None and o.ask.method == method]
            if mine:
                seconds += proposer.call_s
                seconds += proposer.pass_s * max([o.num_proposed for o in mine])
                seconds += proposer.draft_s * sum([o.num_proposed for o in mine])
                seconds += proposer.sent_s * sum([o.num_sent for o in mine])
        return seconds * self._rng.lognormvariate(0, self._spread)


def _left(place: Place) -> int:
    return max(0, place.request.max_tokens - place.request.num_output_tokens - 2)
