"""What reuse does to answers is measured through the engine, and the gate acts on it."""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest

from duetto.build import Built, build
from duetto.core.batch import TokenLogprob
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import ReuseChoice, ReuseLimits
from duetto.demo import READER
from duetto.engine.engine import Engine
from duetto.evals.reuse_quality import (
    FollowedAnswers,
    FullAnswers,
    QualityBench,
    answer_in_full,
    divergence,
    measure_choice,
)
from duetto.evals.reuse_questions import (
    AskedPrompt,
    ReuseQuestion,
    make_prompts,
    world_questions,
)
from duetto.evals.reuse_verdicts import ModelVerdicts, refusal, write_verdicts
from duetto.scheduler.scheduler import Scheduler

NONE = ReuseChoice("none")
HKVD = ReuseChoice("hkvd", (("ratio", 0.15),))
ALL = ReuseChoice("first", (("num_first", 1000),))
NUM_QUESTIONS = 48


@pytest.fixture(scope="module")
def built() -> Built:
    return build(READER, EngineArgs(target_itl="off", threads=1))


@pytest.fixture(scope="module")
def bench(built: Built) -> QualityBench:
    followed = FollowedAnswers(built.model.runner)
    config = built.scheduler_config
    return QualityBench(Engine(Scheduler(config), followed), followed, built.codec, config, 16)


@pytest.fixture(scope="module")
def questions() -> list[ReuseQuestion]:
    return world_questions(NUM_QUESTIONS, seed=5, num_documents=6)


@pytest.fixture(scope="module")
def full(bench: QualityBench, questions: list[ReuseQuestion]) -> FullAnswers:
    prompts, _ = make_prompts(bench.codec, questions)
    return answer_in_full(bench, questions, prompts, f"{NUM_QUESTIONS} questions")


# --- an answer that is followed ----------------------------------------------------------------


def test_an_answer_is_followed_token_by_token(bench: QualityBench, full: FullAnswers) -> None:
    """At each token as if it were the next one of a prompt with all that came before it."""
    prompt = full.prompts[0]
    told = bench.codec.encode(" Balford is where nobody was", add_special_tokens=False)
    told.append(full.answers[0].token_ids[-1])
    assert told[-1] in bench.codec.eos_token_ids
    (answer,) = bench.answers([prompt], follow=[told])
    assert answer.token_ids == told
    longer = [AskedPrompt((*prompt.token_ids, *told[:place]), ()) for place in range(len(told))]
    found = bench.answers(longer)
    for likeliest, by_itself in zip(answer.likeliest, found, strict=True):
        assert likeliest.top == by_itself.likeliest[0].top


def test_its_own_answer_is_followed_to_itself(bench: QualityBench, full: FullAnswers) -> None:
    told = [answer.token_ids for answer in full.answers]
    again = bench.answers(full.prompts, follow=told)
    assert [answer.token_ids for answer in again] == told
    assert [a.likeliest for a in again] == [a.likeliest for a in full.answers]


# --- what is measured --------------------------------------------------------------------------


def test_the_reader_answers_in_full(full: FullAnswers) -> None:
    assert sum(full.is_right) >= 0.85 * NUM_QUESTIONS


def test_all_tokens_computed_is_a_full_prefill(bench: QualityBench, full: FullAnswers) -> None:
    found = measure_choice(bench, full, ALL, "2026-11-27")
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert (found.total.num_lost, found.total.num_gained) == (0, 0)
    assert found.num_tokens == sum(len(answer.token_ids) for answer in full.answers)
    assert (found.word, found.method, found.amount) == ("first:1000", "first", 1000)


def test_what_is_counted_is_what_the_answers_say(bench: QualityBench, full: FullAnswers) -> None:
    """Against each question answered once more, by itself and alone."""
    found = measure_choice(bench, full, NONE, "2026-11-27")
    lost, gained = dict.fromkeys(found.by_kind, 0), dict.fromkeys(found.by_kind, 0)
    for question, prompt, was_right in zip(
        full.questions, full.prompts, full.is_right, strict=True
    ):
        (answer,) = bench.answers([prompt], NONE)
        is_right = question.is_right(bench.text(answer))
        lost[question.kind] += was_right and not is_right
        gained[question.kind] += is_right and not was_right
    assert {kind: score.num_lost for kind, score in found.by_kind.items()} == lost
    assert {kind: score.num_gained for kind, score in found.by_kind.items()} == gained
    assert found.kl > 0.02
    assert found.agreement < 0.99


