"""`duetto bench serve`: drive a server by a workload, and say what was seen.

Works with any OpenAI-compatible server. What only some servers have (/tokenize, /detokenize,
usage with every chunk) is asked for once, before the run. Prints nothing.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx2

from duetto.core.errors import ConfigError
from duetto.measure.client import Target, drive, open_http, send, started_clock
from duetto.measure.metrics import DEFAULT_PERCENTILES, SLO, JsonValue, Report, summarize
from duetto.measure.prompts import chat_workload
from duetto.measure.records import RequestRecord
from duetto.measure.workload import Workload, WorkloadRequest

SETUP_TIMEOUT_S = 30.0
LACKING = (400, 404, 405, 422, 501)  # what a server says to a path, or a body, that it has not
BYTES_PER_TOKEN = 4.0  # of English, with most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How the workload is driven."""

    max_concurrency: int | None = None
    is_closed_loop: bool = False  # a new request when an answer leaves, whatever arrival times say
    num_warmups: int = 0  # requests sent before the run, one by one, that count nowhere
    slo: SLO | None = None
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency {self.max_concurrency}: must be 1 or more")
        if self.num_warmups < 0:
            raise ConfigError(f"--num-warmups {self.num_warmups}: must be 0 or more")
        if any(not 0 <= percentile <= 100 for percentile in self.percentiles):
            raise ConfigError("--metric-percentiles: each must be from 0 to 100")


@dataclass(frozen=True, slots=True)
class ServeResult:
    report: Report
    records: tuple[RequestRecord, ...]
    model: str
    notes: tuple[str, ...]
    is_interrupted: bool = False

    def as_json(self, *, detailed: bool = False) -> dict[str, JsonValue]:
        """The report and, if `detailed`, vLLM's lists with one entry per request."""
        result = {"model_id": self.model, **self.report.as_json(), "notes": self.notes}
        result |= {"interrupted": self.is_interrupted}
        if not detailed:
            return result
        return result | {
            "input_lens": [r.num_prompt_tokens for r in self.records],
            "output_lens": [r.num_output_tokens for r in self.records],
            "asked_input_lens": [r.num_prompt_tokens_asked for r in self.records],
            "asked_output_lens": [r.num_output_tokens_asked for r in self.records],
            "cached_lens": [r.num_cached_tokens for r in self.records],
            "scheduled_s": [r.scheduled_s for r in self.records],
            "sent_s": [r.sent_s for r in self.records],
            "ttfts": [r.ttft_s for r in self.records],
            "itls": [r.itl_s for r in self.records],
            "request_errors": [r.error for r in self.records],
        }


async def run_serve(
    target: Target,
    workload: Workload,
    load: Load,
    *,
    on_done: Callable[[RequestRecord], None] = lambda _record: None,
) -> ServeResult:
    """Drive the server and report. Raises ConfigError if it cannot be driven at all.

    Cancelled (as asyncio.run does at Ctrl-C), it reports what had ended; with nothing to report the
    cancellation goes on. A first request, which counts nowhere, finds out whether the server
    answers and how it counts.
    """
    async with open_http(target) as http:
        if target.is_chat:
            workload = await _chats(http, target, workload)
        target, notes = await _settle(http, target, workload.requests[0])
        for request in workload.requests[: load.num_warmups]:
            await send(http, target, _backwards(request), 0.0, started_clock())
        clock = started_clock()
        records = await drive(
            workload.requests,
            lambda request, scheduled_s: send(http, target, request, scheduled_s, clock),
            clock=clock,
            max_concurrency=load.max_concurrency,
            is_closed_loop=load.is_closed_loop,
            on_done=on_done,
        )
        if is_interrupted := len(records) < len(workload.requests):
            if not records:
                raise asyncio.CancelledError
            ended = f"{len(records)} of {len(workload.requests)} requests"
            notes += (f"interrupted: {ended} had ended, and are what is counted",)
        report = summarize(records, clock(), slo=load.slo, percentiles=load.percentiles)
    notes = (*workload.notes, *notes, *_length_notes(report, target))
    return ServeResult(report, tuple(records), target.model, notes, is_interrupted=is_interrupted)


def find_model(base_url: str, api_key: str | None) -> str:
    """The first model that the server names. Raises ConfigError without an answer."""
    models = _ask(base_url, api_key, "GET", "/v1/models", None, "name it with --model")
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ConfigError(f"{base_url}/v1/models names no model; name it with --model") from None


