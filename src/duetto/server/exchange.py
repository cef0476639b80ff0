"""One answer on its way to one client: as server-sent events, or whole.

Counts tokens, ends the answer when the client hangs up, and turns what ended badly into an error.
Knows no model and no scheduling; what a choice looks like is the shape's affair.
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
from duetto.server.apis.protocol import StreamOptions
from duetto.server.apis.replies import Envelope, timings, usage
from duetto.server.apis.shapes import ReplyShape
from duetto.server.door import Job
from duetto.server.http.errors import ApiError, engine_failure, stopping
from duetto.server.http.json_parts import (
    WRITE_BYTES,
    Json,
    PartsResponse,
    encode,
    json_parts,
    packed,
)
from duetto.server.http.text_work import LARGE_BYTES, TextWork
from duetto.server.relay import Relay

CLIENT_GONE = 499  # nobody sees it but the metrics
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
NOT_ENDED = {"finish_reason": None, "stop_reason": None}
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


class Exchange:
    """Reads one answer to its end. Make it, then call `whole` or answer with an EventStream."""

    def __init__(
        self,
        job: Job,
        answer: Answer,
        shape: ReplyShape,
        envelope: Envelope,
        *,
        clock: Callable[[], float],
        return_token_ids: bool = False,
        only_prompt: bool = False,
        tells_other_salts: bool = False,
    ) -> None:
        """`only_prompt`: a prompt is scored, and the one token sampled is not shown. `clock` must
        be the engine's own."""
        self.answer = answer
        self._job = job
        self._shape = shape
        self._envelope = envelope
        self._clock = clock
        self._return_token_ids = return_token_ids
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
        async with _watched(self.answer, relay, receive):
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
            return Response(encode(self._complete(choices)), media_type="application/json")
        return PartsResponse(
            await work.reply(lambda: packed(json_parts(self._complete(choices))), num_bytes)
        )

    def _collect(self, choice: _Choice, delta: Delta) -> None:
        self.check(delta)
        text, tokens = self._count(delta)
        choice.texts.append(text)
        choice.tokens += tokens
        choice.scored += delta.prompt_logprobs
        choice.final = delta.final

    def _complete(self, choices: Sequence[_Choice]) -> Json:
        bodies, is_single = [], len(choices) == 1
        more = self._shape.beside_choices(choices[0].scored)
        for index, choice in enumerate(choices):
            text = "".join(choice.texts)
            scored = choices[index - index % self._job.sampling.n].scored  # once for each prompt
            body = self._shape.complete(index, text, choice.tokens, scored)
            if choice.final is not None:
                body |= self._ending(choice.final)
                # It was complete when the last of all choices was: no reader was waited for.
                (more if is_single else body)["timings"] = self._timings(index, choice.final, 0.0)
            bodies.append(body | self._ids(choice.tokens))
        return self._envelope.around(
            bodies, usage=self.usage(), service_tier=None, kv_transfer_params=None, **more
        )

    # --- chunks ----------------------------------------------------------------------------------

    def openings(self) -> list[Json]:
        """The chunks that come before any token."""
        choices = [self._shape.opening(index) for index in range(len(self._job.requests))]
        more = self._shape.beside_choices(())
        return [
            self._envelope.around([choice | NOT_ENDED | self._ids(())], **more)
            for choice in choices
            if choice is not None
        ]

    def chunk(self, delta: Delta) -> Json | None:
        """The chunk that shows a delta; None if no token came.

        Tokens are shown also where they have no text, or none yet: clients measure the gaps between
        chunks, as they may with vLLM.
        """
        text, tokens = self._count(delta)
        if delta.final is None and not text and not tokens:
            return None
        choice = self._shape.delta(delta.index, text, tokens) | self._ids(tokens)
        if delta.final is None:
            return self._envelope.around([choice | NOT_ENDED])
        choice |= self._ending(delta.final)
        times, reader_s = delta.final.timings, 0.0
        if times is not None and times.finish_time is not None:
            reader_s = max(0.0, self._clock() - times.finish_time)
        timings = self._timings(delta.index, delta.final, reader_s)
        return self._envelope.around([choice], timings=timings)

    def usage_chunk(self) -> Json:
        return self._envelope.around([], usage=self.usage())

    # --- both ------------------------------------------------------------------------------------

    def usage(self) -> Json:
        """Every prompt counts once, however many answers it has."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        return usage(num_prompt, self._num_output, sum(self._num_cached), self._drafts)

    def check(self, delta: Delta) -> None:
        """Raise ApiError if the choice ended without an answer."""
        if delta.final is None:
            return
        if delta.final.finish_reason is FinishReason.ERROR:
            raise engine_failure(delta.final.error or "the engine failed")
        if delta.final.finish_reason is FinishReason.ABORT:  # the client is still there, so:
            raise stopping()

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

    def _ids(self, tokens: Sequence[SampledToken]) -> Json:
        shown = [token.token_id for token in tokens] if self._return_token_ids else None
        return {"token_ids": shown}

    def _ending(self, final: RequestUpdate) -> Json:
        reason = FinishReason.LENGTH if self._only_prompt else final.finish_reason
        return {
            "finish_reason": None if reason is None else reason.value,
            "stop_reason": None if self._only_prompt else final.stop_reason,
        }

    def _timings(self, index: int, final: RequestUpdate, reader_s: float) -> Json | None:
        return timings(
            final.timings,
            len(self._job.prompts[index // self._job.sampling.n].token_ids),
            final.num_cached_tokens,
            reader_s=reader_s,
            tells_other_salts=self._tells_other_salts,
        )


class EventStream(Response):
    """Server-sent events. No header leaves before the engine has shown a sign of life.

    Until then (a first update, or one silent interval) a failure is still an HTTP status.
    """

    def __init__(
        self, exchange: Exchange, relay: Relay, options: StreamOptions, keep_alive_s: float
    ) -> None:
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._exchange = exchange
        self._relay = relay
        self._options = options
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        answer = self._exchange.answer
        async with _watched(answer, self._relay, receive):
            try:
                first = await answer.next(self._keep_alive_s)
                for delta in first:
                    self._exchange.check(delta)
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
        answer = self._exchange.answer
        if opening := b"".join(self._event(chunk) for chunk in self._exchange.openings()):
            yield opening
        try:
            while True:
                for events in self._show(deltas):
                    yield events
                if answer.has_ended:
                    break
                deltas = await answer.next(self._keep_alive_s)
                if not deltas:
                    yield KEEP_ALIVE
        except ApiError as error:
            yield _encode(error.body) + DONE
            return
        if self._options.include_usage:
            yield _encode(self._exchange.usage_chunk())
        yield DONE

    def _show(self, deltas: list[Delta]) -> Iterator[bytes]:
        """A write's worth at a time, so that no more is encoded than is being written."""
        events, num_bytes = [], 0
        for delta in self._steps(deltas):
            chunk = self._exchange.chunk(delta)
            if chunk is not None:
                events.append(self._event(chunk))
                num_bytes += len(events[-1])
            if num_bytes >= WRITE_BYTES:
                yield b"".join(events)
                events, num_bytes = [], 0
        if events:
            yield b"".join(events)

    def _steps(self, deltas: list[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            self._exchange.check(delta)
            yield from delta.steps()

    def _event(self, chunk: Json) -> bytes:
        if self._options.include_usage:  # OpenAI's is null in every chunk but the last
            each = self._options.continuous_usage_stats
            chunk["usage"] = self._exchange.usage() if each else None
        return _encode(chunk)


@asynccontextmanager
async def _watched(answer: Answer, relay: Relay, receive: Receive) -> AsyncIterator[None]:
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


def _encode(body: Json) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
