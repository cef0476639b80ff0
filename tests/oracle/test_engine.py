"""The whole engine against what transformers computed: 64 greedy tokens after every prompt, in one
batch of mixed lengths, in chunks, with a cold and a warm prefix cache, and under preemption."""

import pytest
from fakes import make_request
from oracle.cases import CASES, NUM_GREEDY
from oracle.fixture_io import expected, write_checkpoint

from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.models.programs import load_program
from duetto.runner.model_runner import ModelRunner
from duetto.scheduler.scheduler import Scheduler

BLOCK_SIZE = 32
PLENTY = 64  # blocks; all prompts and answers of a case need about half


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory):
    case = request.param
    directory = tmp_path_factory.mktemp("checkpoint") / case.name
    write_checkpoint(case, directory)
    _, program = load_program(directory, case.max_model_len)
    backend = ReferenceBackend(program, load_weights(directory, program, "float32"))
    return program, backend, expected(case)


def make_engine(loaded, *, budget=512, num_blocks=PLENTY, **options):
    program, backend, _ = loaded
    config = SchedulerConfig(
        num_blocks=num_blocks,
        max_model_len=program.max_model_len,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=budget,
        **options,
    )
    runner = ModelRunner(program, backend, num_blocks, BLOCK_SIZE, "float32")
    return Engine(Scheduler(config), runner)


def generate(engine, prompts):
    requests = [make_request(f"r{i}", p, NUM_GREEDY, temperature=0) for i, p in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    return [list(request.output_token_ids) for request in requests]


def test_one_batch_of_mixed_lengths_cold_and_warm(loaded):
    engine, want = make_engine(loaded), loaded[2]
    assert generate(engine, want.prompts) == want.greedy
    hits_before = engine.scheduler.counts.num_hit_tokens
    assert generate(engine, want.prompts) == want.greedy
    assert engine.scheduler.counts.num_hit_tokens - hits_before >= 256  # the long prompt's blocks


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_in_chunks(loaded, budget):
    assert generate(make_engine(loaded, budget=budget), loaded[2].prompts) == loaded[2].greedy


def test_under_preemption(loaded):
    engine = make_engine(loaded, num_blocks=13, enable_prefix_caching=False)
    assert generate(engine, loaded[2].prompts) == loaded[2].greedy
    assert engine.scheduler.counts.num_preemptions > 0
