"""Which row of logits goes to whom, with a backend whose logits are a table."""

import math

import numpy as np
import pytest

from duetto.core.batch import RequestResult, SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.sampling_params import SamplingParams
from duetto.program.ops import Ref
from duetto.program.program import KVSpec, Program
from duetto.runner.model_runner import ModelRunner
from duetto.runner.sampler import sample_token, token_logprob

VOCAB = 40
BLOCK_SIZE = 4
NUM_BLOCKS = 64
PROGRAM = Program((), {}, {}, (KVSpec(1, 2),), Ref("logits", 0, VOCAB), 1024)
TABLE = np.random.default_rng(0).normal(size=(997, VOCAB)).astype(np.float32) * 3
NAN_TOKEN = 39  # every other token has finite logits


def logits_after(token_id, position):
    row = TABLE[(token_id * 31 + position) % len(TABLE)]
    return np.full_like(row, math.nan) if token_id == NAN_TOKEN else row


class TableBackend:
    """Logits are a function of a row's token and position alone."""

    def __init__(self):
        self.allocated = []

    def allocate_kv(self, num_blocks, block_size, dtype):
        self.allocated.append((num_blocks, block_size, dtype))
        return "the arena"

    def run(self, step, kv):
        assert kv == "the arena"
        tokens, positions = step.token_ids[step.logit_rows], step.positions[step.logit_rows]
        rows = [logits_after(*pair) for pair in zip(tokens, positions, strict=True)]
        return np.array(rows, dtype=np.float32).reshape(-1, VOCAB)


def runner(backend=None):
    return ModelRunner(PROGRAM, backend or TableBackend(), NUM_BLOCKS, BLOCK_SIZE, "float32")


def execute(*requests):
    """The result of each request of one step, by its id."""
    results = runner().submit(ScheduledBatch(requests)).result().results
    return dict(zip([r.request_id for r in requests], results, strict=True))


def sampling(seed=0, num_output_tokens=0, **params):
    params.setdefault("temperature", 0.0)
    return SamplingInput(SamplingParams(**params), seed, num_output_tokens)


def request(name, token_ids, start, first_block, *rows, targets=(), num_top=0):
    """A request with its own run of blocks."""
    blocks = range(first_block, first_block + -(-(start + len(token_ids)) // BLOCK_SIZE))
    return ScheduledRequest(
        name, tuple(token_ids), start, tuple(blocks), rows, tuple(targets), num_top
    )


GREEDY = request("greedy", [7], 9, 0, sampling())
SEEDED = request("seeded", [3, 4, 5], 2, 10, sampling(seed=8, temperature=1.2, top_p=0.9))
CHUNK = request("chunk", [1, 2], 0, 20)
SCORED = request("scored", [9, 8, 6], 0, 30, sampling(logprobs=2), targets=[8, 6], num_top=3)
SIBLING = request("sibling", [3, 4, 5], 2, 40, sampling(seed=9, temperature=1.2, top_p=0.9))
MIXED = (GREEDY, SEEDED, CHUNK, SCORED, SIBLING)


def test_each_request_is_sampled_from_the_logits_of_its_own_last_token():
    output = execute(*MIXED)
    for item in (GREEDY, SEEDED, SCORED, SIBLING):
        position = item.num_computed_tokens + len(item.token_ids) - 1
        expected = sample_token(logits_after(item.token_ids[-1], position), item.rows[0])
        assert output[item.request_id].tokens == (expected,)
    assert not output["chunk"].tokens
    assert not any(result.error for result in output.values())


def test_each_prompt_token_is_scored_by_the_row_before_it():
    expected = (
        token_logprob(logits_after(9, 0), 8, 3),
        token_logprob(logits_after(8, 1), 6, 3),
    )
    assert {name: r.scores for name, r in execute(*MIXED).items() if r.scores} == {
        "scored": expected
    }


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 11])
def test_prompt_logprobs_are_the_same_over_any_borders_of_chunks(chunk):
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, 39, size=11)]
    whole = execute(request("r", prompt, 0, 0, sampling(), targets=prompt[1:], num_top=2))["r"]
    scores, tokens = [], ()
    for start in range(0, len(prompt), chunk):
        end = min(start + chunk, len(prompt))
        last = [sampling()] if end == len(prompt) else []
        targets = prompt[start + 1 : end + 1]
        part = request("r", prompt[start:end], start, 0, *last, targets=targets, num_top=2)
        result = execute(GREEDY_ELSEWHERE, part)["r"]
        scores += result.scores
        tokens += result.tokens
    assert tuple(scores) == whole.scores
    assert len(scores) == len(prompt) - 1
    assert tokens == whole.tokens


GREEDY_ELSEWHERE = request("other", [7], 9, 50, sampling())


def test_a_request_gets_the_same_bits_alone_and_in_any_company():
    together, backwards = execute(*MIXED), execute(*MIXED[::-1])
    for item in MIXED:
        alone = execute(item)
        for company in (together, backwards):
            assert company[item.request_id] == alone[item.request_id]


def test_siblings_differ_by_their_seeds_only():
    outputs = {}
    for seed in range(12):
        item = SEEDED._replace(rows=(sampling(seed=seed, temperature=3.0),))
        outputs[seed] = execute(item)["seeded"]
    assert len(set(outputs.values())) > 3
    again = execute(SEEDED._replace(rows=(sampling(seed=5, temperature=3.0),)))
    assert again["seeded"] == outputs[5]


@pytest.mark.parametrize(
    "bad",
    [
        request("bad", [1, NAN_TOKEN], 0, 60, sampling(temperature=1.0)),
        request("bad", [NAN_TOKEN, 1], 0, 60, sampling(), targets=[1]),  # scored
        request("bad", [NAN_TOKEN, 1], 0, 60, targets=[1, 2]),  # samples nothing
        request(
            "bad", [1], 0, 60, sampling(allowed_token_ids=(2,))._replace(forbidden_token_ids=(2,))
        ),
    ],
)
def test_a_request_that_cannot_be_sampled_fails_alone(bad):
    good = execute(*MIXED)
    output = execute(*MIXED[:2], bad, *MIXED[2:])
    failed = output.pop("bad")
    assert not failed.tokens and not failed.scores
    assert "not finite" in failed.error or "allowed_token_ids" in failed.error
    assert output == good


def test_nan_in_rows_that_nobody_asked_for_is_not_looked_at():
    assert not execute(request("r", [NAN_TOKEN, 1], 0, 0, sampling()))["r"].error


def test_a_step_without_logits_computes_kv_only():
    assert execute(CHUNK) == {"chunk": RequestResult()}


def test_the_arena_is_allocated_once_and_nothing_else_is_kept():
    backend = TableBackend()
    executor = runner(backend)
    before = dict(vars(executor))
    first = executor.submit(ScheduledBatch(MIXED))
    assert executor.submit(ScheduledBatch(MIXED)) == first
    assert vars(executor) == before
    assert backend.allocated == [(NUM_BLOCKS, BLOCK_SIZE, "float32")]


def test_what_the_backend_raises_concerns_the_whole_step():
    class Broken(TableBackend):
        def run(self, step, kv):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runner(Broken()).submit(ScheduledBatch((GREEDY,)))
