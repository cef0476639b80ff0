"""Doubles that tests share: an executor without a model, and a codec of bytes.

ShadowExecutor is the oracle of the scheduler: the "KV" of a position is a hash of everything before
it, read through the block table and written to the slot exactly as attention would. So a wrong
block table, a stale block or a lost token changes the tokens, and every write is checked to go
into a block that no one else can see.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duetto.core.batch import (
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams


def make_request(
    request_id: str = "r0",
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 4,
    *,
    stop_token_ids: Sequence[int] = (),
    seed: int = 0,
    arrival_time: float = 0.0,
    priority: int = 0,
    cache_salt: bytes = b"",
    **sampling: Any,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids), **sampling)
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=params,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=frozenset(stop_token_ids),
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
    )


def shadow_kv(history: Sequence[bytes], token_id: int) -> bytes:
    """Stands in for K and V at one position: depends on this token and every position before."""
    return hashlib.blake2b(b"".join(history) + b"|%d" % token_id, digest_size=8).digest()


def shadow_token(
    last_kv: bytes, seed: int, num_output_tokens: int, forbidden: Sequence[int]
) -> int:
    """A token that depends on the whole context and on the request's own random stream."""
    draw = hashlib.blake2b(last_kv + b"%d|%d" % (seed, num_output_tokens)).digest()
    token_id = draw[0] % 7 + 1
    while token_id in forbidden:
        token_id += 1
    return token_id


def generate_alone(request: Request) -> list[int]:
    """The answer by the dumbest route: one request, one token at a time, no cache."""
    kv: list[bytes] = []
    for token_id in request.prompt_token_ids:
        kv.append(shadow_kv(kv, token_id))
    output: list[int] = []
    while len(output) < request.max_tokens:
        short = len(output) < request.sampling.min_tokens
        forbidden = request.stop_token_ids if short else ()
        output.append(shadow_token(kv[-1], request.seed, len(output), tuple(forbidden)))
        if output[-1] in request.stop_token_ids:
            break
        kv.append(shadow_kv(kv, output[-1]))
    return output


class ShadowExecutor:
    """An executor without a model, in which every wrong read shows."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[bytes | None] = [None] * (num_blocks * block_size)
        self.num_tokens_run = 0
        self.fail_next = False
        self.fail_after_writing = False
        self.fail_requests: set[str] = set()

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("planted failure")
        owners = _owners(batch)
        sampled, failed, written = {}, {}, set()
        for item in batch.requests:
            last = self._write(item, owners, written)
            if item.request_id in self.fail_requests:
                failed[item.request_id] = "planted failure of one request"
            elif item.sampling is not None:
                s = item.sampling
                token = shadow_token(last, s.seed, s.num_output_tokens, s.forbidden_token_ids)
                sampled[item.request_id] = (SampledToken(token),)
        self.num_tokens_run += batch.num_tokens
        if self.fail_after_writing:
            self.fail_after_writing = False
            raise RuntimeError("planted failure after the step's KV was written")
        return StepOutput(sampled, prompt_logprobs=_scores(batch), failed=failed)

    def _write(
        self, item: ScheduledRequest, owners: Mapping[int, set[str]], written: set[int]
    ) -> bytes:
        assert item.token_ids, "scheduled with nothing to compute, so there are no logits"
        end = item.num_computed_tokens + len(item.token_ids)
        assert len(item.block_table) * self._block_size >= end, "the block table is too short"
        history = [self._read(item, i) for i in range(item.num_computed_tokens)]
        for position, token_id in enumerate(item.token_ids, start=item.num_computed_tokens):
            slot = self._slot(item, position)
            assert slot not in written, "two requests write one slot in one step"
            assert owners[slot // self._block_size] == {item.request_id}, "writes a shared block"
            written.add(slot)
            self._slots[slot] = shadow_kv(history, token_id)
            history.append(self._slots[slot])
        return history[-1]

    def _read(self, item: ScheduledRequest, position: int) -> bytes:
        kv = self._slots[self._slot(item, position)]
        assert kv is not None, "reads a slot that was never written"
        return kv

    def _slot(self, item: ScheduledRequest, position: int) -> int:
        block = item.block_table[position // self._block_size]
        return block * self._block_size + position % self._block_size


def _owners(batch: ScheduledBatch) -> dict[int, set[str]]:
    owners: dict[int, set[str]] = {}
    for item in batch.requests:
        for block in item.block_table:
            owners.setdefault(block, set()).add(item.request_id)
    return owners


def _scores(batch: ScheduledBatch) -> dict[str, tuple[TokenLogprob, ...]]:
    return {
        item.request_id: tuple(TokenLogprob(t, -1.0, 1) for t in item.prompt_logprob_targets)
        for item in batch.requests
        if item.prompt_logprob_targets
    }


class ByteCodec:
    """A TextCodec in which token ids are bytes; 256 is the end of sequence."""

    vocab_size = 257
    eos_token_ids = frozenset({256})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        end = "" if skip_special_tokens else "<end>"
        parts = bytes(t for t in token_ids if t < 256).decode(errors="replace")
        return parts + end * sum(t == 256 for t in token_ids)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<end>"

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if any(m["role"] == "forbidden" for m in messages):
            raise InvalidRequest("messages", "the template refuses this role")
        lines = [f"{m['role']}: {m['content']}\n" for m in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")


class FunctionExecutor:
    """An executor whose next token is a function of the request's id and output length."""

    def __init__(self, next_token: Callable[[str, int], int]) -> None:
        self._next_token = next_token

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        return StepOutput(
            {
                r.request_id: (
                    SampledToken(self._next_token(r.request_id, r.sampling.num_output_tokens)),
                )
                for r in batch.requests
                if r.sampling is not None
            }
        )
