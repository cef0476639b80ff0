"""The random 8B checkpoint that the engine's parts load: made once, in memory if there is room."""

import shutil
import tempfile
from pathlib import Path

from duetto.models.find import LARGE_SHAPES
from duetto.models.make_model import make_model
from gpu.bench import TINY, Bench

SHARED_MEMORY = Path("/dev/shm")
BYTES = 17 << 30  # of the checkpoint, with room beside


def checkpoint(bench: Bench) -> Path:
    """A directory; the one that an earlier part wrote, if it is whole."""
    if bench.rehearse:
        folder = bench.folder / "checkpoint"
        config, dtype = TINY | {"vocab_size": 320}, "float32"
    else:
        folder, config, dtype = _place(), LARGE_SHAPES["llama-3-8b"], "bfloat16"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(config, folder, dtype=dtype, repeats=True)  # type: ignore[arg-type]
    return folder


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _place() -> Path:
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > BYTES
    parent = SHARED_MEMORY if has_room else Path(tempfile.gettempdir())
    return parent / "duetto-gpu-8b"
