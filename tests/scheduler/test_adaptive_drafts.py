"""As many drafts as pay, in virtual time: never much below none, near the best fixed number."""

from collections.abc import Callable

import pytest
from fakes import make_request
from scheduler.draft_world import MACHINES, NGRAM, FixedDrafts, Proposer, World, server

from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, NoDrafts, Planned
from duetto.scheduler.thinking import Thinking, no_time
from duetto.scheduler.worth import DraftingPrice

DRAFT_MODEL = {"call_s": 2e-4, "pass_s": 1e-3, "draft_s": 1e-4, "sent_s": 1e-4}
SERVER_DRAFT = {"call_s": 2e-3, "pass_s": 5e-3, "draft_s": 5e-4, "sent_s": 6e-4}
STEPS = 200


def plain_rate(machine: str, proposer: Proposer, batch: int) -> float:
    return World(MACHINES[machine], {"d": proposer}, batch).run(NoDrafts(), STEPS).rate


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", [NGRAM, DRAFT_MODEL], ids=["ngram", "draft model"])
def test_drafts_that_are_always_wrong_cost_next_to_nothing(
    machine: str, batch: int, kind: dict[str, float]
) -> None:
    proposer = Proposer(0.0, **kind)
    world = World(MACHINES[machine], {"d": proposer}, batch)
    policy, plain = world.adaptive(), plain_rate(machine, proposer, batch)
    assert world.run(policy, STEPS).rate > 0.96 * plain  # it learns, once
    assert world.run(policy, STEPS).rate > 0.98 * plain


@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize(("machine", "batch"), [("memory", 32), ("compute", 4), ("compute", 16)])
def test_where_no_drafts_pay_few_are_tried(machine: str, batch: int, accuracy: float) -> None:
    proposer = Proposer(accuracy, **NGRAM)
    world = World(MACHINES[machine], {"d": proposer}, batch)
    policy, plain = world.adaptive(), plain_rate(machine, proposer, batch)
    world.run(policy, 2 * STEPS)
    assert world.run(policy, STEPS).rate > 0.96 * plain


@pytest.mark.parametrize("accuracy", [0.6, 0.8, 0.9])
@pytest.mark.parametrize(("kind", "batch"), [(NGRAM, 1), (NGRAM, 2), (NGRAM, 4), (DRAFT_MODEL, 1)])
def test_it_is_near_the_best_fixed_number(
    kind: dict[str, float], batch: int, accuracy: float
) -> None:
    def world() -> World:
        return World(MACHINES["memory"], {"d": Proposer(accuracy, **kind)}, batch)

    best = max(world().run(FixedDrafts("d", k), STEPS).quiet_rate for k in (1, 2, 3, 4, 6, 8))
    own = world()
    policy = own.adaptive()
    own.run(policy, STEPS)
    assert own.run(policy, 2 * STEPS).quiet_rate > 0.93 * best


def noisy_server(accuracy: float, batch: int, seed: int, kind: dict[str, float]) -> World:
    """Short answers on a machine with neighbours, with prices as measured."""
    proposer = Proposer(accuracy, **kind)
    return World(
        server, {"d": proposer}, batch, max_tokens=60, spread=0.08, seed=seed, has_neighbours=True
    )


@pytest.mark.parametrize(("batch", "accuracy"), [(1, 0.6), (1, 0.8), (1, 0.9), (2, 0.8)])
def test_on_a_noisy_machine_it_is_soon_near_the_best_fixed_number(
    batch: int, accuracy: float
) -> None:
    def rate_of(count: int) -> float:
        return noisy_server(accuracy, batch, 0, NGRAM).run(FixedDrafts("d", count), 100).quiet_rate

    best = max(map(rate_of, (1, 2, 3, 4, 5, 6, 8)))
    reached = []
    for seed in range(3):
        world = noisy_server(accuracy, batch, seed, NGRAM)
        policy = world.adaptive()
        world.run(policy, 20)
        reached.append(world.run(policy, 150).quiet_rate / best)
    assert sum(reached) / len(reached) > 0.92 and min(reached) > 0.87


