"""Live against transformers: it writes each checkpoint and computes every row of the logits."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from oracle.cases import CASES, NUM_GREEDY, Case, prompts
from oracle.feed import Feed, greedy
from oracle.fixture_io import expected
from oracle.fixture_io import write_checkpoint as write_fixture

from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.models.programs import load_program

TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.oracle,
    # What torch and transformers warn of is theirs.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    """Imported here, as its import takes long and most test runs do without."""
    return pytest.importorskip(
        "oracle.in_transformers", reason="torch or transformers is absent: make oracle"
    )


def reference(directory: Path, case: Case) -> ReferenceBackend:
    _, program = load_program(directory, case.max_model_len)
    return ReferenceBackend(program, load_weights(directory, program, "float32"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_transformers(case: Case, transformers: ModuleType, tmp_path: Path) -> None:
    transformers.write_checkpoint(case, tmp_path)
    if case.num_shards > 1:
        assert (tmp_path / "model.safetensors.index.json").exists()
    oracle = transformers.TransformersModel(case, tmp_path)
    feed = Feed(reference(tmp_path, case), len(prompts()))
    logits = feed.in_chunks(prompts(), 64)
    for prompt, got in zip(prompts(), logits, strict=True):
        assert np.abs(got - oracle.logits(prompt)).max() <= TOLERANCE
    got_tokens = greedy(feed, [rows[-1] for rows in logits], NUM_GREEDY)
    assert got_tokens == [oracle.greedy(prompt) for prompt in prompts()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fixtures_are_what_transformers_computes(
    case: Case, transformers: ModuleType, tmp_path: Path
) -> None:
    """The committed fixtures' checkpoints load in transformers and give the committed logits."""
    write_fixture(case, tmp_path)
    oracle = transformers.TransformersModel(case, tmp_path)
    want = expected(case)
    got = np.stack([oracle.logits(prompt)[-1] for prompt in want.prompts])
    assert np.abs(got - want.last_logits).max() <= TOLERANCE / 10
