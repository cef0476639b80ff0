"""Steps that are timed have the shape that was asked for."""

import pytest

from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.op_times import BLOCK_SIZE, batch_of, num_slots
from duetto.runner.step_arrays import build_step_arrays

SHAPES = [
    [RequestShape(1, 0)],
    [RequestShape(1, 31), RequestShape(1, 32), RequestShape(1, 33)],
    [RequestShape(512, 100), RequestShape(1, 2048), RequestShape(5, 7, 5)],
    [RequestShape(33, 0, 0), RequestShape(2, 63, 1)],
]


@pytest.mark.parametrize("requests", SHAPES, ids=str)
def test_a_step_of_a_shape_has_that_shape(requests: list[RequestShape]) -> None:
    shape = BatchShape(tuple(requests))
    assert batch_of(shape).shape == shape
    step, _ = build_step_arrays(batch_of(shape), BLOCK_SIZE)
    assert len(step.token_ids) == shape.num_tokens
    assert len(step.logit_rows) == shape.num_logit_rows
    assert len(set(step.slots)) == shape.num_tokens and max(step.slots) < num_slots(shape)