class TokenCounter:
    """Counts a text's tokens by asking the server; one that has no /tokenize gets an estimate.

    Raises ConfigError if nobody answers, or the answer is another error.
    """

    def __init__(self, base_url: str, api_key: str | None, model: str) -> None:
        self._ask = partial(_ask, base_url, api_key, "POST", "/tokenize")
        self._model = model
        self._lacks: str | None = None

    def __call__(self, text: str) -> int:
        if self._lacks is None:
            body = {"model": self._model, "prompt": text}
            try:
                reply = self._ask(body, "the sharegpt dataset needs it", may_lack=True)
                return int(reply["count"])
            except _Lacking as error:
                self._lacks = f"no /tokenize ({error})"
            except (KeyError, TypeError, ValueError):
                self._lacks = "a /tokenize that answers without a count"
        return max(1, round(len(text.encode(errors="replace")) / BYTES_PER_TOKEN))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        if self._lacks is None:
            return ()
        return (
            f"the server has {self._lacks}: lengths asked for are a guess, a token for every "
            f"{BYTES_PER_TOKEN:g} bytes of text",
        )


class _Lacking(Exception):
    """The server is there and has no such path."""


def _ask(
    base_url: str,
    api_key: str | None,
    method: str,
    path: str,
    body: Any,
    why: str,
    *,
    may_lack: bool = False,
) -> Any:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx2.request(
            method,
            base_url + path,
            json=body,
            headers=headers,
            timeout=SETUP_TIMEOUT_S,
            trust_env=False,
        )
        if may_lack and reply.status_code in LACKING:
            raise _Lacking(f"HTTP {reply.status_code}")
        reply.raise_for_status()
        return reply.json()
    except httpx2.ConnectError as error:
        raise _unreachable(base_url, error) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise ConfigError(f"{base_url}{path}: {error or type(error).__name__}; {why}") from None


def _unreachable(base_url: str, error: httpx2.ConnectError) -> ConfigError:
    return ConfigError(
        f"nothing answers at {base_url} ({error}); is the server running? --base-url says where"
    )


async def _settle(
    http: httpx2.AsyncClient, target: Target, first: WorkloadRequest
) -> tuple[Target, tuple[str, ...]]:
    """The target, asking for counts with every chunk if the server has them."""
    short = replace(_backwards(first), num_output_tokens=1)
    counting = replace(target, asks_counts=True)
    record = await send(http, counting, short, 0.0, started_clock())
    if record.error is None:
        return counting, ()
    record = await send(http, target, short, 0.0, started_clock())
    if record.error is not None:
        raise ConfigError(f"{target.base_url}{target.path}: {record.error}")
    return target, ("the server does not count per chunk: a chunk with text counts as one token",)


def _backwards(request: WorkloadRequest) -> WorkloadRequest:
    """As much work, but of no help to a prefix cache when the request itself comes."""
    if request.prompt_text is not None:
        return replace(request, prompt_text=request.prompt_text[::-1])
    return replace(request, prompt_token_ids=(request.prompt_token_ids or ())[::-1])


async def _chats(http: httpx2.AsyncClient, target: Target, workload: Workload) -> Workload:
    try:
        return await chat_workload(http, target, workload)
    except httpx2.ConnectError as error:
        raise _unreachable(target.base_url, error) from None


def _length_notes(report: Report, target: Target) -> tuple[str, ...]:
    """What a reader must know of lengths that are not those asked for."""
    notes, prompts, outputs = [], report.prompt_lengths, report.output_lengths
    if prompts.asked and not prompts.are_as_asked and report.num_input_tokens:
        asked, got = sum(prompts.asked), report.num_input_tokens
        cause = "; the chat template adds its own" if target.is_chat and got > asked else ""
        notes.append(
            f"prompts are not of the lengths asked for: {got} tokens in all for {asked} "
            f"({got / asked - 1:+.0%}){cause}"
        )
    if outputs.num_shorter and outputs.asked:
        advice = (
            "the server stops all the same"
            if target.ignore_eos
            else "--ignore-eos asks for whole lengths"
        )
        notes.append(
            f"{outputs.num_shorter} of {len(outputs.got)} answers ended before the length asked "
            f"for ({sum(outputs.got)} tokens in all for {sum(outputs.asked)}): {advice}"
        )
    return tuple(notes)
