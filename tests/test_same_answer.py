"""The same answer in any company: one test per axis, bit for bit in tokens and log-probabilities.

Each test runs requests under some circumstance and compares with each request alone, in a fresh
engine that computes every prompt whole. Speculation has a file of its own,
test_same_answer_speculated.py.
"""

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_request
from small_models import KINDS, VOCAB, Model, make_model

from duetto.core.request import Request, fan_out
from duetto.engine.engine import Engine


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def requests(seed: int = 0) -> list[Request]:
    """Prompts of awkward lengths, some with a shared beginning, under every kind of sampling."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, 50).tolist()
    kinds = (
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    )
    made = []
    for index, length in enumerate((1, 7, 8, 9, 63, 64, 65, 100)):
        own = rng.integers(0, VOCAB, length).tolist()
        prompt = (shared + own)[:100] if index % 2 else own
        kind = kinds[index % len(kinds)]
        made.append(make_request(f"r{index}", prompt, 24, seed=index, logprobs=3, **kind))
    return made


def answers(engine: Engine, wanted: list[Request], *, together: int = 100) -> dict[str, list]:
    """Run requests, `together` new ones a step; per request its tokens with log-probabilities."""
    found: dict[str, list] = {r.request_id: [] for r in wanted}
    todo = list(wanted)
    while todo or engine.has_work:
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        for update in engine.step().updates:
            assert update.error is None
            found[update.request_id] += update.tokens
        engine.scheduler.check()
    return found


@pytest.fixture(scope="module")
def alone(model) -> dict[str, list]:
    found = {}
    for request in requests():
        engine = model.engine(enable_prefix_caching=False, at_once=True)
        found |= answers(engine, [request])
    assert all(len(tokens) == 24 for tokens in found.values())
    return found


def test_batched(model, alone):
    assert answers(model.engine(), requests()) == alone


def test_batched_with_arrivals_in_every_step(model, alone):
    assert answers(model.engine(), requests()[::-1], together=1) == alone


@pytest.mark.parametrize("budget", [1, 5, 8, 31])
def test_chunked(model, alone, budget):
    engine = model.engine(max_num_batched_tokens=budget, enable_prefix_caching=False)
    assert answers(engine, requests()) == alone


def test_chunking_off(model, alone):
    assert answers(model.engine(enable_chunked_prefill=False), requests()) == alone


def test_cached(model, alone):
    engine = model.engine()
    assert answers(engine, requests()) == alone
    before = engine.scheduler.counts.num_hit_tokens
    assert answers(engine, requests()) == alone
    assert engine.scheduler.counts.num_hit_tokens > before + 100


def test_preempted(model, alone):
    engine = model.engine(num_blocks=24, enable_prefix_caching=False)
    assert answers(engine, requests()) == alone
    assert engine.scheduler.counts.num_preemptions >= 3


def test_preempted_and_cached_and_chunked(model, alone):
    engine = model.engine(num_blocks=24, max_num_batched_tokens=13)
    assert answers(engine, requests(), together=2) == alone
    assert engine.scheduler.counts.num_preemptions >= 1


@pytest.mark.parametrize("policy", ["static", "priority"])
def test_other_policies(model, alone, policy):
    engine = model.engine(scheduling_policy=policy, max_num_seqs=3)
    wanted = requests()
    for index, request in enumerate(wanted):
        request.priority = index % 3
    assert answers(engine, wanted) == alone


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24, "max_num_batched_tokens": 13}], ids=str)
def test_with_steps_in_flight(model, alone, depth, options):
    engine = model.engine(depth=depth, **options)
    assert answers(engine, requests(), together=2) == alone


def test_several_answers_to_one_prompt(model):
    """Each of n answers is what its seed gives alone, and the first is that of n=1."""
    base = make_request("n", list(range(40)), 24, seed=9, logprobs=3, n=4)
    siblings = fan_out(base)
    together = answers(model.engine(), siblings)
    for sibling in fan_out(base):
        single = replace(sibling, sampling=replace(sibling.sampling, n=1))
        engine = model.engine(enable_prefix_caching=False, at_once=True)
        assert answers(engine, [single])[sibling.request_id] == together[sibling.request_id]
    assert siblings[0].seed == base.seed
    assert len({tuple(t.token_id for t in tokens) for tokens in together.values()}) > 1


def test_beside_requests_that_are_aborted_and_fail(model, alone):
    """Neighbours that come, go and break leave no trace."""
    engine = model.engine()
    found: dict[str, list] = {r.request_id: [] for r in requests()}
    for request in requests():
        engine.add(request)
    for step in range(1000):
        if step % 3 == 0:
            engine.add(make_request(f"x{step}", list(range(step % 90 + 1)), 50, seed=step))
        if step % 4 == 3:
            engine.abort(f"x{step - step % 3}")
        for update in engine.step().updates:
            if update.request_id in found:
                found[update.request_id] += update.tokens
        if all(len(tokens) == 24 for tokens in found.values()):
            break
    assert found == alone


def test_prompt_scores(model):
    """The prompt's log-probabilities too: in chunks, in a batch, and cached by another."""

    def scores(engine, request):
        engine.add(make_request("other", list(range(60)), 10))
        engine.add(request)
        found = []
        while engine.has_work:
            for update in engine.step().updates:
                if update.request_id == "scored":
                    found += update.prompt_logprobs
        return found

    def scored():
        return make_request("scored", list(range(70)), 2, prompt_logprobs=2)

    whole = scores(model.engine(), scored())
    assert len(whole) == 69
    assert scores(model.engine(max_num_batched_tokens=7), scored()) == whole
    assert scores(model.engine(num_blocks=14, max_num_batched_tokens=9), scored()) == whole
