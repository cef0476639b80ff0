"""An interrupted climb: tensors as safetensors, the rest as JSON. Nothing is pickled.

`latest/` holds one whole state. It is written beside and then put in place, so that an interruption
while writing leaves the one before.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"


@dataclass(slots=True)
class Progress:
    """How far a climb has come, and what it saw on the way."""

    rung: int = 0
    step: int = 0  # in this rung
    num_tokens: int = 0  # in all
    seconds: float = 0.0  # in all
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens so far, loss)
    scores: list[dict[str, Any]] = field(default_factory=list)  # one for each test of a rung


def save(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    new, latest = directory / "new", directory / "latest"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    tensors = {
        f"{names[index]}/{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(model.state_dict(), new / MODEL)
    save_file(tensors, new / OPTIMIZER)
    (new / STATE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    shutil.rmtree(latest, ignore_errors=True)
    new.rename(latest)


def load(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Put back what `save` wrote, for a model and an optimizer made alike. None: nothing saved."""
    latest = directory / "latest"
    if not (latest / STATE).is_file():
        latest = directory / "new"  # interrupted between the two steps of putting in place
        if not (latest / STATE).is_file():
            return None
    model.load_state_dict(load_file(latest / MODEL))
    indices = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Any]] = {}
    for full_name, tensor in load_file(latest / OPTIMIZER).items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(indices[name], {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    values = json.loads((latest / STATE).read_text(encoding="utf-8"))
    values["losses"] = [(tokens, loss) for tokens, loss in values["losses"]]
    return Progress(**values)
