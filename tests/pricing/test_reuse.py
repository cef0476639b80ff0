"""What moving KV and looking at it take, by the prices of the model that does it."""

import pytest

from duetto.core.shape import BatchShape, RequestShape
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.reuse import first_layers, look_share, reuse_prices, with_looks
from duetto.program.program import Program
from duetto.program.shape import Precision

HARDWARE = HardwareSpec(
    name="ideal",
    peaks={"bfloat16": 1e14},
    memory_bandwidth=1e12,
    memory_bytes=2**36,
    link_bandwidth=1e11,
)
SHAPE = BatchShape((RequestShape(512, 1024, 0),))


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(find_config("llama-3.2-1b"), None)


def model(program: Program, **options: int) -> CostModel:
    precision = Precision(weight_bytes=2.0, activation_bytes=2.0, kv_bytes=2.0)
    return CostModel(program, HARDWARE, Deployment(precision=precision, **options))  # type: ignore[arg-type]


def test_kv_is_read_and_written(program: Program) -> None:
    num_bytes = 2 * 16 * 2 * 8 * 64 * 2  # both ways; layers, keys and values, heads, numbers
    assert reuse_prices(model(program)).move_s == pytest.approx(num_bytes / 1e12)
    halved = reuse_prices(model(program, tensor_parallel=2)).move_s
    assert halved == pytest.approx(num_bytes / 2e12)


def test_a_look_goes_through_one_layer_and_a_part_of_the_next(program: Program) -> None:
    cut = first_layers(program)
    assert len(cut.kv) == 2 and cut.ops[-1].kv is not None
    assert (cut.ops[-1].kv.layer, cut.ops[-1].kv.writes) == (1, True)
    attended = [op.kv.layer for op in cut.ops if op.kv is not None and not op.kv.writes]
    assert attended == [0]
    look_s = reuse_prices(model(program)).look_time(SHAPE)
    layer_s = model(program).step_time(SHAPE) / 16
    assert layer_s < look_s < 1.5 * layer_s


def test_what_is_learned_of_steps_counts_a_look_as_its_share(program: Program) -> None:
    found = look_share(program)
    assert 1 / 16 < found.compute < 1.3 / 16 and found.context == 1 / 16
    look, whole = BatchShape((RequestShape(512, 0, 0, True),)), BatchShape((RequestShape(512, 0),))
    priced = with_looks(model(program))
    assert priced(whole) == model(program).step_time(whole)
    assert priced(look) == pytest.approx(priced(whole) * found.compute, rel=0.2)
    both = BatchShape((*whole.requests, *look.requests))
    assert priced(both) == priced(whole) + priced(look)


def test_a_model_of_one_layer_and_one_in_stages_have_prices(program: Program) -> None:
    one = first_layers(first_layers(program))
    assert one.ops == first_layers(program).ops
    staged = reuse_prices(model(program, pipeline_parallel=4))
    assert staged.look_time(SHAPE) == reuse_prices(model(program)).look_time(SHAPE)
