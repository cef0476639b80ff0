"""Doubles that tests share: an executor without a model, and a codec of bytes.

ShadowExecutor is the oracle of the scheduler: the "KV" of a position is a hash of everything before
it, read through the block table and written to the slot exactly as attention would. So a wrong
block table, a stale block or a lost token changes the tokens, and every write is checked to go
into a block that no one else can see.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from random import Random
from typing import Any, NamedTuple, NoReturn

from shadow import (
    shadow_attended,
    shadow_deviation,
    shadow_kv,
    shadow_looked,
    shadow_moved,
    shadow_prompt_kvs,
    shadow_token,
)

from duetto.core.batch import (
    PLACEHOLDER,
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
from duetto.core.reuse import Reuse
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar
from duetto.core.text import ChatTemplateFacts

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
    reuse: Reuse | None = None,
    grammar: Grammar | None = None,
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
        reuse=reuse,
        grammar=grammar,
    )


def generate_alone(request: Request) -> list[int]:
    """The answer by the dumbest route: one request, one token at a time, no cache."""
    kvs = shadow_prompt_kvs(request)
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


class Raising(NamedTuple):
    """A step whose result raises."""

    error: BaseException

    def result(self) -> NoReturn:
        raise self.error


class ShadowExecutor:
    """An executor without a model, in which every wrong read shows.

    A row or a step that fails leaves garbage where it wrote, as a real one may. `poisoned` requests
    panic whatever batch they are in, `short` ones get nothing, and if it `is_broken` every step
    raises, at once or, if `raises_late`, when its result is asked for. Answers in `dead_ends` fail
    after so many tokens. `blamed` are those who failed alone. Drafts are the true next tokens with
    probability `skill`, and others else.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots = [UNWRITTEN] * (num_blocks * block_size)
        self._tokens = [UNWRITTEN] * (num_blocks * block_size)
        self.num_tokens_run = self.num_moves = self.num_looks = 0
        self.fail_next = False
        self.fail_after_writing = False
        self.fail_requests: set[str] = set()
        self.poisoned: set[str] = set()
        self.short: set[str] = set()
        self.is_broken = False
        self.num_executed = 0
        self.raises_late = False
        self.has_raised = False
        self.is_tainted = False  # a step or a row has failed: those in flight may read what it left
        self.complaint: AssertionError | None = None
        self.dead_ends: dict[str, int] = {}
        self.blamed: set[str] = set()
        self.skill, self._rng = 0.7, Random(0)
        self.num_drafts = self.num_accepted = 0
        self._last_tokens: dict[str, int] = {}  # of the steps so far: what placeholders stand for
        self._sent: dict[tuple[str, str], list[int]] = {}  # to each proposer, of each request
        self._asked_last: dict[str, str] = {}
        self._moved: set[tuple[str, int, int]] = set()
        self._epochs: dict[str, int] = {}  # in which it was last asked

    def submit(self, batch: ScheduledBatch) -> "Done | Raising":
        try:
            output = self.execute(batch)
        except BaseException as error:
            if isinstance(error, AssertionError) and not self.is_tainted:
                self.complaint = error  # the engine would take it for a failing step
            self.has_raised = self.is_tainted = True
            if len(batch.requests) == 1:
                self.blamed.add(batch.requests[0].request_id)
            if not self.raises_late:
                raise
            return Raising(error)
        for item, result in zip(batch.requests, output.results, strict=True):
            is_asked = bool(item.rows or item.prompt_logprob_targets or item.look)
            is_short = len(batch.requests) == 1 and is_asked
            self.is_tainted = self.is_tainted or result.error is not None
            if result.error or (is_short and item.request_id in self.short):
                self.blamed.add(item.request_id)
        return Done(output)

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
            self.num_looks += item.look is not None
            if item.look is not None and item.look.method == "deviation":
                kvs, looked = self._deviate(item, owners, is_garbage=is_garbage)
            else:
                kvs = self._write(item, owners, is_garbage=is_garbage)
                looked = shadow_attended(item, kvs)
            scores = tuple(TokenLogprob(t, -1.0, 1) for t in item.prompt_logprob_targets)
            if is_failing:
                results.append(RequestResult(error="planted failure of one request"))
                continue
            tokens = self._verify(item, kvs)
            if item.rows and not tokens:
                results.append(RequestResult(error="a dead end"))
                continue
            drafts = self._propose(item, kvs, [token.token_id for token in tokens])
            if item.request_id in self.short:
                self.has_raised = True  # the step is refused, and computed again
                tokens, scores = (tokens, ()) if scores else ((), ())
                looked = looked[:-1]
            results.append(RequestResult(tokens, drafts, scores, looked=looked))
        self.num_tokens_run += batch.num_tokens
        if self.fail_after_writing:
            self.fail_after_writing = False
            raise RuntimeError("planted failure after the step's KV was written")
        if panics:
            raise Panic("planted panic of one request")
        return StepOutput(tuple(results))

    def read_block(self, block: int) -> list[int]:
        return self._slots[block * self._block_size : (block + 1) * self._block_size]

    def _verify(self, item: ScheduledRequest, kvs: Sequence[int]) -> tuple[SampledToken, ...]:
        """Each row as if it were alone, up to the first draft that is wrong."""
        tokens: list[int] = []
        if not item.rows:
            return ()
        drafts = item.token_ids[len(item.token_ids) - item.num_drafts :]
        for row, kv, draft in zip(item.rows, kvs[-len(item.rows) :], (*drafts, None), strict=True):
            if self.dead_ends.get(item.request_id) == row.num_output_tokens:
                break
            forbidden = row.forbidden_token_ids
            tokens.append(shadow_token(kv, row.seed, row.num_output_tokens, forbidden))
            if tokens[-1] != draft:
                break
        if tokens:
            self._last_tokens[item.request_id] = tokens[-1]
            self.num_drafts += item.num_drafts
            self.num_accepted += len(tokens) - 1
        return tuple(map(SampledToken, tokens))

    def _propose(
        self, item: ScheduledRequest, kvs: Sequence[int], tokens: list[int]
    ) -> tuple[int, ...]:
        """Mostly the true continuation. Whoever drafts has been sent every token once, in order."""
        drafting = item.drafting
        if drafting is None:
            return ()
        sent = self._sent.setdefault((item.request_id, drafting.method), [])
        is_new = self._epochs.get(item.request_id) != item.epoch
        is_new |= self._asked_last.get(item.request_id) != drafting.method
        self._asked_last[item.request_id] = drafting.method
        self._epochs[item.request_id] = item.epoch
        if (is_new and not drafting.start) or (self.has_raised and drafting.start <= len(sent)):
            del sent[drafting.start :]  # it begins anew; or a step is computed again
        assert drafting.start == len(sent), "a token is not sent, or twice"
        sent += drafting.token_ids
        known = [self._tokens[self._slot(item.block_table, p)] for p in range(len(kvs))]
        for sent_id, token_id in zip(sent, known, strict=False):
            assert sent_id == token_id or self.is_tainted, "sent what the request has not"
        if not drafting.num_wanted or not tokens:
            return ()
        assert len(kvs) - item.num_drafts - len(sent) <= 1, "drafts asked for without all tokens"
        history, drafts = list(kvs[: len(kvs) - item.num_drafts + len(tokens) - 1]), [tokens[-1]]
        row = item.rows[len(tokens) - 1]
        for number in range(drafting.num_wanted):
            history.append(shadow_kv(history, drafts[-1]))
            place = row.num_output_tokens + 1 + number
            true = shadow_token(history[-1], row.seed, place, ())
            drafts.append(true if self._rng.random() < self.skill else self._rng.randint(1, 7))
        return tuple(drafts[1:])

    def _write(
        self, item: ScheduledRequest, owners: Mapping[int, int], *, is_garbage: bool
    ) -> list[int]:
        """The KV of every position, this step's too."""
        assert item.token_ids, "scheduled with nothing to compute, so there are no logits"
        table = item.block_table
        assert len(table) * self._block_size >= item.end, "the block table is too short"
        self._move(item, owners)
        positions = [p for run in item.runs for p in range(*run)]
        history = self._read(table, positions[0])
        for position, token_id in zip(positions, item.token_ids, strict=True):
            if token_id == PLACEHOLDER:
                token_id = self._last_tokens[item.request_id]
            if position > len(history):  # what lies between is there
                history += self._read(table, position)[len(history) :]
            kv = shadow_kv(history, token_id)
            self._put(item, position, owners, token_id, ~kv if is_garbage else kv)
            history.append(kv)
        return history

    def _deviate(
        self, item: ScheduledRequest, owners: Mapping[int, int], *, is_garbage: bool
    ) -> tuple[list[int], tuple[float, ...]]:
        """Only the first layers, which read the same layers of all tokens before; nothing is said
        of what lies where nothing was brought."""
        assert item.positions is None and not item.rows, "it looks at what has no deviation"
        self._move(item, owners)
        table, looked = item.block_table, list[float]()
        for position, token_id in enumerate(item.token_ids, start=item.num_computed_tokens):
            slots = [self._slot(table, p) for p in range(position)]
            assert all(self._slots[s] != UNWRITTEN for s in slots), "looks past what is not there"
            token_ids = [*(self._tokens[s] for s in slots), token_id]
            old = self._slots[self._slot(table, position)]
            looked.append(1e30 if old == UNWRITTEN else shadow_deviation(old, token_ids))
            kv = shadow_looked(old, token_ids)
            self._put(item, position, owners, token_id, ~kv if is_garbage else kv)
        return self._read(table, item.end), tuple(looked)

    def _put(
        self,
        item: ScheduledRequest,
        position: int,
        owners: Mapping[int, int],
        token_id: int,
        kv: int,
    ) -> None:
        block = item.block_table[position // self._block_size]
        assert owners[block] == 1, "writes a block that another one has"
        slot = self._slot(item.block_table, position)
        self._slots[slot], self._tokens[slot] = kv, token_id

    def _move(self, item: ScheduledRequest, owners: Mapping[int, int]) -> None:
        size = self._block_size
        self.num_moves += len(item.moves)
        for blocks, start, end, position in item.moves:
            moved = item.request_id, item.epoch, position
            assert moved not in self._moved or self.has_raised, "moved twice"
            self._moved.add(moved)
            alone = self._read(blocks, end)
            for place, kv in enumerate(alone[start:], start=position):
                source = self._slot(blocks, place - position + start)
                assert item.block_table[place // size] not in blocks, "moves within a block"
                kv = shadow_moved(kv, position - start)
                self._put(item, place, owners, self._tokens[source], kv)

    def _slot(self, block_table: Sequence[int], position: int) -> int:
        size = self._block_size
        return block_table[position // size] * size + position % size

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

    def encode_plain(self, text: str, apart: frozenset[str], *, begins: bool = True) -> list[int]:
        return list(text.encode())

    def token_id(self, token: str) -> int | None:
        return None

    def encode_with_starts(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        return ids, [i for i, character in enumerate(text) for _ in character.encode()]

    def encode_apart(self, text: str) -> tuple[list[int], list[int], list[int]]:
        return [], self.encode(text), []

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
        documents: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        if documents:
            raise InvalidRequest("documents", "this template reads none")
        if any(m["role"] == "forbidden" for m in messages):
            raise InvalidRequest("messages", "the template refuses this role")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("continue_final_message", "with add_generation_prompt: give one")
        lines = [f"{m['role']}: {m['content']}\n" for m in messages]
        if tools:
            lines.insert(0, f"tools: {', '.join(tool['function']['name'] for tool in tools)}\n")
        if continue_final_message:
            return "".join(lines).removesuffix("\n")
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    def chat_template_facts(self, *, with_tools: bool = False) -> ChatTemplateFacts:
        return ChatTemplateFacts(
            source="",
            reads=frozenset({"tools"}),
            shows_calls=False,
            shows_reasoning=False,
            generation_prompt="assistant: ",
        )


class FunctionExecutor:
    """An executor whose next token is a function of the request's id and output length. Whoever
    asks for drafts is told what comes next."""

    def __init__(self, next_token: Callable[[str, int], int]) -> None:
        self._next_token = next_token

    def submit(self, batch: ScheduledBatch) -> Done:
        return Done(StepOutput(tuple(self._result(r) for r in batch.requests)))

    def _result(self, item: ScheduledRequest) -> RequestResult:
        drafts = item.token_ids[len(item.token_ids) - item.num_drafts :]
        tokens: list[int] = []
        for row, draft in zip(item.rows, (*drafts, None), strict=False):
            tokens.append(self._next_token(item.request_id, row.num_output_tokens))
            if tokens[-1] != draft:
                break
        first = item.rows[0].num_output_tokens + len(tokens) if item.rows else 0
        num_wanted = item.drafting.num_wanted if item.drafting else 0
        proposed = [self._next_token(item.request_id, first + i) for i in range(num_wanted)]
        return RequestResult(tuple(map(SampledToken, tokens)), tuple(proposed))
