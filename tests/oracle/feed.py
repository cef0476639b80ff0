"""Feeds a backend by hand: requests in chunks over scattered blocks, without any scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import Backend, StepArrays

BLOCK_SIZE = 32


@dataclass
class Feed:
    """Requests that share one arena, each with a block table of shuffled blocks."""

    backend: Backend
    num_requests: int
    kv_dtype: str = "float32"
    max_tokens: int = 384  # of one request
    past: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.past = [0] * self.num_requests
        blocks_per_request = -(-self.max_tokens // BLOCK_SIZE)
        num_blocks = self.num_requests * blocks_per_request
        order = np.random.RandomState(5).permutation(num_blocks).astype(np.int32)
        self._tables = order.reshape(self.num_requests, blocks_per_request)
        self._kv = self.backend.allocate_kv(num_blocks, BLOCK_SIZE, self.kv_dtype)

    def step(
        self, new_tokens: dict[int, Sequence[int]], *, last_row_only: bool = False
    ) -> dict[int, NDArray[np.float32]]:
        """Compute some tokens of some requests; per request, the logits [rows, vocabulary]."""
        spans, row = {}, 0
        for request, tokens in new_tokens.items():
            spans[request] = (row + len(tokens) - 1 if last_row_only else row, row + len(tokens))
            row += len(tokens)
        rows = np.concatenate([np.arange(*span) for span in spans.values()])
        logits = self.backend.run(self._arrays(new_tokens, rows), self._kv)
        result, start = {}, 0
        for request, (first, end) in spans.items():
            result[request] = logits[start : start + end - first]
            start += end - first
            self.past[request] += len(new_tokens[request])
        return result

    def in_chunks(self, prompts: Sequence[Sequence[int]], chunk: int) -> list[NDArray[np.float32]]:
        """All prompts side by side, up to `chunk` tokens of each in a step."""
        parts: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
        while batch := {
            request: prompt[self.past[request] : self.past[request] + chunk]
            for request, prompt in enumerate(prompts)
            if self.past[request] < len(prompt)
        }:
            for request, logits in self.step(batch).items():
                parts[request].append(logits)
        return [np.concatenate(part) for part in parts]

    def _arrays(
        self, new_tokens: dict[int, Sequence[int]], logit_rows: NDArray[np.int64]
    ) -> StepArrays:
        requests = list(new_tokens)
        lengths = [len(new_tokens[request]) for request in requests]
        positions = [np.arange(self.past[r], self.past[r] + len(new_tokens[r])) for r in requests]
        slots = [
            self._tables[r][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for r, p in zip(requests, positions, strict=True)
        ]
        return StepArrays(
            token_ids=_ints([token for r in requests for token in new_tokens[r]]),
            positions=_ints(np.concatenate(positions)),
            slots=_ints(np.concatenate(slots)),
            query_starts=_ints(np.cumsum([0, *lengths])),
            context_lens=_ints([self.past[r] + len(new_tokens[r]) for r in requests]),
            block_tables=self._tables[requests],
            logit_rows=_ints(logit_rows),
        )


def greedy(
    feed: Feed, last_logits: Sequence[NDArray[np.float32]], num_tokens: int
) -> list[list[int]]:
    """The likeliest token after each request's last, and so on, in one batch."""
    output = [[int(logits.argmax())] for logits in last_logits]
    for _ in range(num_tokens - 1):
        batch = {request: tokens[-1:] for request, tokens in enumerate(output)}
        for request, logits in feed.step(batch).items():
            output[request].append(int(logits[-1].argmax()))
    return output


def _ints(values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