def test_a_prompt_that_does_not_fit_is_named(bench: QualityBench) -> None:
    long = AskedPrompt((1,) * 5000, (TokenRange(1, 4000),))
    with pytest.raises(ConfigError, match=r"question 2: .*maximum context length"):
        bench.answers([AskedPrompt((1, 2), ()), long], NONE)


def test_what_the_model_cannot_do_is_not_measured(bench: QualityBench, full: FullAnswers) -> None:
    narrow = replace(bench, limits=ReuseLimits(window=4))
    with pytest.raises(ConfigError, match=r"question 1: reuse: not moved: .* window of 4"):
        narrow.answers(full.prompts[:1], NONE)
    assert narrow.answers(full.prompts[:1]) == bench.answers(full.prompts[:1])


# --- the gate ----------------------------------------------------------------------------------


def gate_says(
    tmp_path: Path, bench: QualityBench, full: FullAnswers, choice: ReuseChoice
) -> str | None:
    found = measure_choice(bench, full, choice, "2026-11-27")
    write_verdicts("key", ModelVerdicts(model="m", numerics="n", rows=(found,)), tmp_path)
    numbers = dict(choice.numbers)
    return refusal(
        "key", choice.method, choice.amount, int(numbers.get("num_rounds", 1)), folder=tmp_path
    )


@pytest.mark.parametrize("choice", [HKVD, NONE], ids=str)
def test_the_gate_refuses_on_the_reader_what_loses_its_links(
    tmp_path: Path, bench: QualityBench, full: FullAnswers, choice: ReuseChoice
) -> None:
    """Two hops need attention between documents: that is what nothing recomputed takes away, and
    what deviates most gives nothing of it back."""
    said = gate_says(tmp_path, bench, full, choice)
    assert said is not None
    start = f"{choice} changes too many answers of this model. {choice}, measured 2026-11-27 on "
    assert said.startswith(start)
    assert "a full prefill" in said
    assert "two_hop: " in said


# --- distances ---------------------------------------------------------------------------------


def tops(probabilities: Sequence[float], num_top: int) -> TokenLogprob:
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    top = tuple((i, log(probabilities[i])) for i in order[:num_top])
    return TokenLogprob(*top[0], 1, top)


def test_the_divergence_of_distributions_that_are_named_whole() -> None:
    ours, theirs = tops((0.5, 0.25, 0.25), 3), tops((0.25, 0.5, 0.25), 3)
    assert divergence(ours, theirs) == pytest.approx(0.5 * log(2) - 0.25 * log(2), abs=1e-7)
    assert divergence(ours, ours) == 0.0


def test_what_only_one_of_them_names_is_the_rest() -> None:
    """Of 0.6 and 0.3, 0.1 with 0.1 and 0.3, 0.6, where each names two: token 1, and the rest."""
    ours, theirs = tops((0.6, 0.3, 0.1), 2), tops((0.1, 0.3, 0.6), 2)
    assert divergence(ours, theirs) == pytest.approx(0.0, abs=1e-9)
    far = tops((1e-12, 0.5, 0.5 - 1e-12), 2)
    assert divergence(ours, far) == pytest.approx(0.3 * log(0.3 / 0.5) + 0.7 * log(0.7 / 0.5))


def test_it_is_at_most_that_of_the_whole_distributions() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 3.0):
        for _ in range(20):
            logits = rng.normal(0, spread, (2, 60))
            p, q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            whole = float((p * np.log(p / q)).sum())
            found = divergence(tops(p.tolist(), 20), tops(q.tolist(), 20))
            assert 0.0 <= found <= whole + 1e-12
            near = p * np.exp(rng.normal(0, 0.1, 60))
            near /= near.sum()
            named = divergence(tops(p.tolist(), 55), tops(near.tolist(), 55))
            assert named >= 0.5 * float((p * np.log(p / near)).sum())
