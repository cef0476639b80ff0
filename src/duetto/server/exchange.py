"""One answer on its way to one client: as server-sent events, or whole.

Counts tokens, ends the answer when the client hangs up, and turns what ended badly into an error.
Knows no model, no scheduling and no API: what is said, and how, is the translator's affair.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duetto.core.batch import RequestUpdate, SampledToken, TokenLogprob
from duetto.core.draft_counts import NO_DRAFTS
from duetto.core.request import FinishReason
from duetto.server.answer import Answer, ClientGone, Delta
from duetto.server.apis.replies import timings
from duetto.server.apis.translator import AnswerStep, Ending, Translator, Usage, WholeAnswer
from duetto.server.door import Job
from duetto.server.http.errors import ApiError, engine_failure, stopping
from duetto.server.http.json_parts import (
    WRITE_BYTES,
    Json,
    PartsResponse,
    encode,
    json_parts,
    packed,
    rows_at_once,
)
from duetto.server.http.text_work import LARGE_BYTES, TextWork
from duetto.server.relay import Relay

CLIENT_GONE = 499  # nobody sees it but the metrics
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # or nginx holds events back
}


@dataclass(slots=True)
class _Choice:
    """One choice as far as it was read."""

    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    scored: list[TokenLogprob] = field(default_factory=list)
    final: RequestUpdate | None = None
    steps: list[tuple[str, int]] = field(default_factory=list)  # if the answer is parsed


class Exchange:
    """Reads one answer to its end. Make it, then call `whole` or answer with an EventStream."""

    def __init__(
        self,
        job: Job,
        answer: Answer,
        translator: Translator,
        *,
        clock: Callable[[], float],
        only_prompt: bool = False,
        tells_other_salts: bool = False,
    ) -> None:
        """`only_prompt`: a prompt is scored, and the one token sampled is not shown. `clock` must
        be the engine's own."""
        self.answer = answer
        self._job = job
        self.translator = translator
        self._clock = clock
        self._tells_other_salts = tells_other_salts
        self._only_prompt = only_prompt
        self._num_output = 0
        self._drafts = NO_DRAFTS
        self._num_cached = [0] * len(job.prompts)

    # --- whole -----------------------------------------------------------------------------------

    async def reply(
        self, relay: Relay, receive: Receive, work: TextWork, on_end: Callable[[], None]
    ) -> Response:
        """The reply that is not streamed. Raises ApiError if the engine could not answer.

        A large one is made off the event loop. `on_end` is called once nothing of it is held.
        """
        try:
            response = await self._wait_for_reply(relay, receive, work)
        except BaseException:
            on_end()
            raise
        if isinstance(response, PartsResponse):
            response.on_end = on_end
        else:
            on_end()
        return response

    async def _wait_for_reply(self, relay: Relay, receive: Receive, work: TextWork) -> Response:
        choices = [_Choice() for _ in self._job.requests]
        async with watched(self.answer, relay, receive):
            try:
                while not self.answer.has_ended:
                    for delta in await self.answer.next(None):
                        self._collect(choices[delta.index], delta)
            except ClientGone:
                return Response(status_code=CLIENT_GONE)
        most = max(len(choice.tokens) for choice in choices)
        lengths = [(len(prompt.token_ids), most) for prompt in self._job.prompts]
        num_bytes = self._job.size.num_bytes(lengths)
        if num_bytes <= LARGE_BYTES:
            return Response(encode(self._body(choices)), media_type="application/json")
        return PartsResponse(
            await work.reply(lambda: packed(json_parts(self._body(choices))), num_bytes)
        )

    def _collect(self, choice: _Choice, delta: Delta) -> None:
        check_ended(delta)
        text, tokens = self._count(delta)
        choice.texts.append(text)
        if self._job.make_parser is not None:
            choice.steps += [(step.text, len(step.tokens)) for step in delta.steps()]
        choice.tokens += tokens
        choice.scored += delta.prompt_logprobs
        choice.final = delta.final

    def _body(self, choices: Sequence[_Choice]) -> Json:
        answers = []
        for index, choice in enumerate(choices):
            # It was complete when the last of all choices was: no reader was waited for.
            ending = None if choice.final is None else self._ending(index, choice.final, 0.0)
            text = "".join(choice.texts)
            answers.append(
                WholeAnswer(index, text, choice.tokens, choice.scored, ending, choice.steps)
            )
        return self.translator.whole(answers, self.usage())

    # --- streamed --------------------------------------------------------------------------------

    def events(self, delta: Delta) -> bytes:
        """Those that show a delta; none if no token came."""
        text, tokens = self._count(delta)
        if delta.final is None and not text and not tokens and not delta.prompt_logprobs:
            return b""
        ending = None
        if delta.final is not None:
            times, reader_s = delta.final.timings, 0.0
            if times is not None and times.finish_time is not None:
                reader_s = max(0.0, self._clock() - times.finish_time)
            ending = self._ending(delta.index, delta.final, reader_s)
        step = AnswerStep(delta.index, text, tokens, ending, delta.prompt_logprobs)
        return self.translator.step(step, self.usage)

    @property
    def num_scored_at_once(self) -> int:
        """Tokens of a prompt, with their scores, in one event."""
        return rows_at_once(1 + (self._job.sampling.prompt_logprobs or 0))

    # --- both ------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        return Usage(num_prompt, self._num_output, sum(self._num_cached), self._drafts)

    def _count(self, delta: Delta) -> tuple[str, tuple[SampledToken, ...]]:
        prompt, answer_of_prompt = divmod(delta.index, self._job.sampling.n)
        if answer_of_prompt == 0:  # the others find what the first one computed
            self._num_cached[prompt] = max(self._num_cached[prompt], delta.num_cached_tokens)
        if self._only_prompt:
            return "", ()
        self._num_output += len(delta.tokens)
        times = None if delta.final is None else delta.final.timings
        if times is not None and times.speculation is not None:
            self._drafts = self._drafts.plus(times.speculation.total)
        return delta.text, delta.tokens

    def _ending(self, index: int, final: RequestUpdate, reader_s: float) -> Ending:
        shown = timings(
            final.timings,
            len(self._job.prompts[index // self._job.sampling.n].token_ids),
            final.num_cached_tokens,
            reader_s=reader_s,
            tells_other_salts=self._tells_other_salts,
        )
        if self._only_prompt:
            return Ending(FinishReason.LENGTH.value, None, shown)
        reason = None if final.finish_reason is None else final.finish_reason.value
        return Ending(reason, final.stop_reason, shown)


class EventStream(Response):
    """Server-sent events. No header leaves before the engine has shown a sign of life.

    Until then (a first update, or one silent interval) a failure is still an HTTP status.
    """

    def __init__(
        self, exchange: Exchange, relay: Relay, keep_alive_s: float, on_end: Callable[[], None]
    ) -> None:
        """`on_end` is called once nothing of it is held."""
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._exchange = exchange
        self._relay = relay
        self._keep_alive_s = keep_alive_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await self._send(receive, send)
        finally:
            self._on_end()

    async def _send(self, receive: Receive, send: Send) -> None:
        answer = self._exchange.answer
        async with watched(answer, self._relay, receive):
            try:
                first = await answer.next(self._keep_alive_s)
                for delta in first:
                    check_ended(delta)
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                async for events in self._events(first):
                    for at in range(0, len(events), WRITE_BYTES):
                        body = events[at : at + WRITE_BYTES]
                        with answer.writing():
                            await send(
                                {"type": "http.response.body", "body": body, "more_body": True}
                            )
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                self._relay.delivered(answer)
            except ClientGone:
                return

    async def _events(self, deltas: list[Delta]) -> AsyncIterator[bytes]:
        answer, translator = self._exchange.answer, self._exchange.translator
        if opening := translator.opening(self._exchange.usage):
            yield opening
        try:
            while True:
                for events in self._show(deltas):
                    yield events
                if answer.has_ended:
                    break
                deltas = await answer.next(self._keep_alive_s)
                if not deltas:
                    yield translator.keep_alive
        except ApiError as error:
            yield translator.failed(error)
            return
        yield translator.closing(self._exchange.usage())

    def _show(self, deltas: list[Delta]) -> Iterator[bytes]:
        """A write's worth at a time, so that no more is encoded than is being written."""
        events, num_bytes = [], 0
        for delta in self._steps(deltas):
            if shown := self._exchange.events(delta):
                events.append(shown)
                num_bytes += len(shown)
            if num_bytes >= WRITE_BYTES:
                yield b"".join(events)
                events, num_bytes = [], 0
        if events:
            yield b"".join(events)

    def _steps(self, deltas: list[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            check_ended(delta)
            for step in delta.steps():
                yield from step.parts(self._exchange.num_scored_at_once)


def check_ended(delta: Delta) -> None:
    """Raise ApiError if the choice ended without an answer."""
    if delta.final is None:
        return
    if delta.final.finish_reason is FinishReason.ERROR:
        raise engine_failure(delta.final.error or "the engine failed")
    if delta.final.finish_reason is FinishReason.ABORT:  # the client is still there, so:
        raise stopping()


@asynccontextmanager
async def watched(answer: Answer, relay: Relay, receive: Receive) -> AsyncIterator[None]:
    """Abort what has not ended as soon as the client hangs up, and in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        relay.close(answer)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        relay.close(answer)
