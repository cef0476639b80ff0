"""Reused texts: the same answer in any company, bit for bit, and the one that the slow twin gives.

What is reused is approximate, so it is not the answer of a full prefill; but for one prompt and one
choice it is always the same. The twin does by hand, over one arena, what a request does.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
from fakes import make_request
from guessers import Eager
from shadow import num_chosen, with_what_stands_before
from small_models import BLOCK_SIZE, KINDS, MAX_LEN, VOCAB, Model, make_model, silenced
from test_same_answer import answers

from duetto.backends.backend import AttentionLook, FloatArray, KVMoves, StepArrays
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.executor import Executor, Pending
from duetto.core.request import Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.core.speculation import NgramOptions
from duetto.runner.proposers.ngram import NgramProposer
from duetto.runner.sampler import sample_token
from duetto.runner.step_arrays import build_step_arrays

NUM_OUTPUT = 12


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, size).tolist() for size in (16, 21, 8, 37, 5)]


CHOICES: list[dict[str, Any]] = [
    {"method": "none"},
    {"method": "first", "num_first": 2},
    {"method": "hkvd", "ratio": 0.3},
    {"method": "query", "ratio": 0.2},
    {"method": "query", "ratio": 0.4, "num_rounds": 3},
]


def requests(choices: Sequence[dict[str, Any]] = CHOICES) -> list[Request]:
    """Some of the texts in some order, between own tokens; and a request that reuses nothing."""
    rng, made = np.random.default_rng(1), list[Request]()
    kinds = ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9})
    for index in range(11):
        prompt, segments = rng.integers(0, VOCAB, index % 3).tolist(), list[TokenRange]()
        for which in rng.permutation(5)[: rng.integers(1, 5)]:
            segments.append(TokenRange(len(prompt), len(prompt) + len(texts()[which])))
            prompt += texts()[which]
            prompt += rng.integers(0, VOCAB, index % 2).tolist()
        prompt += rng.integers(0, VOCAB, 6).tolist()
        reuse = Reuse(tuple(segments), **choices[index % len(choices)])
        options = kinds[index % 3] | {"seed": index, "logprobs": 2}
        plain = make_request(f"r{index}", prompt, NUM_OUTPUT, **options)
        made.append(reusing(plain, None if index == 4 else reuse))
    return made


def reusing(request: Request, reuse: Reuse | None) -> Request:
    return Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        seed=request.seed,
        reuse=reuse,
    )


@pytest.fixture(scope="module")
def alone(model) -> dict[str, list]:
    found = {}
    for request in requests():
        found |= answers(model.engine(at_once=True), [request])
    return found


class Twin:
    """Each text alone, then each moved, then what is chosen, then the rest of the prompt, then
    token by token."""

    def __init__(self, model: Model) -> None:
        self._backend = model.backend
        self._kv = model.backend.allocate_kv(64, BLOCK_SIZE, model.kv_dtype)
        self._table = tuple(range(24))

    def answer(self, request: Request) -> list:
        prompt, place = request.prompt_token_ids, len(self._table)
        reuse = request.reuse or Reuse(())
        brought = reuse.reused(len(prompt))
        for start, end in reuse.segments:
            table = tuple(range(place, place + -(-(end - start) // BLOCK_SIZE)))
            self._run(prompt[start:end], range(end - start), table)
            for first, last in brought:
                if start <= first < end:
                    self._move(range(first, last), start, table[0] * BLOCK_SIZE)
            place += len(table)
        reused = {p for first, last in brought for p in range(first, last)}
        match reuse.method:
            case "hkvd" if reused:
                reused -= self._deviating(prompt, sorted(reused), reuse)
            case "query" if reused:
                reused -= self._attended(prompt, sorted(reused), reuse)
        row, found = self._compute(prompt, reused), []
        for number in range(NUM_OUTPUT):
            sampled = sample_token(row, SamplingInput(request.sampling, request.seed, number))
            found.append(sampled)
            at = len(prompt) + number
            row = self._run((sampled.token_id,), range(at, at + 1), self._table)
        return found

    def _deviating(self, prompt: Sequence[int], places: list[int], reuse: Reuse) -> set[int]:
        """All tokens from the first text to the last one's end, at once."""
        first, end = places[0], places[-1] + 1
        self._run(prompt[:first], range(first), self._table)
        step = self._step(prompt[first:end], range(first, end), self._table)
        looked = self._backend.look_deviation(step, self._kv)
        count = num_chosen(reuse, len(places), 1)
        return _largest({p: looked[p - first] for p in places}, count)

    def _attended(self, prompt: Sequence[int], places: list[int], reuse: Reuse) -> set[int]:
        """Each token that looks by itself, with all that are before it."""
        chosen, question = set[int](), places[-1] + 1
        for number in range(1, reuse.num_rounds + 1):
            left = [p for p in places if p not in chosen]
            scores = dict.fromkeys(left, 0.0)
            for at in sorted({*range(len(prompt))} - {*left}):
                step = self._step(prompt[at : at + 1], range(at, at + 1), self._table)
                before = np.array([p for p in left if p < at], np.int32)
                is_looking = at in chosen if number > 1 else at >= question
                if not is_looking or not len(before):
                    self._backend.run(step, self._kv)
                    continue
                _, (looked,) = self._backend.look_attention(
                    step, self._kv, [AttentionLook(0, 1, before)]
                )
                for place, score in zip(before.tolist(), looked, strict=True):
                    scores[place] += score
            number_now = num_chosen(reuse, len(places), number) - len(chosen)
            if reuse.num_rounds == 1:
                return with_what_stands_before(scores, number_now, reuse)
            chosen |= _largest(scores, number_now)
        return chosen

    def _compute(self, prompt: Sequence[int], reused: set[int]) -> FloatArray:
        places = [p for p in range(len(prompt)) if p not in reused]
        return self._run([prompt[p] for p in places], places, self._table)

    def _run(self, token_ids, positions, table) -> FloatArray:
        step = self._step(token_ids, positions, table)
        return self._backend.run(step._replace(logit_rows=step.query_starts[-1:] - 1), self._kv)[0]

    def _step(self, token_ids, positions, table) -> StepArrays:
        item = ScheduledRequest(
            "r", tuple(token_ids), positions[0], table, positions=tuple(positions)
        )
        return build_step_arrays(ScheduledBatch((item,)), BLOCK_SIZE)[0]

    def _move(self, there: range, start: int, first_slot: int) -> None:
        to = np.array(there, np.int32)
        alone = to - np.int32(start)
        self._backend.move_kv(KVMoves(alone + np.int32(first_slot), to, alone, to), self._kv)


