"""The same answer with drafts as without, bit for bit, whoever proposes them and in any company.

Each test runs requests with speculation and compares tokens, log-probabilities, text and ends with
each request alone, in a fresh engine without drafts. A policy of the tests verifies nearly all that
is proposed, whether it pays or not, so that equality is tried hard; one test has the shipped one.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from fakes import make_request
from guessers import Eager, InFlight, Nonsense, Raises, Tally
from small_models import KINDS, NUM_BLOCKS, VOCAB, Model, make_model

from duetto.core.batch import SampledToken, TokenLogprob
from duetto.core.request import FinishReason, Request, fan_out
from duetto.core.speculation import NgramOptions, SuffixOptions
from duetto.engine.engine import Engine
from duetto.pricing.drafting import SpeculationPrices
from duetto.pricing.learned import LearnedStepTime
from duetto.runner.proposers.ngram import NgramProposer
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.proposers.suffix import SuffixProposer
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import DraftOutcome as DraftOutcome

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from recorded_answers import RecordedAnswers

NUM_OUTPUT = 16
SAMPLINGS: Sequence[dict[str, Any]] = (
    {"temperature": 0},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.8, "allowed_token_ids": tuple(range(70)), "logit_bias": {5: 1.5, 80: 9.0}},
)
LENGTHS = (1, 7, 8, 9, 31, 63, 64, 65, 100, 2)


class Outcome(NamedTuple):
    tokens: list[SampledToken]
    text: str
    scores: list[TokenLogprob]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


def decode(token_ids: Sequence[int], skip: bool) -> str:
    return "".join([chr(0x100 + t) for t in token_ids])


def outcomes(engine: Engine, wanted: list[Request], *, together: int = 100) -> dict[str, Outcome]:
    """Run requests, `together` new ones a step."""
    found = {r.request_id: Outcome([], "", [], None, None) for r in wanted}
    todo = list(wanted)
    while todo or engine.has_work:
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        for update in engine.step().updates:
            assert update.error is None
            before = found[update.request_id]
            assert before.finish_reason is None, "an update after the final one"
            found[update.request_id] = Outcome(
                before.tokens + list(update.tokens),
                before.text + update.text,
                before.scores + list(update.prompt_logprobs),
                update.finish_reason,
                update.stop_reason,
            )
            if update.timings is not None:
                tokens = found[update.request_id].tokens
                assert len(update.timings.token_times) == len(tokens)
        engine.scheduler.check()
    return found


def ids_of(outcome: Outcome) -> list[int]:
    return [token.token_id for token in outcome.tokens]


def prompt_of(index: int) -> list[int]:
    rng = np.random.default_rng(index)
    own = rng.integers(0, VOCAB, LENGTHS[index % len(LENGTHS)]).tolist()
    shared = np.random.default_rng(99).integers(0, VOCAB, 50).tolist()
    return (shared + own)[:100] if index % 2 else own


def make(name: str, index: int, max_tokens: int = NUM_OUTPUT, **more: Any) -> Request:
    sampling = SAMPLINGS[index % len(SAMPLINGS)] | {"seed": index, "logprobs": 3} | more
    return make_request(name, prompt_of(index), max_tokens, **sampling)


def open_ended() -> list[Request]:
    """Every kind of sampling."""
    return [make(f"r{index}", index) for index in range(len(SAMPLINGS))]


def ending(open_answers: Mapping[str, Outcome]) -> list[Request]:
    """Requests that end, or are kept from ending, in the middle of what they would have said."""
    answers = [ids_of(open_answers[f"r{index}"]) for index in range(len(SAMPLINGS))]
    made = []
    for index in (0, 2, 3, 4):
        said = answers[index]
        made += [
            make(f"stop-token-{index}", index, stop_token_ids=(said[9], said[13])),
            make(f"stop-text-{index}", index, stop=(decode(said[10:12], True), "none")),
            make(f"min-{index}", index, stop_token_ids=(said[2], said[7]), min_tokens=9),
            make(f"end-of-min-{index}", index, stop_token_ids=(said[12],), min_tokens=12),
            make(f"bad-{index}", index, bad_word_ids=((said[4], said[5]), (said[8],))),
            make(f"limit-{index}", index, max_tokens=5 + index),
        ]
    made.append(
        make("shown", 0, stop=(decode(answers[0][6:9], True),), include_stop_str_in_output=True)
    )
    made.append(make("scored", 8, prompt_logprobs=2))
    made += fan_out(make("n", 2, n=3, prompt_logprobs=0))
    return made


class Plain(NamedTuple):
    """Answers without speculation, and how to ask for them again."""

    answers: dict[str, Outcome]
    requests: Callable[[], list[Request]]

    @property
    def texts(self) -> dict[str, list[int]]:
        return {
            r.request_id: [*r.prompt_token_ids, *ids_of(self.answers[r.request_id])]
            for r in self.requests()
        }


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model) -> Plain:
    def alone(wanted: list[Request]) -> dict[str, Outcome]:
        found = {}
        for request in wanted:
            engine = model.engine(enable_prefix_caching=False, decode=decode, at_once=True)
            found |= outcomes(engine, [request])
        return found

    answers = alone(open_ended())
    said = dict(answers)
    answers |= alone(ending(said))
    assert all(len(answers[f"r{index}"].tokens) == NUM_OUTPUT for index in range(len(SAMPLINGS)))
    reasons = {each.stop_reason for each in answers.values()}
    assert {type(reason) for reason in reasons} == {type(None), int, str}
    return Plain(answers, lambda: open_ended() + ending(said))


def test_answers_depend_on_temperature(model):
    """Else equality at a temperature would be equality of greedy answers once more."""
    said = set()
    for temperature in (0, 0.3, 0.8, 1.2):
        request = make("r", 3, temperature=temperature, top_p=0.95 if temperature else 1.0)
        said.add(tuple(ids_of(outcomes(model.engine(), [request])["r"])))
    assert len(said) >= 3


PROPOSERS = ("ngram", "suffix", "draft_model", "oracle", "wrong", "raises", "nonsense")
USEFUL = PROPOSERS[:4]


def proposers(model: Model, plain: Plain, num_blocks: int = NUM_BLOCKS) -> dict[str, Proposer]:
    return {
        "ngram": NgramProposer(NgramOptions(prompt_lookup_min=1), 32),
        "suffix": SuffixProposer(SuffixOptions(suffix_decoding_min_token_prob=0.0), 32),
        "draft_model": model.draft_model(num_blocks),
        "oracle": RecordedAnswers(plain.texts, 0.8, VOCAB),
        "wrong": RecordedAnswers(plain.texts, 0.0, VOCAB),
        "raises": Raises(),
        "nonsense": Nonsense(VOCAB),
    }


def speculating(
    model: Model, plain: Plain, methods: Sequence[str], *, seed: int = 0, **options: Any
) -> tuple[Engine, Eager]:
    policy = Eager(methods, seed=seed)
    guessers = proposers(model, plain, options.get("num_blocks", NUM_BLOCKS))
    engine = model.engine(proposers=guessers, drafts=policy, decode=decode, **options)
    return engine, policy


@pytest.mark.parametrize("method", PROPOSERS)
def test_every_proposer(model, plain, method):
    """Twice, so that there are earlier answers, and a cache."""
    engine, policy = speculating(model, plain, [method])
    for _ in range(2):
        assert outcomes(engine, plain.requests()) == plain.answers
    if method in USEFUL:
        assert policy.num_accepted and policy.num_rejected
        assert policy.longest >= (1 if method == "ngram" else 3)
    if method == "wrong":
        assert policy.num_rejected and not policy.num_accepted
    if method in ("raises", "nonsense"):
        assert not policy.num_proposed


CASES: Mapping[str, dict[str, Any]] = {
    "chunked by 1": {"max_num_batched_tokens": 1},
    "chunked": {"max_num_batched_tokens": 31, "enable_prefix_caching": False},
    "chunking off": {"enable_chunked_prefill": False},
    "no cache": {"enable_prefix_caching": False},
    "one at a time": {"max_num_seqs": 1},
    "three at a time": {"max_num_seqs": 3, "max_num_batched_tokens": 40},
    "static": {"scheduling_policy": "static", "max_num_seqs": 4},
    "priority": {"scheduling_policy": "priority", "max_num_seqs": 5},
    "preempted": {"num_blocks": 24, "enable_prefix_caching": False},
    "preempted, chunked, cached": {"num_blocks": 24, "max_num_batched_tokens": 29},
}


@pytest.mark.parametrize("case", CASES)
def test_in_any_company(model, plain, case):
    """The proposers take turns, so each request is drafted for by all of them."""
    engine, policy = speculating(model, plain, USEFUL, **CASES[case])
    wanted = plain.requests()
    if case == "priority":
        for index, request in enumerate(wanted):
            request.priority = index % 3
    assert outcomes(engine, wanted) == plain.answers
    if case == "chunked by 1":
        assert not policy.num_verified  # drafts take only what is left of the budget
    else:
        assert policy.num_accepted and policy.num_rejected
    if "preempted" in case:
        assert engine.scheduler.counts.num_preemptions >= 3


def test_with_arrivals_in_every_step(model, plain):
    engine, policy = speculating(model, plain, PROPOSERS, max_num_seqs=16)
    assert outcomes(engine, plain.requests()[::-1], together=1) == plain.answers
    assert policy.num_accepted and policy.num_rejected


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24, "max_num_batched_tokens": 29}], ids=str)
def test_with_steps_in_flight(model, plain, depth, options):
    flights = []

    def in_flight(runner):
        flights.append(InFlight(runner))
        return flights[0]

    engine, policy = speculating(model, plain, USEFUL, depth=depth, executor=in_flight, **options)
    assert outcomes(engine, plain.requests()) == plain.answers
    assert policy.num_accepted and policy.num_rejected
    assert flights[0].num_placeholders


def test_beside_requests_that_are_aborted(model, plain):
    """Neighbours that come and go, their drafts too, leave no trace."""
    engine, policy = speculating(model, plain, [*USEFUL, "wrong"], num_blocks=40)
    wanted = plain.requests()[:12]
    found: dict[str, list[SampledToken]] = {r.request_id: [] for r in wanted}
    for request in wanted:
        engine.add(request)
    for step in range(1000):
        if step % 3 == 0:
            engine.add(make(f"x{step}", step, seed=step))
        if step % 4 == 3:
            engine.abort(f"x{step - step % 3}")
        for update in engine.step().updates:
            if update.request_id in found:
                found[update.request_id] += update.tokens
        if not any(r.finish_reason is None for r in wanted):
            break
    assert found == {name: plain.answers[name].tokens for name in found}
    assert policy.num_accepted and policy.num_rejected


@pytest.mark.parametrize("seed", range(4))
def test_at_random(model, plain, seed):
    """Some requests in some engine with some proposers."""
    rng = Random(seed)
    depth = rng.choice((0, 0, 1))
    engine, _ = speculating(
        model,
        plain,
        rng.sample(PROPOSERS, rng.randint(1, len(PROPOSERS))),
        seed=seed,
        depth=depth,
        executor=InFlight if depth else lambda runner: runner,
        num_blocks=rng.choice((24, 30, 60, NUM_BLOCKS)),
        max_num_batched_tokens=rng.choice((17, 29, 64, 192)),
        max_num_seqs=rng.randint(1, 16),
        enable_prefix_caching=rng.random() < 0.6,
        scheduling_policy=rng.choice(("fcfs", "fcfs", "static", "priority")),
    )
    wanted = plain.requests()
    rng.shuffle(wanted)
    wanted = wanted[: rng.randint(4, len(wanted))]
    found = outcomes(engine, wanted, together=rng.randint(1, 8))
    assert found == {r.request_id: plain.answers[r.request_id] for r in wanted}


class Watched(AdaptiveDrafts):
    """The shipped policy, and what came of its drafts."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.tally = Tally()

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        self.tally.learn(outcomes, drafting_s)
        super().learn(outcomes, drafting_s)


def test_with_the_shipped_policy(model, plain):
    """A step takes a second of the clock, whatever is in it; so drafts pay."""
    ticks = count()
    times = LearnedStepTime(None)
    policy = Watched(dict.fromkeys(USEFUL, 8), SpeculationPrices(times))
    engine = model.engine(
        proposers=proposers(model, plain),
        drafts=policy,
        decode=decode,
        step_times=times,
        clock=lambda: float(next(ticks)),
    )
    for _ in range(3):
        assert outcomes(engine, plain.requests()) == plain.answers
    assert policy.tally.num_accepted and policy.tally.num_rejected
