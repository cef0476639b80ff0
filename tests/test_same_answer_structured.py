"""Answers with grammars: the same in any company, valid where they end, no trace in others.

Each test runs requests under some circumstance and compares tokens, log-probabilities and ends
with each request alone, in a fresh engine. The planted faults at the end are each seen by that.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from fakes import make_request
from grammar_world import ENDS, asked, decode, make_grammars, text_of
from guessers import Eager, InFlight, TakesAll
from small_models import KINDS, MAX_LEN, VOCAB, Model, make_model

from duetto.core.batch import SampledToken, ScheduledBatch
from duetto.core.executor import Done, Executor
from duetto.core.request import FinishReason, Request, fan_out
from duetto.core.speculation import NgramOptions
from duetto.core.structured import Grammar, ReasoningBudget
from duetto.engine.engine import Engine
from duetto.grammars.budget import BudgetedEngine
from duetto.grammars.lark import LarkWriter
from duetto.grammars.matcher import Matcher
from duetto.grammars.tags import ReasoningMarks, json_content, reasoning_first
from duetto.runner import results as runner_results
from duetto.runner.masks import Masks
from duetto.runner.proposers.ngram import NgramProposer
from duetto.scheduler import plan as plans
from duetto.scheduler import scheduler as scheduling

GRAMMARS = make_grammars()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "tag", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Asked(NamedTuple):
    constraint: dict[str, Any]
    is_valid: Callable[[str], bool]
    sampling: dict[str, Any]
    max_tokens: int = 40


def _is_person(text: str) -> bool:
    found = json.loads(text)
    extra = found.keys() - {"name", "age", "tags"}
    return {"name", "age"} <= found.keys() and not extra and 0 <= found["age"] <= 120


def _is_thought_person(text: str) -> bool:
    thought, marker, rest = text.partition("</think>")
    return marker == "</think>" and len(thought) < 40 and _is_person(rest)


def _is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


HOT = {"temperature": 1.5}
CASES = {
    "person": Asked({"json": PERSON}, _is_person, HOT),
    "cold": Asked({"json": PERSON}, _is_person, {"temperature": 0}),
    "tight": Asked({"json": PERSON}, _is_person, HOT, 18),
    "object": Asked({"json_object": True}, _is_object, HOT | {"top_p": 0.9}, 24),
    "regex": Asked({"regex": "(ab|x)+=[0-9]{2,4}"}, _matches("(ab|x)+=[0-9]{2,4}"), HOT, 12),
    "choice": Asked(
        {"choice": ["name", "null", "nab"]}, _matches("name|null|nab"), {"min_tokens": 9}
    ),
    "penalized": Asked(
        {"json": PERSON}, _is_person, HOT | {"repetition_penalty": 1.3, "presence_penalty": 0.5}
    ),
    "thinking": Asked({"json": PERSON, "budget": 6}, _is_thought_person, HOT, 64),
    "gbnf": Asked({"grammar": 'root ::= "x=" [0-9]+ ("a" | "ab")'}, _matches("x=[0-9]+ab?"), HOT),
}


def requests(names: tuple[str, ...] = (*CASES,)) -> list[Request]:
    """One for each case, and beside them two that are free."""
    rng, made = np.random.default_rng(3), list[Request]()
    for index, name in enumerate(CASES):
        case = CASES[name]
        prompt = rng.integers(0, VOCAB, (5, 30, 64, 9)[index % 4]).tolist()
        if name in names:
            made.append(_request(name, prompt, case, index))
    for index in range(2):
        prompt = rng.integers(0, VOCAB, 20).tolist()
        made.append(make_request(f"free-{index}", prompt, 24, seed=index, logprobs=2))
    return made


def _request(name: str, prompt: list[int], case: Asked, seed: int) -> Request:
    request = make_request(
        name,
        prompt,
        case.max_tokens,
        seed=seed,
        logprobs=2,
        grammar=_grammar(case.constraint),
        **case.sampling,
    )
    return replace(request, stop_token_ids=frozenset(ENDS))


def _grammar(constraint: dict[str, Any]) -> Grammar:
    budget = constraint.get("budget")
    if budget is None:
        return GRAMMARS.make(asked(**constraint))
    marks = ReasoningMarks("<think>", "</think>", has_begun=True)

    def start(lark: LarkWriter) -> str:
        return reasoning_first(lark, marks, json_content(lark, constraint["json"], "json"))

    return GRAMMARS.write(start, "json")._replace(budget=ReasoningBudget(budget, *marks))


class Outcome(NamedTuple):
    tokens: list[SampledToken]
    finish_reason: FinishReason | None
    error: str | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return make_model(KINDS[3], tmp_path_factory.mktemp("model"))


def engine_of(model: Model, **options: Any) -> Engine:
    return model.engine(masks=Masks(GRAMMARS), decode=decode, **options)


def outcomes(engine: Engine, wanted: list[Request], *, together: int = 100) -> dict[str, Outcome]:
    found = {r.request_id: Outcome([], None) for r in wanted}
    todo = list(wanted)
    while todo or engine.has_work:
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        for update in engine.step().updates:
            tokens = found[update.request_id].tokens + list(update.tokens)
            found[update.request_id] = Outcome(tokens, update.finish_reason, update.error)
        engine.scheduler.check()
    return found


@pytest.fixture(scope="module")
def alone(model) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for request in requests():
        found |= outcomes(engine_of(model, enable_prefix_caching=False), [request])
    return found


def text_in(outcome: Outcome) -> str:
    return text_of([token.token_id for token in outcome.tokens])


def drafting(model: Model, **options: Any) -> Engine:
    proposers = {"ngram": NgramProposer(NgramOptions(), 32), "draft-model": model.draft_model()}
    return engine_of(model, proposers=proposers, drafts=Eager([*proposers]), **options)


class FailsAfterwards:
    """Every so many steps raise when all is computed."""

    def __init__(self, executor: Executor, every: int) -> None:
        self._executor, self._every, self.num_steps = executor, every, 0

    def submit(self, batch: ScheduledBatch) -> Done:
        pending = self._executor.submit(batch)
        self.num_steps += len(batch.requests) > 1
        if len(batch.requests) > 1 and self.num_steps % self._every == 0:
            raise RuntimeError("planted")
        return pending


def check_ends(found: dict[str, Outcome]) -> None:
    """All but the free ones end valid: each of them has tokens enough for it."""
    for name, case in CASES.items():
        if name in found:
            assert found[name].error is None
            assert found[name].finish_reason is FinishReason.STOP, (name, text_in(found[name]))
            assert case.is_valid(text_in(found[name])), text_in(found[name])


def test_answers_end_valid(alone):
    check_ends(alone)
    assert len({text_in(alone[name]) for name in CASES}) == len(CASES)


def test_a_free_request_is_as_without_grammars(model, alone):
    free = [r for r in requests() if r.grammar is None]
    found = outcomes(model.engine(), free)
    assert found == {r.request_id: alone[r.request_id] for r in free}


def test_logprobs_are_the_models_own(model, alone):
    """Of the first token, those of a free request after the same prompt."""
    free = [replace(r, request_id=r.request_id, grammar=None) for r in requests()]
    for request in free[: len(CASES)]:
        engine = model.engine(enable_prefix_caching=False)
        (first, *_), *_ = outcomes(engine, [request])[request.request_id]
        constrained = alone[request.request_id].tokens[0]
        assert first.logprob.top == constrained.logprob.top


@pytest.mark.parametrize("together", [1, 100])
def test_batched(model, alone, together):
    assert outcomes(engine_of(model), requests()[::-1], together=together) == alone


def test_chunked(model, alone):
    assert outcomes(engine_of(model, max_num_batched_tokens=7), requests()) == alone


def test_preempted(model, alone):
    engine = engine_of(model, num_blocks=MAX_LEN // 8 + 1, max_num_batched_tokens=29)
    assert outcomes(engine, requests(), together=4) == alone
    assert engine.scheduler.counts.num_preemptions >= 2


def test_speculated(model, alone):
    engine = drafting(model)
    policy = engine.scheduler._drafts.of_proposers
    assert outcomes(engine, requests()) == alone
    assert policy.num_accepted > 20 and policy.num_rejected > 20


def forcing(model: Model, **options: Any) -> Engine:
    """What a grammar makes follow is verified, all of it."""
    return engine_of(model, grammar_drafts=TakesAll(), **options)


def forcing_beside_others(model: Model, **options: Any) -> Engine:
    return drafting(model, grammar_drafts=TakesAll(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": MAX_LEN // 8 + 1, "max_num_batched_tokens": 29},
        {"depth": 1, "executor": InFlight},
    ],
    ids=["batched", "chunked", "preempted", "in_flight"],
)
@pytest.mark.parametrize("make_engine", [forcing, forcing_beside_others])
def test_what_a_grammar_makes_follow_is_drafted(model, alone, make_engine, options):
    engine = make_engine(model, **options)
    policy = engine.scheduler._drafts.of_grammars
    assert outcomes(engine, requests(), together=5) == alone
    assert policy.num_accepted > 0 and policy.num_rejected > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_with_steps_in_flight(model, alone, depth):
    assert outcomes(engine_of(model, depth=depth, executor=InFlight), requests()) == alone


@pytest.mark.parametrize("make_engine", [engine_of, drafting])
def test_with_steps_that_fail_and_are_computed_again(model, alone, make_engine):
    executors = []

    def failing(runner: Executor) -> FailsAfterwards:
        executors.append(FailsAfterwards(runner, 3))
        return executors[-1]

    assert outcomes(make_engine(model, executor=failing), requests()) == alone
    assert executors[0].num_steps > 9


@pytest.fixture(scope="module")
def on_device(model) -> Model:
    """The same on a device: free requests, which tell no log-probabilities, are sampled there."""
    return replace(model, is_device=True)


@pytest.fixture(scope="module")
def told_less(on_device) -> dict[str, Outcome]:
    return outcomes(engine_of(on_device, at_once=True), requests())


@pytest.mark.parametrize(
    ("make_engine", "options"),
    [
        (engine_of, {"num_blocks": MAX_LEN // 8 + 1, "max_num_batched_tokens": 29}),
        (engine_of, {"executor": lambda runner: FailsAfterwards(runner, 3)}),
        (drafting, {"max_num_batched_tokens": 17}),
        (drafting, {"depth": 2}),
        (forcing_beside_others, {}),
        (forcing_beside_others, {"executor": lambda runner: FailsAfterwards(runner, 3)}),
    ],
    ids=["preempted", "failing", "drafts", "drafts-deep", "forced", "forced-failing"],
)
def test_on_a_device(on_device, told_less, make_engine, options):
    assert outcomes(make_engine(on_device, **options), requests(), together=4) == told_less


def test_several_answers_to_one_prompt(model):
    case = CASES["person"]
    several = {"sampling": replace(_request("n", [1], case, 5).sampling, n=3)}
    siblings = fan_out(replace(_request("n", [*range(30)], case, 5), **several))
    together = outcomes(engine_of(model), siblings)
    for sibling in fan_out(replace(_request("n", [*range(30)], case, 5), **several)):
        engine = engine_of(model, enable_prefix_caching=False)
        assert outcomes(engine, [sibling])[sibling.request_id] == together[sibling.request_id]
        assert _is_person(text_in(together[sibling.request_id]))
    assert len({text_in(outcome) for outcome in together.values()}) == 3


def test_what_leaves_nothing_is_that_requests_error(model, alone):
    """Tokens that are allowed, none of which the grammar lets stand there; the others go on."""
    wanted = requests()
    case = CASES["choice"]
    sampling = {"allowed_token_ids": [17]}
    wanted.append(_request("nothing", [1, 2], replace_sampling(case, sampling), 1))
    found = outcomes(engine_of(model), wanted)
    error = found.pop("nothing").error
    assert "allowed_token_ids" in error and "grammar" in error
    assert found == alone


def replace_sampling(case: Asked, sampling: dict[str, Any]) -> Asked:
    return case._replace(sampling=sampling)


def test_an_answer_without_room_ends_with_length(model):
    """Where nothing fits, the answer is cut, and is a beginning of a valid one."""
    short = CASES["person"]._replace(max_tokens=5)
    found = outcomes(engine_of(model), [_request("short", [4, 2], short, 1)])["short"]
    assert found.finish_reason is FinishReason.LENGTH and len(found.tokens) == 5
    matcher = GRAMMARS.matcher(GRAMMARS.make(asked(**short.constraint)))
    assert matcher.seek([token.token_id for token in found.tokens])


def test_matchers_of_those_that_are_gone_go(model):
    masks = Masks(GRAMMARS)
    engine = model.engine(masks=masks)
    outcomes(engine, requests())
    assert masks.keeps_some
    outcomes(engine, [make_request("free", [1], 100)])
    assert not masks.keeps_some


# --- planted faults ------------------------------------------------------------------------------

FEW = ("person", "tight", "choice", "regex", "thinking")


def shows_itself(model: Model, alone: dict[str, Outcome]) -> bool:
    """Whether something is wrong with a few requests, in the circumstances above."""

    def failing(runner: Executor) -> FailsAfterwards:
        return FailsAfterwards(runner, 3)

    for engine in (
        engine_of(model),
        engine_of(model, depth=1, executor=InFlight),
        drafting(model, executor=failing),
        forcing(model),
    ):
        found = outcomes(engine, requests(FEW))
        if found != {name: alone[name] for name in found}:
            return True
        try:
            check_ends(found)
        except (AssertionError, ValueError):
            return True
    return False


def test_without_a_fault_nothing_shows(model, alone):
    assert not shows_itself(model, alone)


def _stale(patch) -> None:
    """The matcher stays where it was."""
    seek = Matcher.seek
    patch.setattr(Matcher, "seek", lambda self, tokens: bool(self._tokens) or seek(self, tokens))


def _not_rolled_back(patch) -> None:
    """Only what is new is followed: a draft that was wrong stays."""

    def seek(self, tokens):
        more = list(tokens[len(self._tokens) :])
        count = self._engine.try_consume_tokens(more)
        self._tokens += more[:count]
        return True

    patch.setattr(Matcher, "seek", seek)


def _wrong_row(patch) -> None:
    """Each request gets another one's masks."""
    make = Masks._make

    def shifted(self, items):
        made = make(self, items)
        rows = list(made.values())
        return dict(zip(made, rows[1:] + rows[:1], strict=True))

    patch.setattr(Masks, "_make", shifted)


