"""The same answer in any company, by an engine that keeps a step in flight, steps recorded.

The axes of tests/test_same_answer.py, on few requests of a small model: kernels are interpreted.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from fakes import make_request
from kernels.models import backend_of
from kernels.recorder import LaunchRecorder
from small_models import GEMMA, Kind, Model, make_model
from test_same_answer import answers

from duetto.backends.cuda.backend import CudaBackend
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.runner.device_runner import DeviceRunner
from duetto.scheduler.scheduler import Scheduler

SMALL = GEMMA | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
BLOCK_SIZE, MAX_LEN = 8, 96
NUM_TOKENS = 5  # of each answer
HOW = ({"temperature": 0}, {"temperature": 1.0, "top_k": 20}, {"repetition_penalty": 1.3})


@cache
def small() -> tuple[CudaBackend, LaunchRecorder, Model]:
    with TemporaryDirectory() as name:
        model = make_model(Kind(SMALL, "reference", "float32", None, "float32"), Path(name))
    recorder = LaunchRecorder()
    weights = model.backend._weights  # type: ignore[attr-defined]
    backend = backend_of(model.program, weights, "float16", recorder=recorder, num_rows=4)
    return backend, recorder, model


def engine(**options: Any) -> Engine:
    backend, _, model = small()
    options = {"num_blocks": 40, "max_num_batched_tokens": MAX_LEN, "max_num_seqs": 4} | options
    config = SchedulerConfig(max_model_len=MAX_LEN, block_size=BLOCK_SIZE, **options)
    runner = DeviceRunner(model.program, backend, config.num_blocks, BLOCK_SIZE, "float16", depth=1)
    return Engine(Scheduler(config), runner, depth=1)


def requests() -> list[Request]:
    """One has log-probabilities, and one penalties: the host samples them."""
    prompts = [list(range(3, 3 + length)) for length in (1, 9, 40)]
    return [
        make_request(f"r{i}", prompt, NUM_TOKENS, seed=i, logprobs=3 if i == 1 else None, **how)
        for i, (prompt, how) in enumerate(zip(prompts, HOW, strict=True))
    ]


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    found = {}
    for request in requests():
        found |= answers(engine(enable_prefix_caching=False), [request])
    assert all(len(tokens) == NUM_TOKENS for tokens in found.values())
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7}, {"num_blocks": 8, "enable_prefix_caching": False}],
    ids=["batched", "chunked", "preempted"],
)
def test_in_company(alone, options):
    _, recorder, _ = small()
    before, runs = recorder.num_replays, engine(**options)
    assert answers(runs, requests()) == alone
    assert recorder.num_replays > before
    if options.get("num_blocks"):
        assert runs.scheduler.counts.num_preemptions


def test_with_arrivals_in_every_step_and_cached_blocks(alone):
    runs = engine()
    assert answers(runs, requests()[::-1], together=1) == alone
    assert answers(runs, requests()) == alone
    assert runs.scheduler.counts.num_hit_tokens
