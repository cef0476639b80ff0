"""Small random models whose parts run in processes, which end with the test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from small_models import LLAMA, Kind, Model, make_model

from duetto.backends.parts.backend import PartsBackend
from duetto.core.engine_args import EngineArgs
from duetto.models.programs import load_program
from duetto.runner.load import hold

THREE = LLAMA | {"num_hidden_layers": 3}


def model_of(kind: Kind, directory: Path) -> tuple[Path, Model]:
    """A checkpoint of its own, and its twin in this process."""
    model = make_model(kind, directory)
    own = directory / "own"
    shutil.copy(directory / "config.json", own / "config.json")
    return own, model


@contextmanager
def parts(
    model_dir: Path, kind: Kind, *, tp: int = 1, pp: int = 1, **args: Any
) -> Iterator[PartsBackend]:
    options = EngineArgs(
        backend=kind.backend,
        dtype=kind.dtype,
        quantization=kind.quantization or "none",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        threads=None if kind.backend == "reference" else pp * tp,
        **args,
    )
    config, program = load_program(model_dir)
    loader = hold(config, program, options).loader
    backend = loader.load(program, model_dir, None)
    assert isinstance(backend, PartsBackend)
    try:
        yield backend
    finally:
        backend.close()
