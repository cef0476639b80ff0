"""What every part is given: a device, a clock, the sizes to measure at, and what was found so far.

In a rehearsal the device is a CPU, kernels run in Triton's interpreter and sizes are tiny: figures
mean nothing then, but every line of every part has run.
"""

import gc
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from duetto.backends.cuda.stopwatch import Stopwatch
from duetto.checkpoints.config import ModelConfig, parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.models.find import find_config

ROOT = Path(__file__).parents[2]

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. `decode` are batches and the context of each request."""

    decode: tuple[tuple[int, int], ...]
    small_decode: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    torch_at: tuple[int, ...]  # batches at which plain torch is beside ours
    generated: tuple[int, ...]  # batches of the engine
    prompt: int  # of the engine's requests
    answer: int
    streams: int  # of the server
    runs: int


REAL = Sizes(
    decode=((1, 1024), (8, 1024), (32, 1024), (64, 1024), (1, 8192)),
    small_decode=((1, 1024),),
    prompts=(512, 2048, 8192),
    torch_at=(1, 32),
    generated=(1, 64),
    prompt=960,
    answer=128,
    streams=64,
    runs=20,
)
REHEARSED = Sizes(
    decode=((1, 20), (2, 20)),
    small_decode=((1, 20),),
    prompts=(19,),
    torch_at=(1, 2),
    generated=(1, 2),
    prompt=12,
    answer=4,
    streams=2,
    runs=1,
)


@dataclass
class Bench:
    device: torch.device
    rehearse: bool
    sizes: Sizes
    watch: Stopwatch
    dtype_name: str  # of weights: bfloat16; the interpreter multiplies that wrongly
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of earlier parts
    limit_s: float = 60.0  # of the part that runs
    folder: Path = Path(".gpu")  # of the results
    kept: dict[str, Any] = field(default_factory=dict)  # from part to part, in one process

    @classmethod
    def open(cls, *, rehearse: bool) -> "Bench":
        """Ends the process, in one line, where there is no GPU."""
        torch.manual_seed(0)
        if rehearse:
            torch.set_num_threads(1)
            device = torch.device("cpu")
            return cls(device, True, REHEARSED, Stopwatch(device), "float16")
        if not torch.cuda.is_available():
            raise SystemExit(
                f"no NVIDIA GPU that torch {torch.__version__} can use was found; accepted: a "
                "machine with one, or --rehearse, which runs every part in Triton's interpreter"
            )
        device = torch.device("cuda", 0)
        return cls(device, False, REAL, Stopwatch(device), "bfloat16")

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    def config(self, name: str) -> ModelConfig:
        """Of a named shape; a tiny one in a rehearsal."""
        if self.rehearse:
            return parse_config(JsonSection(Path("config.json"), TINY))
        return find_config(name)

    @property
    def capability(self) -> tuple[int, int]:
        return (0, 0) if self.rehearse else torch.cuda.get_device_capability(self.device)

    def roof(self, name: str) -> float:
        """read_bandwidth, copy_bandwidth or a precision, as the part `roofs` found it. Raises
        LookupError if that has not been."""
        if "roofs" not in self.found:
            raise LookupError("the part `roofs` must be done first: run it with --only roofs")
        roofs = self.found["roofs"]
        value: float = roofs[name] if name in roofs else roofs["peaks"][name]
        return value

    def wait(self) -> None:
        """Until the device has done all it was told."""
        if not self.rehearse:
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Give back what parts kept."""
        for kept in self.kept.values():
            if hasattr(kept, "close"):
                kept.close()
        self.kept.clear()
        self.tidy()

    def tidy(self) -> None:
        """Give back what a part left on the device."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.empty_cache()

    def about(self) -> dict[str, Any]:
        """The device, and what ran on it."""
        found: dict[str, Any] = {
            "name": "rehearsal on a CPU",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
        }
        if self.rehearse:
            return found
        facts = torch.cuda.get_device_properties(self.device)
        return found | {
            "name": facts.name,
            "memory_bytes": facts.total_memory,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }


def _commit() -> str:
    return _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")


def _said(*command: str) -> str:
    """The first line of what a program says; nothing if it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip().partition("\n")[0]
