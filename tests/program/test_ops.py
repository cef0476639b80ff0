"""What operations say of themselves is what they do, on the reference backend."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from oracle.cases import CASES, CASES_BY_NAME, Case
from program.operations import every_operation
from program.rewrites.models import of_case

from duetto.backends.backend import StepArrays
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.ops import Run, compute
from duetto.pricing.work import work_of
from duetto.program.op import Op
from duetto.program.ops import Linear, RmsNorm
from duetto.program.program import Program
from duetto.program.shape import SELECTED, BatchShape, Precision, RequestShape, num_rows

CASE = [CASES_BY_NAME[name] for name in ("gemma2", "llama-biases", "qwen3", "phi3", "llama-tied")]
NUM_TOKENS, SELECTED_ROWS = 5, (1, 4)
POISON = np.float32(1e30)


def ints(values: Any) -> Any:
    return np.asarray(values, np.int32)


STEP = StepArrays(  # three tokens of a request and two of another, from their first on
    token_ids=ints([3, 1, 4, 1, 5]),
    positions=ints([0, 1, 2, 0, 1]),
    slots=ints([0, 1, 2, 4, 5]),
    query_starts=ints([0, 3, 5]),
    context_lens=ints([3, 2]),
    block_tables=ints([[0], [1]]),
    logit_rows=ints(SELECTED_ROWS),
)


def run_alone(program: Program, weights: Any, op: Op, outside: np.float32) -> tuple[Run, Run]:
    """Before and after an operation, over buffers that hold `outside` where it does not read."""
    run = Run(STEP, _arena(program), weights, program.buffers)
    random = np.random.RandomState(7)
    for name in {ref.buffer for ref in (*op.reads, *op.writes)}:
        rows = len(SELECTED_ROWS) if _is_selected(program, name) else NUM_TOKENS
        numbers = np.full((rows, program.buffers[name]), outside)
        for ref in op.reads:
            if ref.buffer == name:
                values = random.standard_normal((rows, ref.width))
                numbers[:, ref.start : ref.start + ref.width] = values
        run.buffers[name] = numbers
    before = dataclasses.replace(run, buffers={n: a.copy() for n, a in run.buffers.items()})
    compute(op, run)
    return before, run


def _is_selected(program: Program, buffer: str) -> bool:
    return any(
        one.rows == SELECTED and any(ref.buffer == buffer for ref in one.writes)
        for one in program.ops
    )


def _arena(program: Program) -> KVArena:
    arena = allocate(program.kv, 2, 4, "float32")
    random = np.random.RandomState(1)
    for rows in (*arena.keys, *arena.values):
        rows.numbers[:] = random.standard_normal(rows.numbers.shape)
    return arena


def ops_of(case: Case) -> list[tuple[Program, Any, Op]]:
    program, weights = of_case(case)
    return [(program, weights, op) for op in program.ops]


@pytest.mark.parametrize("case", CASE, ids=lambda case: case.name)
def test_an_operation_reads_and_writes_what_it_says(case: Case) -> None:
    for program, weights, op in ops_of(case):
        before, after = run_alone(program, weights, op, np.float32(0))
        _, poisoned = run_alone(program, weights, op, POISON)
        for name, numbers in after.buffers.items():
            written = np.zeros(program.buffers[name], bool)
            for ref in op.writes:
                if ref.buffer == name:
                    written[ref.start : ref.start + ref.width] = True
            # What it does not read changes nothing that it writes.
            np.testing.assert_array_equal(
                numbers[:, written], poisoned.buffers[name][:, written], err_msg=str(op)
            )
            # What it does not say that it writes stays.
            np.testing.assert_array_equal(
                numbers[:, ~written], before.buffers[name][:, ~written], err_msg=str(op)
            )
            if written.any():
                assert len(numbers) == num_rows(SHAPE, op.rows)


@pytest.mark.parametrize("case", CASE, ids=lambda case: case.name)
def test_an_operation_touches_the_kv_that_it_says(case: Case) -> None:
    for program, weights, op in ops_of(case):
        untouched = _arena(program)
        _, after = run_alone(program, weights, op, np.float32(0))
        for layer, (was, now) in enumerate(zip(untouched.keys, after.kv.keys, strict=True)):
            changed = not np.array_equal(was.numbers, now.numbers)
            assert changed == (op.kv is not None and op.kv.writes and op.kv.layer == layer)


SHAPE = BatchShape((RequestShape(3, 0, 1), RequestShape(2, 0, 1)))
SHAPES = [
    SHAPE,
    BatchShape((RequestShape(1, 0),)),
    BatchShape((RequestShape(7, 100, 3), RequestShape(1, 46), RequestShape(60, 1))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_work_is_the_price(case: Case) -> None:
    """Of a call, for every shape: costs are as affine as pricing takes them to be."""
    precision = Precision(0.5625, 2.0, 1.03125)
    for op in of_case(case)[0].ops:
        work = work_of(op, precision)
        for shape in SHAPES:
            window = op.kv.window if op.kv is not None else None
            pairs = sum(one.attended_pairs(window) for one in shape.requests)
            read = sum(one.read_tokens(window) for one in shape.requests)
            rows, cost = num_rows(shape, op.rows), op.cost(shape, precision)
            assert work.flops(rows, pairs) == cost.flops
            assert work.bytes_moved(rows, read) == pytest.approx(cost.bytes_moved, abs=3)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_work_of_a_narrow_window(window: int) -> None:
    program, _ = of_case(CASES_BY_NAME["mistral-window"])
    op = next(op for op in program.ops if op.kv is not None and op.kv.window is not None)
    narrow: Any = dataclasses.replace(op, window=window)  # type: ignore[call-arg]
    work = work_of(narrow, Precision())
    for shape in SHAPES:
        pairs = sum(one.attended_pairs(window) for one in shape.requests)
        read = sum(one.read_tokens(window) for one in shape.requests)
        cost = narrow.cost(shape, Precision())
        assert work.flops(shape.num_tokens, pairs) == cost.flops
        assert work.bytes_moved(shape.num_tokens, read) == cost.bytes_moved


def test_every_operation_says_all_of_itself() -> None:
    found = set()
    for case in CASES:
        program, _ = of_case(case)
        for op in program.ops:
            found.add(type(op))
            assert op.kind
            assert op.label(program)
            assert op.reads or op.weights
            assert op.writes or (op.kv is not None and op.kv.writes)
            assert op.main is op
            assert op.hops == 0
            assert set(op.weights) | set(op.initial) <= set(program.weights)
            for ref in (*op.reads, *op.writes):
                assert 0 <= ref.start < ref.start + ref.width <= program.buffers[ref.buffer]
    assert found == every_operation()


def test_rows_that_no_step_has_are_refused() -> None:
    program, _ = of_case(CASES_BY_NAME["llama"])
    norm = next(op for op in program.ops if isinstance(op, RmsNorm))
    linear = next(op for op in program.ops if isinstance(op, Linear))
    for op in (norm, linear):
        named = dataclasses.replace(op, rows="blended")
        with pytest.raises(ValueError, match="'blended'; it has 'all' and 'selected'"):
            named.cost(SHAPE, Precision())
