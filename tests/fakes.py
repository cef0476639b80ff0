"""Doubles that tests share: an executor without a model, and a codec of bytes.

ShadowExecutor is the oracle of the scheduler: the "KV" of a position is a hash of everything before
it, read through the block table and written to the slot exactly as attention would. So a wrong
block table, a stale block or a lost token changes the tokens, and every write is checked to go
into a block that no one else can see.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from duetto.core.batch import (
    RequestResult,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.errors import InvalidRequest
from duetto.core.executor import Done
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams

UNWRITTEN = -1  # no KV: hash() never returns it


def make_request(
    request_id: str = "r0",
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 4,
    *,
    stop_token_ids: Sequence[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
    seed: int = 0,
    arrival_time: float = 0.0,
    priority: int = 0,
    cache_salt: bytes = b"",
    tenant: bytes = b"",
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
        bad_word_ids=tuple(tuple(word) for word in bad_word_ids),
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        tenant=tenant,
    )


def shadow_kv(history: Sequence[int], token_id: int) -> int:
    """Stands in for K and V at one position: depends on this token and every position before."""
    return hash((*history, token_id))  # of ints only, so it is the same in every process


def shadow_kvs(token_ids: Sequence[int]) -> list[int]:
    """The KV of every position of a text."""
    kvs: list[int] = []
    for token_id in token_ids:
        kvs.append(shadow_kv(kvs, token_id))
    return kvs


def shadow_token(last_kv: int, seed: int, num_output_tokens: int, forbidden: Sequence[int]) -> int:
    """A token that depends on the whole context and on the request's own random stream."""
    token_id = hash((last_kv, seed, num_output_tokens)) % 7 + 1
    while token_id in forbidden:
        token_id += 1
    return token_id


def generate_alone(request: Request) -> list[int]:
    """The answer by the dumbest route: one request, one token at a time, no cache."""
    kvs = shadow_kvs(request.prompt_token_ids)
    output: list[int] = []
    while len(output) < request.max_tokens:
        too_short = len(output) < request.sampling.min_tokens
        forbidden = set(request.stop_token_ids if too_short else ())
        for *beginning, end in request.bad_word_ids:
            if output[len(output) - len(beginning) :] == beginning:
                forbidden.add(end)
        output.append(shadow_token(kvs[-1], request.seed, len(output), tuple(forbidden)))
        if output[-1] in request.stop_token_ids:
            break
        kvs.append(shadow_kv(kvs, output[-1]))
    return output


class Panic(BaseException):
    """What a native library raises when it panics is not an Exception."""


class ShadowExecutor:
    """An executor without a model, in which every wrong read shows.

    A row or a step that fails leaves garbage where it wrote, as a real one may. `poisoned` requests
    panic whatever batch they are in, `short` ones get nothing, and if it `is_broken` every step
    raises.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots = [UNWRITTEN] * (num_blocks * block_size)
        self.num_tokens_run = 0
        self.fail_next = False
        self.fail_after_writing = False
        self.fail_requests: set[str] = set()
        self.poisoned: set[str] = set()
        self.short: set[str] = set()
        self.is_broken = False
        self.num_executed = 0

    def submit(self, batch: ScheduledBatch) -> Done:
        return Done(self.execute(batch))

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        self.num_executed += 1
        if self.fail_next or self.is_broken:
            self.fail_next = False
            raise RuntimeError("planted failure")
        owners = Counter(chain.from_iterable(item.block_table for item in batch.requests))
        results = []
        panics = any(item.request_id in self.poisoned for item in batch.requests)
        for item in batch.requests:
            is_failing = item.request_id in self.fail_requests
            is_garbage = is_failing or self.fail_after_writing or panics
            last = self._write(item, owners, is_garbage=is_garbage)
            scores = tuple(TokenLogprob(t, -1.0, 1) for t in item.prompt_logprob_targets)
            if is_failing:
                results.append(RequestResult(error="planted failure of one request"))
                continue
            tokens: tuple[SampledToken, ...] = ()
            for s in item.rows:
                token = shadow_token(last, s.seed, s.num_output_tokens, s.forbidden_token_ids)
                tokens = (SampledToken(token),)
            if item.request_id in self.short:
                tokens, scores = (tokens, ()) if scores else ((), ())
            results.append(RequestResult(tokens, scores=scores))
        self.num_tokens_run += batch.num_tokens
        if self.fail_after_writing:
            self.fail_after_writing = False
            raise RuntimeError("planted failure after the step's KV was written")
        if panics:
            raise Panic("planted panic of one request")
        return StepOutput(tuple(results))

    def read_block(self, block: int) -> list[int]:
        return self._slots[block * self._block_size : (block + 1) * self._block_size]

    def _write(self, item: ScheduledRequest, owners: Mapping[int, int], *, is_garbage: bool) -> int:
        assert item.token_ids, "scheduled with nothing to compute, so there are no logits"
        size, start = self._block_size, item.num_computed_tokens
        end = start + len(item.token_ids)
        assert len(item.block_table) * size >= end, "the block table is too short"
        history = self._read(item.block_table, start)
        for position, token_id in enumerate(item.token_ids, start=start):
            block = item.block_table[position // size]
            assert owners[block] == 1, "writes a block that another request reads or writes"
            kv = shadow_kv(history, token_id)
            self._slots[block * size + position % size] = ~kv if is_garbage else kv
            history.append(kv)
        return history[-1]

    def _read(self, block_table: Sequence[int], num_tokens: int) -> list[int]:
        """The KV of the first `num_tokens` positions."""
        kvs: list[int] = []
        for block in block_table[: -(-num_tokens // self._block_size)]:
            kvs += self.read_block(block)
        del kvs[num_tokens:]
        assert UNWRITTEN not in kvs, "reads a slot that was never written"
        return kvs


class ByteCodec:
    """A TextCodec in which token ids are bytes; 256 is the end of sequence."""

    vocab_size = 257
    eos_token_ids = frozenset({256})
    max_token_bytes = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_with_starts(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        return ids, [i for i, character in enumerate(text) for _ in character.encode()]

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

    def submit(self, batch: ScheduledBatch) -> Done:
        return Done(StepOutput(tuple(self._result(r) for r in batch.requests)))

    def _result(self, item: ScheduledRequest) -> RequestResult:
        tokens = [self._next_token(item.request_id, row.num_output_tokens) for row in item.rows]
        return RequestResult(tuple(map(SampledToken, tokens)))
