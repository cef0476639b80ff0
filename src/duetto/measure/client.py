"""A load generator for OpenAI-compatible servers: sends when the workload says, notes each instant.

Writes to no stream and makes no report. All instants are seconds since the start of the run.

One event loop does everything, so a busy client delays what it measures: run it on other cores
than the server, and look at `client_delay` in the report.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx2
import msgspec

from duetto.core.draft_counts import NO_CHAINS, Chains
from duetto.core.errors import ConfigError
from duetto.measure.records import Chunk, RequestOutcome, RequestRecord, outcome_of
from duetto.measure.workload import WorkloadRequest

Clock = Callable[[], float]
SendRequest = Callable[[WorkloadRequest, float], Awaitable[RequestRecord]]

MAX_ERROR_LENGTH = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which server, and what every request to it says. Raises ConfigError, naming the flag."""

    base_url: str  # like http://127.0.0.1:8000
    model: str
    is_chat: bool = False
    endpoint: str | None = None  # None: /v1/chat/completions or /v1/completions
    api_key: str | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    asks_counts: bool = False  # asks for usage with every chunk (vLLM's continuous_usage_stats)
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # wins over all the others
    timeout_s: float = 600.0  # for a whole answer

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"--timeout {self.timeout_s:g}: must be above 0 seconds")

    @property
    def path(self) -> str:
        return self.endpoint or ("/v1/chat/completions" if self.is_chat else "/v1/completions")

    def body(self, request: WorkloadRequest) -> dict[str, Any]:
        """Raises ValueError for token ids on the chat endpoint, which takes only text."""
        if not self.is_chat:
            prompt: dict[str, Any] = {"prompt": request.prompt_text or request.prompt_token_ids}
        elif request.prompt_text is not None:
            prompt = {"messages": [{"role": "user", "content": request.prompt_text}]}
        else:
            raise ValueError("the chat endpoint takes text; this prompt is token ids")
        counts = {"continuous_usage_stats": True} if self.asks_counts else {}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": request.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, **counts},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra_body,
        }


def open_http(target: Target) -> httpx2.AsyncClient:
    """A connection pool without a limit of its own: a limit would be a hidden queue."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    return httpx2.AsyncClient(
        base_url=target.base_url,
        headers=headers,
        timeout=None,  # one timeout for the whole answer; see send()
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy would be measured too
    )


async def send(
    http: httpx2.AsyncClient,
    target: Target,
    request: WorkloadRequest,
    scheduled_s: float,
    clock: Clock,
) -> RequestRecord:
    """Send one request and note its answer. Whatever goes wrong is in the record, never raised."""
    body = target.body(request)
    answer = _Answer()
    sent_s = clock()
    error: str | None = None
    outcome: RequestOutcome = "failed"
    try:
        async with asyncio.timeout(target.timeout_s):
            await _receive(http, target.path, body, answer, clock)
        outcome = outcome_of(answer.finish_reason)
        if answer.finish_reason is None:
            outcome, error = "failed", "the stream ended without a finish reason"
    except TimeoutError:
        outcome, error = "aborted", f"no whole answer within {target.timeout_s:g} s"
    except (httpx2.HTTPError, _ServerError, msgspec.DecodeError) as caught:
        error = f"{type(caught).__name__.lstrip('_')}: {caught}"[:MAX_ERROR_LENGTH]
    usage, chunks = answer.usage, answer.chunks
    return RequestRecord(
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        end_s=chunks[-1].time_s if chunks else clock(),
        chunks=tuple(chunks),
        num_prompt_tokens=usage.prompt_tokens or len(request.prompt_token_ids or ()),
        num_prompt_tokens_asked=request.num_prompt_tokens,
        num_output_tokens_asked=request.num_output_tokens,
        num_output_tokens=max(usage.completion_tokens, answer.num_timed_tokens),
        num_cached_tokens=(usage.prompt_tokens_details or _Details()).cached_tokens or 0,
        drafts=answer.drafts,
        outcome=outcome,
        finish_reason=answer.finish_reason,
        error=error,
    )


async def drive(
    requests: Sequence[WorkloadRequest],
    send: SendRequest,
    *,
    clock: Clock,
    max_concurrency: int | None = None,
    is_closed_loop: bool = False,
    on_done: Callable[[RequestRecord], None] = lambda _record: None,
) -> list[RequestRecord]:
    """Send every request at its arrival time and return the records in the workload's order.

    Under `max_concurrency` a request waits inside the client until one of the others has its
    answer; its `scheduled_s` stays its arrival, so that the wait is seen. With `is_closed_loop`
    arrival times are ignored and a request arrives when it is its turn.

    Cancelled, it drops what is under way and returns the records that there are.
    """
    slots = asyncio.Semaphore(max_concurrency or len(requests))
    records: dict[int, RequestRecord] = {}

    async def one(index: int, request: WorkloadRequest) -> None:
        async with slots:
            scheduled_s = clock() if is_closed_loop else request.arrival_s
            records[index] = await send(request, scheduled_s)
        on_done(records[index])

    try:
        async with asyncio.TaskGroup() as group:
            for index, request in sorted(enumerate(requests), key=lambda each: each[1].arrival_s):
                if not is_closed_loop and (wait_s := request.arrival_s - clock()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(one(index, request))
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
    return [records[index] for index in sorted(records)]


def started_clock() -> Clock:
    """Seconds from now on."""
    start = perf_counter()
    return lambda: perf_counter() - start


class _ServerError(Exception):
    """The server answered, and the answer is an error."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _OutputDetails | None = None


