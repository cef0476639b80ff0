"""A batch as arrays: every array against a loop, and the broken promises that must not pass."""

import numpy as np
import pytest

from duetto.core.batch import Look, SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.reuse import TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.runner.step_arrays import build_looks, build_step_arrays

BLOCK_SIZE = 4
SAMPLED = (SamplingInput(SamplingParams(), seed=0, num_output_tokens=0),)

DECODE = ScheduledRequest("decode", (70,), 9, (5, 3, 8), SAMPLED)
MIDDLE_CHUNK = ScheduledRequest("chunk", (10, 11, 12, 13, 14), 3, (2, 6), (), (11, 12, 13, 14, 15))
LAST_CHUNK = ScheduledRequest("last", (20, 21, 22), 0, (1,), SAMPLED, (21, 22))
UNSCORED = ScheduledRequest("unscored", (30, 31), 4, (9, 7, 4))
MIXED = ScheduledBatch((DECODE, MIDDLE_CHUNK, LAST_CHUNK, UNSCORED))


def looking(*ranges, method="attention"):
    return DECODE._replace(look=Look(method, tuple(TokenRange(*each) for each in ranges)))


def test_every_token_of_a_mixed_batch_is_placed_as_a_loop_would_place_it():
    step, _ = build_step_arrays(MIXED, BLOCK_SIZE)
    expected = []
    for request in MIXED.requests:
        for index, token_id in enumerate(request.token_ids):
            position = request.num_computed_tokens + index
            block = request.block_table[position // BLOCK_SIZE]
            expected.append((token_id, position, block * BLOCK_SIZE + position % BLOCK_SIZE))
    assert list(zip(step.token_ids, step.positions, step.slots, strict=True)) == expected
    assert step.query_starts.tolist() == [0, 1, 6, 9, 11]
    assert step.context_lens.tolist() == [10, 8, 3, 6]
    assert step.block_tables.tolist() == [[5, 3, 8], [2, 6, 0], [1, 0, 0], [9, 7, 4]]
    for name in step.__slots__:
        assert getattr(step, name).dtype == np.int32, name


def test_logit_rows_are_the_scored_rows_and_the_last_row_of_who_is_sampled():
    step, logit_starts = build_step_arrays(MIXED, BLOCK_SIZE)
    # decode: 0 | chunk: 1-5, all scored | last: 6 and 7 scored, 8 sampled | unscored: none
    assert step.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert logit_starts == (0, 1, 6, 9, 9)


def test_rows_between_the_scored_and_the_sampled_one_are_skipped():
    # A preempted request computes its prompt again with the output it had: 2 scored, 3 rows, 1.
    again = ScheduledRequest("again", (1, 2, 3, 90, 91, 92), 0, (0, 1), SAMPLED, (2, 3))
    step, logit_starts = build_step_arrays(ScheduledBatch((again, DECODE)), BLOCK_SIZE)
    assert step.logit_rows.tolist() == [0, 1, 5, 6]
    assert logit_starts == (0, 3, 4)


def test_drafts_have_a_row_each_after_that_of_the_token_before_them():
    verified = ScheduledRequest("v", (70, 71, 72), 9, (5, 3, 8), SAMPLED * 3, num_drafts=2)
    step, logit_starts = build_step_arrays(ScheduledBatch((LAST_CHUNK, verified)), BLOCK_SIZE)
    assert step.logit_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert logit_starts == (0, 3, 6)
    assert step.positions.tolist() == [0, 1, 2, 9, 10, 11]
    assert step.slots.tolist()[3:] == [8 * 4 + 1, 8 * 4 + 2, 8 * 4 + 3]


def test_a_request_with_gaps_is_a_run_for_each_of_its_intervals():
    gaps = ScheduledRequest("g", (1, 2, 3, 4), 2, (5, 3, 8), SAMPLED, positions=(2, 3, 7, 10))
    step, logit_starts = build_step_arrays(ScheduledBatch((DECODE, gaps, LAST_CHUNK)), BLOCK_SIZE)
    assert step.positions.tolist() == [9, 2, 3, 7, 10, 0, 1, 2]
    assert step.slots.tolist()[1:5] == [5 * 4 + 2, 5 * 4 + 3, 3 * 4 + 3, 8 * 4 + 2]
    assert step.query_starts.tolist() == [0, 1, 3, 4, 5, 8]
    assert step.context_lens.tolist() == [10, 4, 8, 11, 3]
    assert step.block_tables.tolist()[1:4] == [[5, 3, 8]] * 3
    assert step.logit_rows.tolist() == [0, 4, 5, 6, 7] and logit_starts == (0, 1, 2, 5)


def test_looks_name_their_runs_and_positions():
    gaps = looking((0, 2), (5, 9))._replace(
        token_ids=(1, 2, 3), num_computed_tokens=2, positions=(2, 3, 9)
    )
    requests = (LAST_CHUNK, gaps, UNSCORED._replace(look=Look("attention", (TokenRange(1, 5),))))
    build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)  # all of it may be asked for
    first, second = build_looks(requests)
    assert (first.first, first.last, first.positions.tolist()) == (1, 3, [0, 1, 5, 6, 7, 8])
    assert (second.first, second.last, second.positions.tolist()) == (3, 4, [1, 2, 3, 4])
    assert first.positions.dtype == np.int32
    assert build_looks((DECODE, LAST_CHUNK)) == []


def test_a_batch_that_wants_no_logits_has_no_rows():
    step, logit_starts = build_step_arrays(ScheduledBatch((UNSCORED,)), BLOCK_SIZE)
    assert step.logit_rows.tolist() == []
    assert logit_starts == (0, 0)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ((), "empty batch"),
        ((DECODE, DECODE), "a request twice"),
        ((DECODE._replace(num_computed_tokens=12),), "too short"),
        # Beyond its own blocks, where the widest table of the batch is padded with block 0:
        ((DECODE, LAST_CHUNK._replace(num_computed_tokens=3)), "too short"),
        ((DECODE._replace(token_ids=()),), "nothing to compute"),
        ((LAST_CHUNK._replace(positions=(0, 2, 3)),), "with gaps cannot be scored"),
        ((UNSCORED._replace(positions=(4, 4)),), "do not ascend"),
        ((UNSCORED._replace(positions=(5, 6)),), "the first position"),
        ((UNSCORED._replace(positions=(4,)),), "not one position for each token"),
        ((UNSCORED._replace(positions=(4, 12)),), "too short"),
        ((LAST_CHUNK._replace(prompt_logprob_targets=(21, 22, 23)),), "more logit rows"),
        ((LAST_CHUNK, DECODE._replace(num_computed_tokens=1, block_table=(1,))), "one slot"),
        ((looking((0, 3), (2, 5)),), "do not ascend"),
        ((looking((3, 3)),), "do not ascend"),
        ((looking((-1, 3)),), "do not ascend"),
        ((looking((0, 3), (7, 13)),), "beyond its blocks"),
        ((looking(),), "a look at nothing"),
        ((looking((0, 3), method="none"),), "unknown kind"),
        ((looking(method="deviation"),), "has no logits"),
        ((looking((0, 3), method="deviation")._replace(rows=()),), "own tokens"),
    ],
)
def test_a_broken_promise_of_the_scheduler_never_becomes_an_array(requests, message):
    with pytest.raises(AssertionError, match=message):
        build_step_arrays(ScheduledBatch(requests), BLOCK_SIZE)
