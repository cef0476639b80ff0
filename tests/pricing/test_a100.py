"""The default efficiencies against a few of others' measurements.

Of Splitwise's, rows that the fit has not seen; benchmarks/planner_a100.py has all. They are medians
of splitwise_a100.csv (Patel et al., Splitwise, ISCA 2024; splitwise-sim, MIT) and rows of
vidur_a100_llama3_8b_mlp.csv (Agrawal et al., Vidur, MLSys 2024; MIT).
"""

from statistics import median

import pytest
from pricing.prices import A100, decode, prefill, program

from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.gpus import HARDWARE
from duetto.pricing.hardware import HardwareSpec

# Model, TP, prompt, batch, prompt time and token time in ms (answers of 128 tokens).
SPLITWISE = [
    ("bloom-176b", 8, 256, 1, 99.2, 47.7),
    ("bloom-176b", 8, 512, 2, 286.8, 50.0),
    ("bloom-176b", 8, 512, 8, 1322.2, 53.0),
    ("bloom-176b", 8, 1024, 1, 289.2, 48.8),
    ("llama-2-70b", 2, 128, 1, 81.1, 53.7),
    ("llama-2-70b", 2, 512, 1, 196.9, 54.9),
    ("llama-2-70b", 2, 512, 4, 845.4, 60.5),
    ("llama-2-70b", 2, 2048, 1, 688.1, 54.9),
    ("llama-2-70b", 4, 256, 1, 78.6, 42.2),
    ("llama-2-70b", 4, 512, 2, 253.9, 45.0),
    ("llama-2-70b", 4, 1024, 1, 227.1, 44.9),
    ("llama-2-70b", 8, 128, 1, 65.3, 43.0),
    ("llama-2-70b", 8, 512, 1, 94.3, 44.9),
    ("llama-2-70b", 8, 512, 16, 2084.4, 50.4),
    ("llama-2-70b", 8, 8192, 1, 1549.8, 46.5),
]

# Our name, TP, tokens, median ms of one call.
VIDUR = [
    ("q+k+v_proj", 1, 8, 0.034),
    ("q+k+v_proj", 2, 1024, 0.117),
    ("o_proj", 1, 512, 0.085),
    ("o_proj", 8, 4096, 0.086),
    ("gate+up_proj", 1, 64, 0.173),
    ("gate+up_proj", 4, 2048, 0.534),
    ("down_proj", 1, 4096, 2.052),
    ("down_proj", 2, 256, 0.079),
    ("input_layernorm", 1, 512, 0.012),
    ("input_layernorm", 1, 4096, 0.107),
    ("gated_act", 1, 1024, 0.091),
    ("gated_act", 2, 4096, 0.174),
    ("embed", 1, 2048, 0.121),
]


def errors(hardware: HardwareSpec) -> tuple[list[float], list[float]]:
    prompt_errors, token_errors = [], []
    for name, tp, prompt, batch, prompt_ms, token_ms in SPLITWISE:
        model = CostModel(program(name), hardware, Deployment(tensor_parallel=tp))
        prompt_s = model.step_time(prefill(batch, prompt))
        token_s = model.step_time(decode(batch, prompt + 64))
        prompt_errors.append(abs(prompt_s / (prompt_ms / 1e3) - 1))
        token_errors.append(abs(token_s / (token_ms / 1e3) - 1))
    return prompt_errors, token_errors


def test_whole_steps_within_15_percent():
    prompt_errors, token_errors = errors(A100)
    assert median(prompt_errors) <= 0.15
    assert median(token_errors) <= 0.10


def test_datasheet_numbers_alone_are_far_off():
    prompt_errors, token_errors = errors(A100.ideal())
    assert median(prompt_errors) > 0.4
    assert median(token_errors) > 0.4


@pytest.mark.parametrize(("name", "tp", "tokens", "measured_ms"), VIDUR)
def test_single_operations(name, tp, tokens, measured_ms):
    model = CostModel(program("llama-3-8b"), A100, Deployment(tensor_parallel=tp))
    row = next(row for row in model.price(prefill(1, tokens)) if row.name == name)
    assert row.time_s / row.count * 1e3 == pytest.approx(measured_ms, rel=0.25)


def test_newer_devices_are_faster_and_carry_the_same_efficiencies():
    def times(name: str) -> tuple[float, float]:
        model = CostModel(program("llama-3-8b"), find_hardware(name), Deployment())
        return model.step_time(prefill(1, 2048)), model.step_time(decode(16, 4096))

    a100, h100, h200, l4 = map(times, ("a100", "h100", "h200", "l4"))
    assert a100[0] > h100[0] == pytest.approx(h200[0], rel=0.05)
    assert l4[1] > a100[1] > h100[1] > h200[1]
    assert len({spec.efficiencies for spec in HARDWARE.values()}) == 1
