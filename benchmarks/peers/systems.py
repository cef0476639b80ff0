"""How each system is run on the cells of the workload, and how what it prints is read."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.workload import ANSWER_TOKENS, CELLS, PROMPT_TOKENS

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class System:
    """One system at one precision. `command` takes the cells' names behind it."""

    name: str
    precision: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    def measure(self, cells: Sequence[str]) -> dict[str, float]:
        """Tokens per second by cell. Raises RuntimeError with the end of what it printed."""
        return dict(self._lines([*self.command, *cells]))

    def _lines(self, command: Sequence[str]) -> Iterator[tuple[str, float]]:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.environment},
        )
        if done.returncode:
            raise RuntimeError(f"{self.label} ended with {done.returncode}: {done.stderr[-2000:]}")
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                yield row["cell"], row["tokens_per_s"]


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp through its own llama-batched-bench, with as many tokens as everybody."""

    precision: str
    program: Path
    file: Path
    threads: int
    repeats: int
    name: str = "llama.cpp"

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    def measure(self, cells: Sequence[str]) -> dict[str, float]:
        rates = {}
        for cell in cells:
            kind, size = CELLS[cell]
            prompt, answer, count = (
                (size, 1, 1) if kind == "prefill" else (PROMPT_TOKENS, ANSWER_TOKENS, size)
            )
            key = "speed_pp" if kind == "prefill" else "speed_tg"
            runs = sorted(self._run(prompt, answer, count, key) for _ in range(self.repeats))
            rates[cell] = runs[len(runs) // 2]
        return rates

    def _run(self, prompt: int, answer: int, count: int, key: str) -> float:
        command = [
            str(self.program), "-m", str(self.file), "-t", str(self.threads), "-tb",
            str(self.threads), "-c", str(count * (prompt + answer) + 64), "-b", "2048", "-ub",
            "512", "-npp", str(prompt), "-ntg", str(answer), "-npl", str(count),
            "--output-format", "jsonl",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"{self.label} ended with {done.returncode}: {done.stderr[-2000:]}")
        return float(json.loads(lines[-1])[key])


def duetto(model: Path, precision: str, repeats: int, threads: int) -> System:
    script = str(HERE / "in_duetto.py")
    return System(
        "Duetto",
        precision,
        (sys.executable, script, str(model), precision, str(repeats)),
        {"DUETTO_NUM_THREADS": str(threads)},
    )


def openvino(
    python: Path, directory: Path, precision: str, repeats: int, threads: int, group: int = 0
) -> System:
    name = "OpenVINO GenAI" + (", int8 activations" if group else "")
    script = str(HERE / "in_openvino.py")
    command = (str(python), script, str(directory), str(group), str(repeats))
    return System(name, precision, command, {"OMP_NUM_THREADS": str(threads)})


def vllm(python: Path, model: Path, repeats: int, threads: int) -> System:
    script = str(HERE / "in_vllm.py")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    return System("vLLM CPU", "bf16", (str(python), script, str(model), str(repeats)), environment)
