"""Write tests/oracle/fixtures anew: `python tests/oracle/make_fixtures.py [case ...]`.

Needs the oracle extra. Greedy tokens are a fair fixture only where the likeliest token stands clear
of the next by far more than the tolerance of 1e-4: a case where it does not is given another seed.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from oracle.cases import CASES, CASES_BY_NAME, Case, prompts
from oracle.fixture_io import save_expected
from oracle.in_transformers import TransformersModel, write_checkpoint

SMALLEST_GAP = 1e-3


def make_fixture(case: Case) -> str:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_checkpoint(case, directory)
        model = TransformersModel(case, directory)
        last_logits = np.stack([model.logits(prompt)[-1] for prompt in prompts()])
        greedy = [model.greedy(prompt) for prompt in prompts()]
        gap = min(
            _smallest_gap(model.logits(prompt + tokens)[len(prompt) - 1 : -1])
            for prompt, tokens in zip(prompts(), greedy, strict=True)
        )
        if gap < SMALLEST_GAP:
            return f"{case.name}: smallest gap {gap:.5f} is too small: give it another seed"
        config = json.loads((directory / "config.json").read_text())
        save_expected(case, config, _tensor_shapes(directory), last_logits, greedy)
    variety = [len(set(tokens)) for tokens in greedy]
    return f"{case.name}: smallest gap {gap:.4f}; distinct greedy tokens {variety}"


def _smallest_gap(logits: np.ndarray) -> float:
    """Between the likeliest token and the next, over all rows."""
    top = np.sort(logits, axis=-1)
    return float((top[:, -1] - top[:, -2]).min())


def _tensor_shapes(directory: Path) -> dict[str, list[int]]:
    shapes = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                shapes[name] = tensors.get_slice(name).get_shape()
    return dict(sorted(shapes.items()))


if __name__ == "__main__":
    for chosen in [CASES_BY_NAME[name] for name in sys.argv[1:]] or CASES:
        print(make_fixture(chosen), flush=True)
