"""The way of one request that samples, whatever its API: body, door, engine, reply.

An API's handlers say how a body is read and who translates; the rest is here. Knows no API.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from duetto.core.config import ONLY_EMBEDS, SchedulerConfig
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import GrammarMaker
from duetto.core.text import TextCodec
from duetto.engine.speech import Speech
from duetto.server.apis.asked import AskedChat, AskedPrompts
from duetto.server.apis.sampling import check_step_entries
from duetto.server.apis.translator import Translator
from duetto.server.door import Door, Job, RequestHead
from duetto.server.exchange import EventStream, Exchange
from duetto.server.http.body import body_of
from duetto.server.http.byte_budget import ByteBudget
from duetto.server.http.errors import invalid, unknown_model
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected
from duetto.server.http.text_work import TextWork
from duetto.server.relay import Relay
from duetto.server.settings import ServerSettings

LITTLE_REPLY_BYTES = 2**20
A = TypeVar("A", AskedChat, AskedPrompts)


class Answering:
    """What the handlers of all APIs share."""

    def __init__(
        self,
        codec: TextCodec,
        config: SchedulerConfig,
        settings: ServerSettings,
        relay: Relay,
        work: TextWork,
        grammars: GrammarMaker | None,
        speech: Speech,
    ) -> None:
        self.codec = codec
        self.config = config
        self.settings = settings
        self.relay = relay
        self.work = work
        self.door = Door(codec, config, settings, work, relay.clock, grammars, speech)
        self.replies = ByteBudget(
            settings.max_replies_bytes, LITTLE_REPLY_BYTES, "large replies are being made and read"
        )

    async def answer(
        self,
        request: Request,
        read: Callable[[bytes], A],
        translator: Callable[[A, Job, RequestHead], Translator],
        only_prompt: Callable[[A], bool] = lambda _: False,
        on_start: Callable[[Exchange], None] = lambda _: None,
    ) -> Response:
        """`read` runs on any thread. `only_prompt`: a prompt is scored, and the one token sampled
        is not shown. Raises ApiError."""
        if self.config.is_pooling:
            raise invalid("model", ONLY_EMBEDS)
        async with self.drafted(request, read) as (asked, draft, arrival):
            job = self.door.accept(draft)
            held = self.replies.hold(job.reply_bytes)
            words = translator(asked, job, arrival)  # nothing may fail once it is submitted
            exchange = Exchange(
                job,
                self.relay.submit(job.requests, arrival.name),
                words,
                clock=self.relay.clock,
                only_prompt=only_prompt(asked),
                tells_other_salts=self.settings.only_local_hosts,
            )
            on_start(exchange)
        if asked.asked.stream:
            keep_alive_s = self.settings.sse_keep_alive_s
            return EventStream(exchange, self.relay, keep_alive_s, held.release)
        return await exchange.reply(self.relay, request.receive, self.work, held.release)

    @asynccontextmanager
    async def drafted(
        self, request: Request, read: Callable[[bytes], A], *, is_submitted: bool = True
    ) -> AsyncIterator[tuple[A, Job, RequestHead]]:
        """What is asked, as far as it goes without the engine. Within the block its body is held,
        and places in the queue are reserved. Raises ApiError."""
        async with body_of(request, self.settings, self.work) as body:
            asked = await self.work.read(lambda: read(body), len(body))
            sampling = asked.asked.sampling
            num_prompts = len(asked.prompts) if isinstance(asked, AskedPrompts) else 1
            num_answers = self._checked_fan(num_prompts, sampling)
            with self.relay.reserved(num_answers, client_of(request.scope)):
                arrival = self.arrival(request, len(body), claims_name=is_submitted)
                made = self.door.draft(asked, arrival)
                yield asked, await while_connected(request, made), arrival

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not here; None is the one that is."""
        settings = self.settings
        if name is None or settings.accepts_any_model or name in settings.model_names:
            return
        raise unknown_model(name, settings.model_names)

    def _checked_fan(self, num_prompts: int, sampling: SamplingParams) -> int:
        """How many requests of the engine this is; refused if they could never be held at once."""
        asked, field = num_prompts * sampling.n, "n" if sampling.n > 1 else "prompt"
        what = f"{num_prompts} prompts with n={sampling.n} ask for {asked} answers"
        if asked > self.settings.max_answers:
            raise invalid(field, f"{what}; at most {self.settings.max_answers} per request")
        running, queued = self.config.max_num_seqs, self.settings.max_num_queued_reqs
        if asked > running + queued:
            raise invalid(
                field,
                f"{what}; this server holds at most {running + queued}: {running} that run and "
                f"{queued} that wait (--max-num-seqs, --max-num-queued-reqs)",
            )
        check_step_entries(sampling, min(asked, running))
        return asked

    def arrival(self, request: Request, num_bytes: int, *, claims_name: bool) -> RequestHead:
        """Who asks, and under which name its requests are known if `claims_name`."""
        state = request.scope["state"]
        tenant = state.get("tenant", b"")
        own = state["request_id"]
        name = state["request_label"]
        if claims_name:
            name = self.relay.history.claim(tenant, name, own)
        return RequestHead(own, num_bytes, tenant, name, client_of(request.scope))