def _draft_row(patch) -> None:
    """The mask of the first row for each of them."""
    make = Masks._of

    def first(self, item):
        made = make(self, item)
        return made._replace(rows=made.rows[:1] * len(made.rows))

    patch.setattr(Masks, "_of", first)


def _with_ends(patch, value: float) -> None:
    ceiling = Matcher.ceiling

    def changed(self):
        found = ceiling(self).copy()
        found[list(ENDS)] = value
        return found

    patch.setattr(Matcher, "ceiling", changed)


def _no_end(patch) -> None:
    _with_ends(patch, -np.inf)


def _ends_anywhere(patch) -> None:
    _with_ends(patch, np.inf)


def _half_the_ends(patch) -> None:
    """One of the two ends is not known as one."""
    ceiling = Matcher.ceiling

    def changed(self):
        found = ceiling(self).copy()
        found[ENDS[1]] = -np.inf
        return found

    patch.setattr(Matcher, "ceiling", changed)


def _one_too_many_left(patch) -> None:
    sampling_input = plans._input_with_grammar

    def changed(*args):
        made = sampling_input(*args)
        return made._replace(num_left=made.num_left + 1)

    patch.setattr(plans, "_input_with_grammar", changed)


def _does_not_yield(patch) -> None:
    """min_tokens holds ends back though nothing else may follow."""
    sampling_input = plans._input_with_grammar
    patch.setattr(
        plans,
        "_input_with_grammar",
        lambda *args: sampling_input(*args)._replace(held_back_token_ids=()),
    )


