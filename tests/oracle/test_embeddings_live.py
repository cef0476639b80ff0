"""Live against transformers: the last token's hidden state of a Qwen 3 model, at length 1."""

from pathlib import Path

import numpy as np
import pytest
from oracle.cases import CASES, prompts
from test_same_embedding import embeddings, numbers, pooling_request

from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.models.programs import load_program
from duetto.program.rewrites.headless import headless
from duetto.runner.model_runner import ModelRunner
from duetto.scheduler.scheduler import Scheduler

TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.oracle,
    # What torch and transformers warn of is theirs.
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_agrees_with_transformers(tmp_path: Path, *, has_prefix: bool) -> None:
    """Also of a base model that is saved alone, whose tensors have no `model.` before them, as
    sentence-transformers saves it."""
    transformers = pytest.importorskip(
        "oracle.in_transformers", reason="torch or transformers is absent: make oracle"
    )
    case = next(case for case in CASES if case.name == "qwen3")
    transformers.write_checkpoint(case, tmp_path)
    base = transformers.base_model(tmp_path)
    if not has_prefix:
        base.save_pretrained(tmp_path)
    _, program = load_program(tmp_path, case.max_model_len)
    program = headless(program)
    backend = ReferenceBackend(program, load_weights(tmp_path, program, "float32"))
    config = SchedulerConfig(
        num_blocks=64, max_model_len=case.max_model_len, is_pooling=True, max_num_batched_tokens=20
    )
    runner = ModelRunner(program, backend, 64, config.block_size, "float32")
    texts = prompts()
    wanted = [transformers.last_state(base, text) for text in texts]
    requests = [pooling_request(f"r{index}", text) for index, text in enumerate(texts)]
    found = embeddings(Engine(Scheduler(config), runner), requests)
    for state, embedding in zip(wanted, found.values(), strict=True):
        assert numbers(embedding) == pytest.approx(state / np.linalg.norm(state), abs=TOLERANCE)
