"""An interrupted climb: tensors as safetensors, the rest as JSON. Nothing is pickled.

`latest/` holds one whole state. It is written beside and then put in place, so that an interruption
while writing leaves the one before.
"""

import json
import shutil
from collections.abc import Sequence
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
    directory: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write the state. Each parameter belongs to one optimizer at most."""
    new, latest = directory / "new", directory / "latest"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(model.state_dict(), new / MODEL)
    save_file(tensors, new / OPTIMIZER)
    (new / STATE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    shutil.rmtree(latest, ignore_errors=True)
    new.rename(latest)


def load(
    directory: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Progress | None:
    """Put back what `save` wrote, for a model and optimizers made alike. None: nothing saved."""
    latest = directory / "latest"
    if not (latest / STATE).is_file():
        latest = directory / "new"  # interrupted between the two steps of putting in place
        if not (latest / STATE).is_file():
            return None
    model.load_state_dict(load_file(latest / MODEL))
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    for full_name, tensor in load_file(latest / OPTIMIZER).items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # A count of steps stays on the CPU, where AdamW keeps it.
        value = tensor.to(parameter.device) if tensor.ndim else tensor
        owner[parameter].state[parameter][key] = value
    values = json.loads((latest / STATE).read_text(encoding="utf-8"))
    values["losses"] = [(tokens, loss) for tokens, loss in values["losses"]]
    return Progress(**values)
