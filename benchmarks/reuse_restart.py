"""A second start with KV on a disk: how much of the prompts is found there, and what it saves.

Each start is a process of its own.
"""

import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from speculating import directory_of

from duetto.checkpoints.config import read_config
from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the engine on a model, and what it is asked, one prompt after the other."""

    model: Path
    options: dict[str, Any]
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Answered:
    ttfts_s: tuple[float, ...]
    num_cached: int  # tokens of all prompts
    load_s: float  # until it could be asked

    def as_json(self, name: str, num_tokens: int) -> dict[str, Any]:
        return {
            "name": name,
            "ttft_s": statistics.median(self.ttfts_s),
            "ttfts_s": self.ttfts_s,
            "hit_rate": self.num_cached / num_tokens,
            "load_s": self.load_s,
        }


def run(start: Start) -> Answered:
    """In the process that calls it."""
    begun = perf_counter()
    with LLM(start.model, **start.options) as llm:
        load_s = perf_counter() - begun
        ttfts, num_cached = list[float](), 0
        for prompt in start.prompts:
            params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
            (output,) = llm.generate({"prompt_token_ids": list(prompt)}, params)
            timings = output.outputs[0].timings
            assert timings is not None and timings.ttft_s is not None
            ttfts.append(timings.ttft_s)
            num_cached += output.num_cached_tokens
    return Answered(tuple(ttfts), num_cached, load_s)


def restart(
    shape: str, quantization: str, *, num_prompts: int, document_len: int, question_len: int
) -> dict[str, Any]:
    """A start without a disk, one that fills it, and one that finds what the former left."""
    with directory_of(shape) as path, TemporaryDirectory() as folder:
        rng, vocab_size = random.Random(0), read_config(path).vocab_size
        size = document_len + question_len
        prompts = [[rng.randrange(vocab_size) for _ in range(size)] for _ in range(num_prompts)]
        plain: dict[str, Any] = {
            "quantization": quantization,
            "max_model_len": size + 8,
            "max_num_seqs": 2,
        }
        kept = {**plain, "kv_offloading_disk": folder}
        starts = {"no disk": plain, "first start": kept, "second start": kept}
        rows = []
        for name, options in starts.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                answered = process.submit(run, Start(path, options, prompts)).result()
            rows.append(answered.as_json(name, num_prompts * size))
        num_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "model": path.name,
        "quantization": quantization,
        "num_prompts": num_prompts,
        "document_len": document_len,
        "question_len": question_len,
        "disk_bytes": num_bytes,
        "rows": rows,
    }
