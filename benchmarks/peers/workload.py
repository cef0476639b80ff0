"""What every system is asked to do, and how a system says what it reached.

Standard library only: it is imported in each peer's own environment, by path.
"""

import json
import random
import time
from collections.abc import Callable

PROMPT_TOKENS, ANSWER_TOKENS = 128, 32  # of each request of a decode cell
NUM_IDS = 1500  # prompts are drawn from the first so many token ids, which every model has
CELLS: dict[str, tuple[str, int]] = {
    "pp 512": ("prefill", 512),
    "pp 2048": ("prefill", 2048),
    "tg B=1": ("decode", 1),
    "tg B=8": ("decode", 8),
    "tg B=32": ("decode", 32),
}
# generate(prompts as token ids, tokens of each answer): runs to the end, whatever the tokens are
Generate = Callable[[list[list[int]], int], object]


def measure(generate: Generate, cells: list[str], repeats: int) -> None:
    """Print a JSON line for each cell: tokens per second, the median of `repeats`.

    Prefill: the tokens of one prompt by the time of answering it with one token. Decode: the tokens
    after the first of B requests, by what those tokens add to the time.
    """
    rng = random.Random(0)

    def seconds(count: int, length: int, num_tokens: int) -> float:
        prompts = [[rng.randrange(3, NUM_IDS) for _ in range(length)] for _ in range(count)]
        started = time.perf_counter()
        generate(prompts, num_tokens)
        return time.perf_counter() - started

    seconds(1, 64, 4)  # what is built, compiled or first touched in a first run
    for cell in cells:
        kind, size = CELLS[cell]
        rates = []
        for _ in range(repeats):
            if kind == "prefill":
                rates.append(size / seconds(1, size, 1))
            else:
                first = seconds(size, PROMPT_TOKENS, 1)
                whole = seconds(size, PROMPT_TOKENS, 1 + ANSWER_TOKENS)
                rates.append(size * ANSWER_TOKENS / (whole - first))
        print(
            json.dumps({"cell": cell, "tokens_per_s": sorted(rates)[len(rates) // 2]}), flush=True
        )
