"""What `serve` logs at `info`: a line for each request, and one of throughput while it is busy.

No line ever holds a text or a name that a client made up, so none can be forged. Lives on the event
loop and only counts: a thread formats and writes (logs.py). Knows no HTTP.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.draft_counts import NO_CHAINS, NO_DRAFTS, Chains, DraftCount
from duetto.core.request import Request
from duetto.server.apis.cache import PinOrTextRequest, PinRequest
from duetto.server.apis.embeddings import EmbeddingRequest
from duetto.server.apis.infill import InfillRequest
from duetto.server.apis.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from duetto.server.observe.history import Ended, reply_of
from duetto.server.settings import ServerSettings

logger = logging.getLogger(__name__)

THROUGHPUT_INTERVAL_S = 10.0
TENANT_BYTES = 32  # a digest of the key, in front of a request's salt
SHOWN_TENANT_BYTES = 4
KNOWN_FIELDS = frozenset(
    name
    for kind in (
        *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest),
        *(PinRequest, PinOrTextRequest, EmbeddingRequest, InfillRequest),
    )
    for name in kind.__struct_fields__
)


@dataclass(slots=True)
class _Reply:
    """The choices of one reply, as far as they have ended. Seconds on the engine's clock."""

    own: str  # our id
    name: str
    tenant: str
    num_choices: int
    num_open: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_gaps: int = 0
    gaps_s: float = 0.0
    longest_gap_s: float = 0.0
    ttft_s: float | None = None  # of the choice that was the first
    e2e_s: float | None = None  # of the choice that was the last
    finish_reasons: set[str] = field(default_factory=set)
    drafts: DraftCount = NO_DRAFTS

    def add(self, ended: Ended) -> None:
        """Count a choice's tokens; a prompt's once, however many answers it has."""
        if ended.is_first_answer:
            self.num_prompt_tokens += ended.num_prompt_tokens
            self.num_cached_tokens += ended.num_cached_tokens
        self.num_output_tokens += ended.num_output_tokens
        self.e2e_s = max(self.e2e_s or 0.0, ended.finish_time - ended.arrival_time)
        if ended.speculation is not None:
            self.drafts = self.drafts.plus(ended.speculation.total)
        first, last = ended.first_token_time, ended.last_token_time
        if first is None or last is None:
            return
        ttft_s = first - ended.arrival_time
        self.ttft_s = ttft_s if self.ttft_s is None else min(self.ttft_s, ttft_s)
        self.num_gaps += ended.num_output_tokens - 1
        self.gaps_s += last - first
        self.longest_gap_s = max(self.longest_gap_s, ended.longest_gap_s or 0.0)

    def __str__(self) -> str:
        """Its line, once it has ended: made by whoever writes it. Milliseconds; "-" for what there
        was not."""
        own = "" if self.name == self.own else f" own_id={self.own}"
        itl_s = self.gaps_s / self.num_gaps if self.num_gaps else None
        return (
            f"request id={self.name} prompt_tokens={self.num_prompt_tokens} "
            f"cached_tokens={self.num_cached_tokens} output_tokens={self.num_output_tokens} "
            f"choices={self.num_choices} ttft_ms={_ms(self.ttft_s)} itl_mean_ms={_ms(itl_s)} "
            f"itl_max_ms={_ms(self.longest_gap_s if self.num_gaps else None)} "
            f"e2e_ms={_ms(self.e2e_s)} finish={','.join(sorted(self.finish_reasons))} "
            f"tenant={self.tenant}{own}{_drafts(self.drafts)}"
        )


