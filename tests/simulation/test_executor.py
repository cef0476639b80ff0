"""Virtual time spent at a price, and prices of stretches that are those of their steps."""

from itertools import islice
from pathlib import Path

import pytest
from fakes import make_request

from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.sampling_params import SamplingParams
from duetto.models.find import LARGE_SHAPES, find_program
from duetto.models.programs import build_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.gpus import HARDWARE
from duetto.program.program import Program
from duetto.simulation.executor import (
    SimulatedExecutor,
    by_shape,
    next_token_times,
    replayed,
    step_by_step,
    token_of,
)
from duetto.simulation.virtual_clock import VirtualClock


def with_window() -> Program:
    """A model in which every attention but the first sees 100 tokens."""
    shape = LARGE_SHAPES["qwen2.5-7b"] | {
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    }
    return build_program(parse_config(JsonSection(Path("config.json"), shape)))


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("program", [find_program("llama-3-8b"), with_window()])
def test_a_stretch_costs_what_its_steps_cost(program: Program, tp: int, pp: int) -> None:
    layout = Deployment(tensor_parallel=tp, pipeline_parallel=pp)
    model = CostModel(program, HARDWARE["h100"].ideal(), layout)
    for pasts in ([5], [1, 99, 100, 101, 7000], list(range(1, 600, 3))):
        fast = list(islice(next_token_times(model)(pasts), 40))
        slow = list(islice(step_by_step(model.step_time)(pasts), 40))
        assert fast == slow  # every bit, as simulations must be equal
        assert fast[-1] > fast[0]


def item(request_id: str, num_tokens: int, seed: int | None) -> ScheduledRequest:
    rows = () if seed is None else (SamplingInput(SamplingParams(), seed, 0),)
    return ScheduledRequest(request_id, (1,) * num_tokens, 0, (0,), rows)


def test_an_executor_spends_the_price_and_answers_who_is_to_be_sampled() -> None:
    clock = VirtualClock(10.0)
    executor = SimulatedExecutor(lambda batch: 0.5 * batch.num_tokens, clock)
    batch = ScheduledBatch((item("a", 3, 7), item("b", 4, None)))
    given, nothing = executor.submit(batch).result().results
    assert clock() == 13.5
    assert [token.token_id for token in given.tokens] == [-9]  # and never PLACEHOLDER, -1
    assert not nothing.tokens
    assert token_of(make_request(seed=7)) == -9


def test_replayed_times_come_in_turn() -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor(by_shape(replayed([1.0, 0.25])), clock)
    batch = ScheduledBatch((item("a", 3, 7),))
    executor.submit(batch)
    assert clock() == 1
    executor.submit(batch)
    assert clock() == 1.25