class _Speculation(msgspec.Struct):
    steps: int = 0
    proposed_per_position: tuple[int, ...] = ()
    accepted_per_position: tuple[int, ...] = ()


class _Timings(msgspec.Struct):
    """Duetto's."""

    speculation: _Speculation | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Its token ids, if it names them; otherwise 1 if it has any text."""
        if self.token_ids is not None:
            return len(self.token_ids)
        delta = self.delta or _Delta()
        return 1 if self.text or delta.content or delta.reasoning else 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: Any = None  # Duetto's; others' may be anything
    error: Any = None


@dataclass(slots=True)
class _Answer:
    """What has come of one answer so far."""

    chunks: list[Chunk] = field(default_factory=list)
    num_timed_tokens: int = 0  # in chunks
    usage: _Usage = field(default_factory=_Usage)
    finish_reason: str | None = None
    speculation: _Speculation | None = None

    @property
    def drafts(self) -> Chains:
        """All that was told of drafts; of OpenAI's usage only the totals."""
        told, totals = self.speculation, self.usage.completion_tokens_details
        if told is not None:
            return Chains(told.steps, told.proposed_per_position, told.accepted_per_position)
        if totals is None:
            return NO_CHAINS
        accepted = totals.accepted_prediction_tokens or 0
        proposed = accepted + (totals.rejected_prediction_tokens or 0)
        return Chains(0, (proposed,), (accepted,)) if proposed else NO_CHAINS

    def take(self, event: _Event, time_s: float) -> None:
        """Note one event. The growth of `usage` counts its tokens best, if it has both."""
        num_tokens = sum(choice.num_tokens for choice in event.choices)
        if event.usage is not None:
            self.usage = event.usage
            if event.choices:  # without choices it is the summary, and brings no token
                num_tokens = max(0, event.usage.completion_tokens - self.num_timed_tokens)
        if event.timings:
            self.speculation = _speculation(event.timings)
        for choice in event.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
        if num_tokens:
            self.chunks.append(Chunk(time_s, num_tokens))
            self.num_timed_tokens += num_tokens


def _speculation(timings: Any) -> _Speculation | None:
    try:
        return msgspec.convert(timings, _Timings).speculation
    except msgspec.ValidationError:
        return None


async def _receive(
    http: httpx2.AsyncClient, path: str, body: dict[str, Any], answer: _Answer, clock: Clock
) -> None:
    content = msgspec.json.encode(body)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    async with http.stream("POST", path, content=content, headers=headers) as response:
        if response.status_code != 200:
            raise _ServerError(f"HTTP {response.status_code}: {_message(await response.aread())}")
        async for event in httpx2.EventSource(response):
            time_s = clock()  # before decoding, which is the client's own work
            if event.data == "[DONE]":
                continue  # to the end, so that the connection can be used again
            decoded = msgspec.json.decode(event.data, type=_Event)
            if decoded.error:
                raise _ServerError(_message(event.data.encode()))
            answer.take(decoded, time_s)


def _message(body: bytes) -> str:
    """The message of an OpenAI-shaped error, or the body as it is."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode(errors="replace")