@dataclass(slots=True)
class _Window:
    """What the steps of one interval did."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    verified: Chains = NO_CHAINS

    def __str__(self) -> str:
        """What speculation did, if it did anything. The mean acceptance length is vLLM's: with the
        token that follows the accepted drafts."""
        acceptance, length = self.verified.total.acceptance, self.verified.mean_length
        if acceptance is None or length is None:
            return ""
        return f" draft_acceptance={acceptance:.1%} mean_acceptance_length={length:.2f}"


class Journal:
    def __init__(self, settings: ServerSettings) -> None:
        self._has_tenants = bool(settings.api_keys)
        self._replies: dict[str, _Reply] = {}
        self._told: set[str] = set()  # submitted, and their HTTP replies have not ended
        self._window = _Window()
        self._last: StepRecord | None = None  # None: nothing runs and nothing waits
        self._timer: asyncio.TimerHandle | None = None

    def record_arrival(self, requests: Sequence[Request], name: str) -> None:
        """The engine is about to be given all the requests of one reply, known to its client as
        `name`. Each must be told of once more, with its final update."""
        own = reply_of(requests[0].request_id)
        salt = requests[0].cache_salt
        tenant = salt[:SHOWN_TENANT_BYTES].hex() if self._has_tenants else "-"
        self._replies[own] = _Reply(own, name or own, tenant, len(requests), len(requests))
        self._told.add(own)

    def record_update(self, request: Request, update: RequestUpdate, ended: Ended | None) -> None:
        """`ended` is what is remembered of a request after its final update, if anything is."""
        self._window.num_generated_tokens += len(update.tokens)
        own = reply_of(request.request_id)
        reply = self._replies.get(own)
        if update.finish_reason is None or reply is None:
            return
        reply.num_open -= 1
        reply.finish_reasons.add(update.finish_reason.value)
        if ended is not None:
            reply.add(ended)
        if not reply.num_open:
            del self._replies[own]
            if logger.isEnabledFor(logging.INFO):
                logger.info("%s", reply)

    def record_reply(
        self,
        request_id: str,
        name: str,
        handler: str,
        method: str,
        status: int,
        reason: str,
        param: str | None = None,
    ) -> None:
        """An HTTP reply has ended. One that never reached the engine has a line only here.

        All but `request_id` (ours), `name` and `param` must come from closed sets. `param` is told
        if it is a field of ours: an unknown field's name is the client's words.
        """
        if request_id in self._told:
            self._told.discard(request_id)
            return
        is_refused = status >= 400
        level = logging.INFO if is_refused else logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        field = re.split(r"[.\[]", param or "", maxsplit=1)[0]
        logger.log(
            level,
            "%s id=%s status=%d reason=%s param=%s method=%s path=%s",
            *("refused" if is_refused else "replied", name, status, reason or "-"),
            *(field if field in KNOWN_FIELDS else "-", method, handler),
        )

    def record_step(self, record: StepRecord) -> None:
        self._last = record
        self._window.num_prompt_tokens += record.num_prompt_tokens
        self._window.num_queried_tokens += record.num_queried_tokens
        self._window.num_hit_tokens += record.num_hit_tokens
        if record.drafts is not None:
            self._window.verified = self._window.verified.plus(record.drafts.verified)
        if self._timer is None and logger.isEnabledFor(logging.INFO):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(THROUGHPUT_INTERVAL_S, self._tell_throughput)

    def record_idle(self) -> None:
        """Nothing runs, nothing waits."""
        self._last = None

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell_throughput(self) -> None:
        """One line, and the next one in an interval for as long as there is work."""
        window, last, self._window, self._timer = self._window, self._last, _Window(), None
        running, waiting, kv_use = 0, 0, 0.0
        if last is not None:
            running, waiting = last.num_running, last.num_waiting
            kv_use = 1.0 - last.num_free_blocks / last.num_blocks
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(THROUGHPUT_INTERVAL_S, self._tell_throughput)
        queried = window.num_queried_tokens
        logger.info(
            "throughput prompt_tokens_per_s=%.1f generation_tokens_per_s=%.1f running=%d "
            "waiting=%d kv_use=%.1f%% prefix_hits=%s%s",
            window.num_prompt_tokens / THROUGHPUT_INTERVAL_S,
            window.num_generated_tokens / THROUGHPUT_INTERVAL_S,
            *(running, waiting, 100.0 * kv_use),
            f"{window.num_hit_tokens / queried:.1%}" if queried else "-",
            window,
        )


def _drafts(count: DraftCount) -> str:
    """The end of a request's line, if drafts ran."""
    if not count.num_proposed:
        return ""
    return f" drafts={count.num_proposed} accepted={count.num_accepted}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
