"""The default efficiencies on other devices and in later engines, with nothing fitted to them.

A few of the rows of benchmarks/planner_published.py, which names their sources.
"""

from statistics import median

import pytest
from pricing.prices import decode, prefill, program

from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.gpus import HARDWARE
from duetto.program.shape import Precision

EIGHT_BITS = Deployment(precision=Precision(1.0, 2.0, 1.0), arithmetic="float8", graphs=True)
GRAPHS = Deployment(graphs=True)

# Device, model, deployment, batch, tokens, published ms.
FIRST_TOKENS = [
    ("a100-80g", "llama-2-7b", GRAPHS, 1, 2048, 133.0),
    ("a100-80g", "llama-2-13b", GRAPHS, 1, 2048, 242.0),
    ("h100", "llama-2-7b", EIGHT_BITS, 1, 2048, 36.0),
    ("l40s", "llama-2-7b", EIGHT_BITS, 1, 2048, 73.0),
]
NEXT_TOKENS = [
    ("a100-80g", "llama-2-7b", GRAPHS, 16, 192, 11.0),
    ("a100-80g", "llama-2-7b", GRAPHS, 32, 2112, 31.0),  # mostly attention
    ("a100-80g", "llama-2-13b", GRAPHS, 64, 192, 24.0),
    ("h100", "llama-3-8b", GRAPHS, 1, 600, 7.05),
    ("l4", "qwen2.5-0.5b", GRAPHS, 32, 320, 7.1),
]


@pytest.mark.parametrize(("rows", "shape"), [(FIRST_TOKENS, prefill), (NEXT_TOKENS, decode)])
def test_devices_and_engines_that_nothing_was_fitted_to(rows, shape):
    ratios = []
    for device, name, deployment, batch, tokens, ms in rows:
        model = CostModel(program(name), HARDWARE[device], deployment)
        ratios.append(model.step_time(shape(batch, tokens)) * 1e3 / ms)
    assert median(ratios) == pytest.approx(1, abs=0.15)
    assert all(0.75 < ratio < 1.35 for ratio in ratios)
