"""With speculation on, every answer is the same as without, and drafts are accepted.

A policy that always asks and always verifies stands in for the one that weighs prices, so that what
is tried does not depend on how fast this machine is.
"""

import itertools
from collections import Counter

import pytest

import duetto.build
from duetto import LLM, SamplingParams
from duetto.evals.worlds.prompt import user_turn
from duetto.evals.worlds.world import WorldOptions, draw_world
from duetto.scheduler.drafts import Ask

READER, DRAFT = "duetto-demo", "duetto-demo-draft"
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3, "top_p": 0.9},
    "warm": {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.4, "logprobs": 2},
    "hot": {"temperature": 1.2, "top_p": 0.9, "min_tokens": 6, "bad_words": ["e"]},
    "boiling": {"temperature": 3.0},  # the reader is so sure that less hardly changes an answer
}


class EveryStep:
    """Asks for as many drafts as may be, and verifies all; each request has its method in turn."""

    is_on = True

    def __init__(self, max_drafts):
        self.max_drafts, self.methods = dict(max_drafts), {}
        self.turns = itertools.cycle(max_drafts)
        self.counts = Counter()

    def choose(self, candidates, shape, room, limit_s=None):
        return {c.request.request_id: len(c.drafts) for c in candidates}

    def ask(self, planned):
        return {p.request.request_id: self.ask_for(p) for p in planned}

    def ask_for(self, planned):
        name = planned.request.request_id
        if name not in self.methods:
            self.methods[name] = next(self.turns)
        method = self.methods[name]
        return Ask(method, min(planned.num_left, self.max_drafts[method]))

    def learn(self, outcomes, drafting_s):
        for outcome in outcomes:
            self.counts["drafts"] += outcome.num_drafts
            self.counts["accepted"] += max(0, len(outcome.tokens) - 1)
            self.counts["proposed"] += outcome.num_proposed
            self.counts["tokens"] += len(outcome.tokens)
            self.counts["steps"] += bool(outcome.tokens)

    def forget(self, request):
        self.counts["preemptions"] += request.timings.num_preemptions
        self.methods.pop(request.request_id, None)


@pytest.fixture
def policies(monkeypatch):
    """The policies that were made, in their order."""
    made = []

    def policy(loaded, *_):
        made.append(EveryStep(loaded.max_drafts) if loaded.max_drafts else None)
        return made[-1]

    monkeypatch.setattr(duetto.build, "_draft_policy", policy)
    return made


def told(outputs):
    return [
        (answer.token_ids, answer.finish_reason, answer.stop_reason, answer.text, answer.logprobs)
        for output in outputs
        for answer in output.outputs
    ]


def answers(model, prompts, samplings, **args):
    args = {"kv_cache_memory_bytes": 2**24, "max_num_batched_tokens": 64} | args
    with LLM(model, **args) as llm:
        first = told(llm.generate(prompts, samplings))
        again = told(llm.generate(prompts, samplings))  # with prefix hits, and answers to recall
    return first + again


def questions(count):
    """Documents with a question each, as the reader knows them."""
    with LLM(READER, kv_cache_memory_bytes=2**24) as llm:
        codec = llm.get_tokenizer()
        made = []
        for seed in range(count):
            world = draw_world(seed, "dev", WorldOptions(num_documents=3))
            turn = user_turn(world.documents, world.questions[seed % 3].text)
            text = codec.render_chat([turn])
            made.append({"prompt_token_ids": codec.encode(text, add_special_tokens=False)})
    return made


METHODS = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "suffix": {"method": "suffix"},
    "draft_model": {"model": DRAFT, "num_speculative_tokens": 4},
    "all": [{"method": "ngram"}, {"method": "suffix"}, {"model": DRAFT}],
}


@pytest.fixture(scope="module")
def asked():
    return questions(4)


def samplings(name, count):
    return [
        SamplingParams(**SAMPLINGS[name], max_tokens=14, seed=i, ignore_eos=i % 2 == 0)
        for i in range(count)
    ]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_demo_reader_answers_the_same(asked, policies, method, sampling):
    given = samplings(sampling, len(asked))
    plain = answers(READER, asked, given)
    assert answers(READER, asked, given, speculative_config=METHODS[method]) == plain
    assert policies[0] is None and policies[1].counts["drafts"] > 0
    assert policies[1].counts["accepted"] > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_that_drafts_for_itself_is_always_right(tiny_model, policies, backend):
    """Same weights, same KV, same random stream: so whatever is wrong in the draft's KV shows.

    Several answers per prompt share blocks, and blocks change hands for want of room.
    """
    prompts = ["def f(x):\n    return", "import os, sys", "class Some(Thing): pass # " * 3]
    given = [
        SamplingParams(n=3, temperature=t, top_p=0.95, max_tokens=20, seed=1, prompt_logprobs=1)
        for t in (0.0, 0.7, 1.1)
    ]
    args = {"backend": backend, "block_size": 4, "max_model_len": 100, "max_num_seqs": 6}
    args["kv_cache_memory_bytes"] = (160 if backend == "reference" else 80) * 1024  # 40 blocks
    plain = answers(tiny_model, prompts, given, **args)
    assert answers(tiny_model, prompts, given, speculative_model=str(tiny_model), **args) == plain
    counts = policies[1].counts
    assert counts["drafts"] > 200
    assert counts["accepted"] == counts["drafts"]
    assert counts["preemptions"] > 0


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model"])
@pytest.mark.parametrize("nonsense", [RuntimeError("planted"), (10**6,), (-1,), tuple(range(99))])
def test_a_proposer_out_of_its_mind_costs_its_drafts_only(
    asked, policies, monkeypatch, method, nonsense
):
    def propose(self, requests):
        if isinstance(nonsense, Exception):
            raise nonsense
        return [nonsense] * len(requests)

    given = samplings("warm", len(asked))
    plain = answers(READER, asked[:2], given[:2])
    for name in ("NgramProposer", "SuffixProposer", "DraftModelProposer"):
        monkeypatch.setattr(f"duetto.runner.proposers.load.{name}.propose", propose)
    mad = answers(READER, asked[:2], given[:2], speculative_config=METHODS[method])
    assert mad == plain
    assert policies[1].counts["proposed"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_so_it_does_with_the_policy_that_weighs_prices(asked, method):
    given = samplings("warm", len(asked))
    plain = answers(READER, asked, given)
    assert answers(READER, asked, given, speculative_config=METHODS[method]) == plain


def test_temperature_changes_what_the_reader_says(asked):
    """Else equality at a temperature would be equality of greedy answers once more."""
    greedy = answers(READER, asked, samplings("greedy", len(asked)))
    assert answers(READER, asked, samplings("boiling", len(asked))) != greedy
