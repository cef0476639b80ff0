"""The committed fixtures: what transformers computed for each case, without its weights.

`fixtures/<case>.json` holds config.json as transformers wrote it, the tensors' names and shapes,
and the greedy tokens; `fixtures/<case>.npz` the logits after each prompt's last token. Weights are
drawn anew (cases.random_tensor). Needs neither torch nor transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from oracle.cases import Case, prompts, random_tensor
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Expected:
    prompts: list[list[int]]
    last_logits: NDArray[np.float32]  # [prompts, vocabulary]
    greedy: list[list[int]]  # NUM_GREEDY tokens after each prompt, end of sequence ignored


def expected(case: Case) -> Expected:
    with np.load(FIXTURES / f"{case.name}.npz") as arrays:
        last_logits = arrays["last_logits"]
    return Expected(prompts(), last_logits, _description(case)["greedy"])


def write_checkpoint(case: Case, directory: Path) -> None:
    """Write the checkpoint that transformers was given: config.json and safetensors files."""
    description = _description(case)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(description["config"], indent=1))
    tensors = {
        name: random_tensor(case, name, tuple(shape)).astype(_DTYPES[case.dtype])
        for name, shape in description["tensors"].items()
    }
    if case.num_shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        _write_shards(tensors, case.num_shards, directory)


def save_expected(
    case: Case,
    config: dict[str, Any],
    tensors: dict[str, list[int]],
    last_logits: NDArray[np.float32],
    greedy: list[list[int]],
) -> None:
    FIXTURES.mkdir(exist_ok=True)
    description = {"config": config, "tensors": tensors, "greedy": greedy}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in description.items())
    (FIXTURES / f"{case.name}.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(FIXTURES / f"{case.name}.npz", last_logits=last_logits)


def _description(case: Case) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((FIXTURES / f"{case.name}.json").read_text())
    return description


def _write_shards(tensors: dict[str, NDArray[Any]], num_shards: int, directory: Path) -> None:
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::num_shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
