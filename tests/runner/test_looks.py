"""A batch in which some requests look: each gets what it gets alone, beside what it computes."""

from itertools import permutations

import numpy as np
import pytest
from program.rewrites.models import odd
from small_models import BLOCK_SIZE, KINDS, Model, make_model

from duetto.backends.reference import ReferenceBackend
from duetto.core.batch import (
    PLACEHOLDER,
    KVMove,
    Look,
    RequestResult,
    SamplingInput,
    ScheduledBatch,
    ScheduledRequest,
)
from duetto.core.reuse import TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.program.looks import why_no_deviation
from duetto.runner.model_runner import ModelRunner

LENGTH = 40
PAST = 33  # tokens that have been computed before
SAMPLED = (SamplingInput(SamplingParams(temperature=0.0, logprobs=3), 0, 0),)
TEXT = TokenRange(20, 38)  # where a text goes in the request that looks how far it deviates
TEXT_BLOCKS = (40, 41, 42)  # and where it lies alone
LOOK = Look("attention", (TokenRange(1, 9), TokenRange(20, 32)))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def some(name: str, first_block: int, start: int, end: int) -> ScheduledRequest:
    """Tokens start ... end of a request of 40."""
    ids = np.random.RandomState(first_block).randint(0, 41, LENGTH).tolist()
    table = tuple(range(first_block, first_block + LENGTH // BLOCK_SIZE))
    rows = SAMPLED if end == LENGTH else ()
    return ScheduledRequest(name, tuple(ids[start:end]), start, table, rows)


ASKING = some("asking", 0, PAST, LENGTH)._replace(look=LOOK)
PLAIN = some("plain", 10, PAST, LENGTH)
DEVIATING = some("deviating", 20, *TEXT)._replace(
    look=Look("deviation"), moves=(KVMove(TEXT_BLOCKS, 0, TEXT.end - TEXT.start, TEXT.start),)
)
MIXED = (ASKING, DEVIATING, PLAIN)


class Steps:
    """A runner whose requests are computed up to their last tokens; the text lies alone."""

    def __init__(self, program, backend, kv_dtype, depth=0) -> None:
        self.runner = ModelRunner(program, backend, 64, BLOCK_SIZE, kv_dtype, depth=depth)
        text = DEVIATING._replace(
            request_id="text", num_computed_tokens=0, block_table=TEXT_BLOCKS, look=None, moves=()
        )
        before = some("deviating", 20, 0, TEXT.start)
        self.step(text, some("asking", 0, 0, PAST), some("plain", 10, 0, PAST), before)

    def step(self, *requests: ScheduledRequest) -> dict[str, RequestResult]:
        results = self.runner.submit(ScheduledBatch(requests)).result().results
        return dict(zip([r.request_id for r in requests], results, strict=True))


def steps(model: Model, depth=0) -> Steps:
    return Steps(model.program, model.backend, model.kv_dtype, depth)


def test_each_gets_what_it_gets_alone(model):
    alone = {r.request_id: steps(model).step(r)[r.request_id] for r in MIXED}
    for order in permutations(MIXED):
        assert steps(model).step(*order) == alone
    assert [len(alone[r.request_id].looked) for r in MIXED] == [20, 18, 0]
    assert [len(alone[r.request_id].tokens) for r in MIXED] == [1, 0, 1]
    assert not any(result.error for result in alone.values())
    assert min(alone["asking"].looked) >= 0 and all(x % 1 == 0 for x in alone["asking"].looked)


def test_who_looks_at_attention_samples_what_it_would(model):
    [looked] = steps(model).step(ASKING).values()
    [plain] = steps(model).step(ASKING._replace(look=None)).values()
    assert looked._replace(looked=()) == plain and plain.tokens


def test_moves_come_first(model):
    """A moved text deviates a little, since it was computed without what is before it; where none
    was moved, by all that a key and a value are."""
    moved = steps(model).step(DEVIATING)["deviating"].looked
    not_moved = steps(model).step(DEVIATING._replace(moves=()))["deviating"].looked
    assert 0 < sum(moved) < sum(not_moved)


def test_a_deviation_leaves_what_is_right_in_the_first_layers(model):
    ours, others = steps(model), steps(model)
    ours.step(DEVIATING)
    again = ours.step(DEVIATING._replace(moves=()))["deviating"].looked
    assert again == (0.0,) * 18
    last = some("deviating", 20, TEXT.end, LENGTH)
    for each in (ours, others):
        each.step(some("deviating", 20, *TEXT))  # through all layers
    assert ours.step(last) == others.step(last)


def test_a_look_that_no_number_answers_is_that_requests_error(tmp_path):
    ours = steps(make_model(KINDS[0], tmp_path))
    expected = ours.step(PLAIN)["plain"]
    ours.runner._kv.keys[0].numbers[1] = np.nan  # of the block of positions 8 to 15 of `asking`
    found = ours.step(ASKING._replace(rows=()), PLAIN)
    assert found["plain"] == expected
    assert found["asking"].error is not None and "not finite" in found["asking"].error
    assert not found["asking"].looked


def test_what_lies_where_nothing_was_brought_is_nobodys_error(tmp_path):
    model = make_model(KINDS[0], tmp_path)
    ours, others = steps(model), steps(model)
    expected = others.step(DEVIATING)["deviating"]
    block = DEVIATING.block_table[TEXT.end // BLOCK_SIZE]
    ours.runner._kv.keys[1].numbers[block] = np.nan  # of somebody who had it before
    longer = some("deviating", 20, TEXT.start, TEXT.end + 1)
    found = ours.step(longer._replace(look=DEVIATING.look, moves=DEVIATING.moves))["deviating"]
    assert found.error is None and np.isnan(found.looked[-1])
    num_told = TEXT.end - TEXT.start
    assert found.looked[:num_told] == expected.looked


def test_with_one_layer_a_look_at_deviations_is_that_requests_error():
    program, weights = odd(num_hidden_layers=1)
    assert why_no_deviation(odd()[0]) is None
    ours, others = (Steps(program, ReferenceBackend(program, weights), "float32") for _ in range(2))
    found = ours.step(*MIXED)
    assert found.pop("deviating") == RequestResult(error=why_no_deviation(program))
    assert found == others.step(ASKING, PLAIN)


def test_a_step_behind_one_that_looks_knows_what_that_one_sampled(model):
    ours = steps(model, depth=1)
    sampled = ours.step(*MIXED)["plain"].tokens[0].token_id
    following = PLAIN._replace(
        token_ids=(PLACEHOLDER,),
        num_computed_tokens=LENGTH,
        block_table=(*PLAIN.block_table, 50),
    )
    placed = ours.step(following)
    assert ours.step(following._replace(token_ids=(sampled,))) == placed
