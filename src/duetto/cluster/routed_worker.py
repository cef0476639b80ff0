"""What a router keeps of one worker: its handle, and what was sent there and came back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from duetto.cluster.facts import WorkerFacts, WorkerRole
from duetto.core.batch import StepRecord
from duetto.core.cache_control import CacheCounts
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.engine.handle import EngineHandle
from duetto.routing.policies import WorkerView


class GaugeTotals(NamedTuple):
    """What of a step's record is of an engine and not of the step; of one worker, or of several."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    cache: CacheCounts = CacheCounts()

    def plus(self, other: "GaugeTotals", sign: int = 1) -> "GaugeTotals":
        own, more = (*self[:4], *self.cache), (*other[:4], *other.cache)
        running, waiting, free, blocks, *cache = [
            a + sign * b for a, b in zip(own, more, strict=True)
        ]
        return GaugeTotals(running, waiting, free, blocks, CacheCounts(*cache))

    def on(self, record: StepRecord, engine: int) -> StepRecord:
        """A step's record with these in place of its engine's own."""
        return record._replace(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_free_blocks=self.num_free_blocks,
            num_blocks=self.num_blocks,
            cache=self.cache,
            engine=engine,
        )


_NO_COUNTS = CacheCounts()
_NO_GAUGES = GaugeTotals()


@dataclass(eq=False)
class RoutedWorker:
    """One worker of a router, which alone writes here."""

    name: str  # that no other worker of this router ever has
    number: int  # among those that are here at one time, from 0
    config: SchedulerConfig
    handle: EngineHandle
    role: WorkerRole = "both"
    link: str = ""  # where others ask it for the KV of prompts; "": nowhere
    tells_events: bool = False  # so its blocks are known, and not only guessed
    is_leaving: bool = False
    prompt_tokens: int = 0  # these five as in WorkerView
    num_waiting: int = 0
    waiting_tokens: int = 0
    num_answers: int = 0
    context_tokens: int = 0
    last_record: StepRecord | None = None
    cache: CacheCounts = _NO_COUNTS  # told last, by a step or a reply
    gauges: GaugeTotals = _NO_GAUGES  # as they are in the router's totals

    @classmethod
    def of(cls, facts: WorkerFacts, number: int, handle: EngineHandle) -> "RoutedWorker":
        return cls(
            facts.worker_id,
            number,
            facts.scheduler,
            handle,
            facts.role,
            facts.link,
            tells_events=bool(facts.events),
        )

    @property
    def takes_requests(self) -> bool:
        return self.role != "prefill" and not self.is_leaving and self.handle.is_alive

    @property
    def takes_prompts(self) -> bool:
        """It computes prompts for others."""
        return (
            self.role == "prefill"
            and bool(self.link)
            and not self.is_leaving
            and self.handle.is_alive
        )

    def view(self, cached_tokens: int) -> WorkerView:
        return WorkerView(
            self.name,
            self.prompt_tokens,
            self.num_waiting,
            self.waiting_tokens,
            self.num_answers,
            self.context_tokens,
            cached_tokens,
        )

    def gauges_now(self) -> GaugeTotals:
        """By its last step; if it has nothing to do, what ended between steps is gone since."""
        record = self.last_record
        if record is None:
            num_blocks = self.config.num_blocks
            return GaugeTotals(0, 0, num_blocks, num_blocks, self.cache)
        cache, num_blocks = self.cache, record.num_blocks
        if not self.num_waiting + self.num_answers:
            return GaugeTotals(0, 0, num_blocks - cache.num_pinned_blocks, num_blocks, cache)
        return GaugeTotals(
            record.num_running, record.num_waiting, record.num_free_blocks, num_blocks, cache
        )


@dataclass(eq=False)
class RoutedRequest:
    """A request that is with a worker, and has had no final update."""

    request: Request
    worker: RoutedWorker
    uncached_tokens: int = 0
    num_tokens: int = 0  # of its answer
    has_begun: bool = False  # something of it was delivered
    is_aborted: bool = False
    num_lost: int = 0  # workers that were lost with it
    refused_by: tuple[str, ...] = ()  # names of workers that have not taken it
    asked: RoutedWorker | None = None  # the worker that is asked for its prompt's KV first

    @property
    def may_be_elsewhere(self) -> bool:
        return not (self.has_begun or self.is_aborted)

    def sent(self) -> None:
        """It goes to its worker now."""
        worker, size = self.worker, self.request.num_prompt_tokens
        worker.prompt_tokens += size
        worker.num_waiting += 1
        worker.waiting_tokens += self.uncached_tokens
        if self.asked is not None:
            self.asked.num_waiting += 1
            self.asked.waiting_tokens += self.uncached_tokens
            self.asked.prompt_tokens += size

    def told(self, num_tokens: int) -> None:
        """Something of it was delivered, so many tokens of its answer among it."""
        self.has_begun = True
        if num_tokens and not self.num_tokens:
            self._waits_no_more()
            self.worker.num_answers += 1
            self.worker.context_tokens += self.request.num_prompt_tokens
        self.num_tokens += num_tokens
        self.worker.context_tokens += num_tokens

    def gone(self) -> None:
        """It is no longer with its worker."""
        self.worker.prompt_tokens -= self.request.num_prompt_tokens
        if self.num_tokens:
            self.worker.num_answers -= 1
            self.worker.context_tokens -= self.request.num_prompt_tokens + self.num_tokens
        else:
            self._waits_no_more()

    def _waits_no_more(self) -> None:
        self.worker.num_waiting -= 1
        self.worker.waiting_tokens -= self.uncached_tokens
        if self.asked is not None:
            self.asked.num_waiting -= 1
            self.asked.waiting_tokens -= self.uncached_tokens
            self.asked.prompt_tokens -= self.request.num_prompt_tokens
            self.asked = None


def free_number(workers: Sequence[RoutedWorker]) -> int:
    """The lowest that none of them has."""
    taken = {worker.number for worker in workers}
    return next(i for i in range(len(taken) + 1) if i not in taken)