@pytest.mark.parametrize("batch", [1, 2, 8, 16])
@pytest.mark.parametrize("kind", [NGRAM, SERVER_DRAFT], ids=["ngram", "draft model"])
def test_on_a_noisy_machine_drafts_that_are_always_wrong_cost_next_to_nothing(
    batch: int, kind: dict[str, float]
) -> None:
    world = noisy_server(0.0, batch, 0, kind)
    policy, plain = world.adaptive(), batch / server(batch)
    world.run(policy, STEPS)
    assert world.run(policy, 2 * STEPS).quiet_rate > 0.98 * plain


def test_of_two_proposers_the_one_that_pays_is_asked() -> None:
    proposers = {"bad": Proposer(0.05, **NGRAM), "good": Proposer(0.85, **NGRAM)}
    world = World(MACHINES["memory"], proposers, 2)
    policy = world.adaptive()
    world.run(policy, STEPS)
    asked = world.run(policy, STEPS).by_method
    assert asked.get("good", 0) > 5 * asked.get("bad", 0)


class Prices:
    """A step of one row takes a second, each more `row_s`."""

    def __init__(self, row_s: float = 0.0) -> None:
        self.row_s = row_s

    def row_times(self, shape: BatchShape, num_more: int) -> list[float]:
        first = 1.0 + self.row_s * (shape.num_tokens - 1)
        return [first + self.row_s * n for n in range(num_more + 1)]

    hopeful_row_times = row_times

    def drafting_prices(self, method: str) -> tuple[float, float, float, float]:
        return 1e-6, 0.0, 0.0, 0.0

    def observe_drafting(self, work: object, seconds: float) -> None:
        pass


def proven(
    prices: Prices, num_requests: int = 1, clock: Callable[[], float] = no_time
) -> tuple[AdaptiveDrafts, list[Candidate]]:
    """A policy that has seen good drafts, and requests that have eight each."""
    policy = AdaptiveDrafts({"d": 8}, prices, Thinking(clock))
    made = [make_request(f"r{i}", max_tokens=1000) for i in range(num_requests)]
    candidates = [Candidate(request, (1,) * 8) for request in made]
    shape = BatchShape((RequestShape(1, 10),) * num_requests)
    for _ in range(100):
        policy.choose(candidates, shape, 100)
        policy.learn([DraftOutcome(request, 8, (1,) * 9) for request in made], 0.0)
        policy.ask([Planned(request, 8, 1) for request in made])
    return policy, candidates


def test_there_is_never_more_than_room_for() -> None:
    policy, candidates = proven(Prices(), 3)
    shape = BatchShape((RequestShape(1, 10),) * 3)
    for room in range(30):
        chosen = policy.choose(candidates, shape, room)
        assert sum(chosen.values()) == min(room, 24) and all(n <= 8 for n in chosen.values())


def test_a_step_with_drafts_ends_in_time() -> None:
    policy, candidates = proven(Prices(0.01))
    shape = BatchShape((RequestShape(1, 10),))
    assert policy.choose(candidates, shape, 8, None) == {"r0": 8}
    assert policy.choose(candidates, shape, 8, 1.035) == {"r0": 3}
    assert not policy.choose(candidates, shape, 8, 1.0)


def test_a_chunk_does_not_make_drafts_cheap() -> None:
    """Where a row costs more than a next token brings, it does so beside a chunk too."""
    prices = Prices()
    policy, candidates = proven(prices)
    prices.row_s = 1.2
    alone = BatchShape((RequestShape(1, 10),))
    beside = BatchShape((RequestShape(1, 10), RequestShape(99, 0, 0)))
    assert policy.choose(candidates, beside, 8) == policy.choose(candidates, alone, 8) == {}


def test_nothing_is_asked_for_that_is_of_no_use() -> None:
    policy, candidates = proven(Prices())
    request = candidates[0].request
    assert policy.ask([Planned(request, 3, 1)])["r0"].num_wanted == 3
    ending = make_request("end", max_tokens=2)
    assert not policy.ask([Planned(ending, 0, 4)])


def test_a_proposer_reads_a_prompt_beside_the_model_where_drafts_should_pay() -> None:
    """So that it has read it when the first token is there."""
    prices = Prices()
    policy, _ = proven(prices)
    prompt = make_request("prompt", (1,) * 50, 9)
    assert policy.ask([Planned(prompt, 0, 20)]) == {"prompt": Ask("d", 0)}
    assert not policy.ask([Planned(prompt, 0, 0)])  # it has read all that there is
    prices.row_s = 10.0
    assert not policy.ask([Planned(prompt, 0, 20)])


