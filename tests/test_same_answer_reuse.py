"""Reused texts: the same answer in any company, bit for bit, and the one that the slow twin gives.

What is reused is approximate, so it is not the answer of a full prefill; but for one prompt and one
choice it is always the same. The twin does by hand, over one arena, what a request does.
"""

import numpy as np
import pytest
from fakes import make_request
from small_models import BLOCK_SIZE, KINDS, VOCAB, Model, make_model
from test_same_answer import answers

from duetto.backends.backend import FloatArray, KVMoves
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.request import Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.runner.sampler import sample_token
from duetto.runner.step_arrays import build_step_arrays

NUM_OUTPUT = 12


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, size).tolist() for size in (16, 21, 8, 37, 5)]


def requests() -> list[Request]:
    """Some of the texts in some order, between own tokens; and requests that reuse nothing."""
    rng, made = np.random.default_rng(1), list[Request]()
    kinds = ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9})
    for index in range(9):
        prompt, segments = rng.integers(0, VOCAB, index % 3).tolist(), list[TokenRange]()
        for which in rng.permutation(5)[: rng.integers(1, 5)]:
            segments.append(TokenRange(len(prompt), len(prompt) + len(texts()[which])))
            prompt += texts()[which]
        prompt += rng.integers(0, VOCAB, 6).tolist()
        num_first = index % 4
        reuse = Reuse(tuple(segments), "first" if num_first else "none", num_first)
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
        found |= answers(model.engine(), [request])
    return found


class Twin:
    """Each text alone, then each moved, then the rest of the prompt, then token by token."""

    def __init__(self, model: Model) -> None:
        self._backend = model.backend
        self._kv = model.backend.allocate_kv(64, BLOCK_SIZE, model.kv_dtype)

    def answer(self, request: Request) -> list:
        prompt = request.prompt_token_ids
        own, place = tuple(range(24)), 24
        for start, end in request.reuse.segments if request.reuse else ():
            table = tuple(range(place, place + -(-(end - start) // BLOCK_SIZE)))
            self._run(prompt[start:end], range(end - start), table)
            for first, last in request.reused:
                if start <= first < end:
                    self._move(range(first, last), start, table[0] * BLOCK_SIZE)
            place += len(table)
        reused = {p for first, last in request.reused for p in range(first, last)}
        places = [p for p in range(len(prompt)) if p not in reused]
        row, found = self._run([prompt[p] for p in places], places, own), []
        for number in range(NUM_OUTPUT):
            sampled = sample_token(row, SamplingInput(request.sampling, request.seed, number))
            found.append(sampled)
            at = len(prompt) + number
            row = self._run((sampled.token_id,), range(at, at + 1), own)
        return found

    def _run(self, token_ids, positions, table) -> FloatArray:
        rows = (SamplingInput(make_request().sampling, 0, 0),)
        item = ScheduledRequest(
            "r", tuple(token_ids), positions[0], table, rows, positions=tuple(positions)
        )
        step, _ = build_step_arrays(ScheduledBatch((item,)), BLOCK_SIZE)
        return self._backend.run(step, self._kv)[0]

    def _move(self, there: range, start: int, first_slot: int) -> None:
        to = np.array(there, np.int32)
        alone = to - np.int32(start)
        self._backend.move_kv(KVMoves(alone + np.int32(first_slot), to, alone, to), self._kv)


def test_alone_it_is_what_the_twin_says(model, alone):
    for request in requests():
        assert alone[request.request_id] == Twin(model).answer(request)


def test_it_is_not_what_a_full_prefill_says(model, alone):
    """Else nothing here would show anything."""
    full = answers(model.engine(), [reusing(request, None) for request in requests()])
    differing = [name for name in full if full[name] != alone[name]]
    assert len(differing) >= 6 and "r4" not in differing


def test_with_every_token_computed_it_is_what_a_full_prefill_says(model):
    full = answers(model.engine(), [reusing(request, None) for request in requests()])
    all_computed = [
        reusing(r, Reuse(r.reuse.segments, "first", 100) if r.reuse else None) for r in requests()
    ]
    assert answers(model.engine(), all_computed) == full


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
    engine = model.engine(num_blocks=36, max_num_batched_tokens=29, depth=depth)
    assert answers(engine, requests(), together=2) == alone
    assert engine.scheduler.counts.num_preemptions >= 1


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