def _does_not_wait(patch) -> None:
    """A next token is planned while the last one is unknown."""

    def may_go_on(request):
        return not request.has_drafts_in_flight and request.num_outputs_left

    patch.setattr(scheduling, "may_go_on", may_go_on)


def _budget_not_taken_back(patch) -> None:
    """Tokens of reasoning that were drafts, and wrong, stay counted."""
    patch.setattr(BudgetedEngine, "rollback", lambda self, count: self._engine.rollback(count))


def _accepted_unseen(patch) -> None:
    """What a grammar makes follow is taken for what is sampled."""
    checked = runner_results.verify

    def unseen(request, *args):
        if not request.has_grammar_drafts:
            return checked(request, *args)
        drafts = request.token_ids[-request.num_drafts :]
        return (*map(SampledToken, drafts), checked(request, *args)[-1])

    patch.setattr(runner_results, "verify", unseen)


def _drafts_of_before(patch) -> None:
    """Masks of drafts are those of an answer that is behind."""
    of = Masks._of

    def behind(self, item):
        if not item.has_grammar_drafts:
            return of(self, item)
        shorter = [row._replace(output_token_ids=row.output_token_ids[:-1]) for row in item.rows]
        return of(self, item._replace(rows=tuple(shorter)))

    patch.setattr(Masks, "_of", behind)


def _old_end(patch) -> None:
    """An end that was found stays good whatever is sampled."""
    steered = Matcher.steered

    def changed(self, tokens, token_id, num_left):
        if self._end is not None:
            return token_id
        return steered(self, tokens, token_id, num_left)

    patch.setattr(Matcher, "steered", changed)


FAULTS = (
    _stale,
    _not_rolled_back,
    _wrong_row,
    _draft_row,
    _no_end,
    _ends_anywhere,
    _half_the_ends,
    _one_too_many_left,
    _does_not_yield,
    _does_not_wait,
    _old_end,
    _budget_not_taken_back,
    _accepted_unseen,
    _drafts_of_before,
)


@contextmanager
def planted(fault: Callable[[Any], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        yield


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(model, alone, fault):
    with planted(fault):
        assert shows_itself(model, alone)