def test_what_is_hoped_for_costs_no_more_than_is_allowed() -> None:
    """Nothing pays as far as is known, and all would if steps of untried sizes took no longer."""

    class Hopes(Prices):
        draft_s = 0.0

        def hopeful_row_times(self, shape: BatchShape, num_more: int) -> list[float]:
            return [1.0] * (num_more + 1)

        def drafting_prices(self, method: str) -> tuple[float, float, float, float]:
            return 1e-6, 0.0, self.draft_s, 0.0

    prices = Hopes()
    policy, candidates = proven(prices)  # eight steps' time is allowed now, and that is the most
    prices.row_s, prices.draft_s = 10.0, 0.6
    asks = [policy.ask([Planned(candidates[0].request, 8, 1)]) for _ in range(3)]
    assert asks == [{"r0": Ask("d", 8)}, {"r0": Ask("d", 1)}, {}]  # 4.8 s, not twice; then a trial


def test_before_any_price_is_known_nothing_is_tried() -> None:
    class Unknown(Prices):
        def row_times(self, shape: BatchShape, num_more: int) -> list[float]:
            return [0.0] * (num_more + 1)

    policy = AdaptiveDrafts({"d": 8}, Unknown())
    request = make_request()
    assert not policy.choose([Candidate(request, (1,))], BatchShape((RequestShape(1, 1),)), 8)
    assert not policy.ask([Planned(request, 2, 3), Planned(make_request("prompt"), 0, 3)])


def test_what_has_ended_is_forgotten() -> None:
    policy, candidates = proven(Prices(), 4)
    for candidate in candidates:
        policy.forget(candidate.request)
        policy.forget(candidate.request)
    assert not policy._requests
    policy.learn([DraftOutcome(candidates[0].request, 1, (1, 1))], 0.0)
    assert not policy._requests


def test_a_price_is_the_sum_of_its_parts() -> None:
    assert DraftingPrice(1.0, 2.0, 3.0, 4.0).seconds(5, 6, 7) == 1 + 10 + 18 + 28


class Clock:
    """Each time that it is read, `tick_s` have passed."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s, self.now = tick_s, 0.0

    def __call__(self) -> float:
        self.now += self.tick_s
        return self.now


def looks(tick_s: float, num_steps: int = 2000) -> int:
    """How often the policy looks at what pays, where nothing does; a step takes a second."""
    policy = AdaptiveDrafts({"d": 8}, Prices(2.0), Thinking(Clock(tick_s)))
    request = make_request("r", max_tokens=10_000)
    num_looks = 0
    for _ in range(num_steps):
        seen: list[Planned] = []
        asks = policy.ask(seen.append(p) or p for p in [Planned(request, 8, 1)])  # type: ignore[func-returns-value]
        num_looks += len(seen)
        if asks:
            policy.choose([Candidate(request, (1,))], BatchShape((RequestShape(1, 9),)), 8)
            policy.learn([DraftOutcome(request, 0, (2,), asks["r"], 1, 1)], 1e-6)
    return num_looks


def test_looking_at_what_pays_takes_a_small_part_of_the_time() -> None:
    """However short a step is beside it: a look costs the same for a small model."""
    assert looks(0.0) == 250  # every eighth
    for tick_s in (1e-3, 0.02, 0.1):
        assert looks(tick_s) * tick_s < 0.01 * 2000 or looks(tick_s) < 12, tick_s
    assert looks(1.0) >= 7  # and yet it goes on looking


def test_drafts_must_bring_what_deciding_about_them_takes() -> None:
    def asked(tick_s: float) -> int:
        policy, candidates = proven(Prices(0.5), clock=Clock(tick_s))
        request, shape = candidates[0].request, BatchShape((RequestShape(1, 10),))
        count, asks = 0, policy.ask([Planned(candidates[0].request, 8, 1)])
        for _ in range(200):
            ask = asks.get("r0")
            if ask is not None:
                count += ask.num_wanted > 1
                drafts = (1,) * ask.num_wanted
                chosen = policy.choose([Candidate(request, drafts)], shape, 8).get("r0", 0)
                policy.learn([DraftOutcome(request, chosen, (1,) * (chosen + 1), ask, 1, 8)], 1e-6)
            asks = policy.ask([Planned(request, 8, 1)])
        return count

    assert asked(0.0) > 190  # nine tokens in five steps' time
    assert asked(2.0) < 10  # and six for thinking