def _largest(scores: dict[int, float], number: int) -> set[int]:
    return set(sorted(sorted(scores), key=lambda p: scores[p], reverse=True)[:number])


def test_alone_it_is_what_the_twin_says(model, alone):
    for request in requests():
        asked = silenced(request) if model.is_device else request
        assert alone[request.request_id] == Twin(model).answer(asked)


def test_it_is_not_what_a_full_prefill_says(model, alone):
    """Else nothing here would show anything."""
    full = answers(model.engine(), [reusing(request, None) for request in requests()])
    differing = [name for name in full if full[name] != alone[name]]
    assert len(differing) >= 7 and "r4" not in differing


def test_choices_choose(model, alone):
    """Nor what is said where nothing is chosen."""
    nothing = answers(model.engine(), requests([{"method": "none"}]))
    differing = [name for name in nothing if nothing[name] != alone[name]]
    assert len(differing) >= 4


@pytest.mark.parametrize(
    "choice",
    [
        {"method": "first", "num_first": 100},
        {"method": "hkvd", "ratio": 1},
        {"method": "query", "ratio": 1.0, "num_rounds": 2},
        {"method": "hkvd", "ratio": 0.999},  # looks, and then chooses all of them
        {"method": "query", "ratio": 0.999, "num_rounds": 2},
    ],
    ids=str,
)
def test_with_every_token_computed_it_is_what_a_full_prefill_says(model, choice):
    full = answers(model.engine(), [reusing(request, None) for request in requests()])
    assert answers(model.engine(max_num_batched_tokens=17), requests([choice])) == full


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_batched_and_warm(model, alone, depth):
    engine = model.engine(depth=depth)
    assert answers(engine, requests()) == alone
    assert answers(engine, requests()[::-1], together=2) == alone


@pytest.mark.parametrize("budget", [1, 5, 8, 31])
def test_chunked(model, alone, budget):
    assert answers(model.engine(max_num_batched_tokens=budget), requests()) == alone


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted(model, alone, depth):
    engine = model.engine(num_blocks=28, max_num_batched_tokens=29, depth=depth)
    assert answers(engine, requests(), together=4) == alone
    assert engine.scheduler.counts.num_preemptions >= 1


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_at_any_stage(model, alone, depth):
    engine = model.engine(max_num_batched_tokens=19, depth=depth)
    found: dict[str, list] = {r.request_id: [] for r in requests()}
    for request in requests():
        engine.add(request)
    for step in count():
        room, running = engine.scheduler._room, engine.scheduler.running.values()
        victims = [r for r in running if not r.num_output_tokens and not room.is_protected(r)]
        if step % 3 == 2 and victims:
            room.preempt(victims[step % len(victims)])
        for update in engine.step().updates:
            assert update.error is None
            found[update.request_id] += update.tokens
        if not engine.has_work:
            break
    assert found == alone
    assert engine.scheduler.counts.num_preemptions >= 8


def test_chunking_off(model, alone):
    engine = model.engine(enable_chunked_prefill=False, max_num_batched_tokens=MAX_LEN)
    assert answers(engine, requests()) == alone


@pytest.mark.parametrize("depth", [0, 1])
def test_speculated(model, alone, depth):
    policy = Eager(["ngram"])
    proposers = {"ngram": NgramProposer(NgramOptions(prompt_lookup_min=1), 32)}
    engine = model.engine(proposers=proposers, drafts=policy, depth=depth)
    assert answers(engine, requests(), together=3) == alone
    assert policy.num_verified > 10


class FailsOften:
    """Raises in every third step of several requests, when it has computed it."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.num_left = executor, 0

    def submit(self, batch: ScheduledBatch) -> Pending:
        pending = self._executor.submit(batch)
        self.num_left += len(batch.requests) > 1
        if self.num_left % 3 == 2:
            self.num_left += 1
            raise RuntimeError("planted")
        return pending


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_that_fail_are_computed_again(model, alone, depth):
    """Also looks at what they have overwritten."""
    engine = model.engine(executor=FailsOften, depth=depth, max_num_batched_tokens=23)
    assert answers(engine, requests()) == alone


@pytest.mark.parametrize("policy", ["static", "priority"])
def test_other_policies(model, alone, policy):
    engine = model.engine(scheduling_policy=policy, max_num_seqs=3)
    assert answers(engine, requests()) == alone


def test_a_prefix_is_not_spoiled_by_what_is_approximate(model):
    """A request that reuses nothing, after those that do, of the very same prompts."""
    plain = [reusing(request, None) for request in requests()]
    expected = answers(model.engine(enable_prefix_caching=False), plain)
    engine = model.engine()
    answers(engine, requests())
    again = [reusing(request, None) for request in requests()]
    assert answers(engine, again) == expected
