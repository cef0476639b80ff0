"""What reuse.py measures with: choices by name, prompts made of segments, engines over one model.

A segment is warmed as a request of its own, and found again under the hashes of its own blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from duetto.build import Built, served_config
from duetto.core.cache_miss import MissReason
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.reuse import Reuse, ReuseMethod, TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import Engine
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.reuse import look_share
from duetto.runner.load import LoadedModel
from duetto.runner.model_runner import ModelRunner
from duetto.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which tokens of segments are computed all the same; `method` None: segments are not marked,
    so that the prefix cache is all there is."""

    method: ReuseMethod | None = None
    num_first: int = 0
    ratio: float | None = None
    num_rounds: int = 1

    @property
    def name(self) -> str:
        if self.method is None:
            return "prefix cache"
        if self.method == "first":
            return f"first({self.num_first})"
        if self.ratio is None:
            return self.method
        rounds = f", {self.num_rounds} rounds" if self.num_rounds > 1 else ""
        return f"{self.method}({self.ratio:g}{rounds})"

    def over(self, segments: Sequence[TokenRange]) -> Reuse | None:
        if self.method is None:
            return None
        numbers = self.num_first, self.ratio, self.num_rounds
        return Reuse(tuple(segments), self.method, *numbers)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens, of which some ranges are documents. The one at the start is a prefix."""

    token_ids: tuple[int, ...]
    documents: tuple[TokenRange, ...]

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], question: Sequence[int]) -> "Prompt":
        """Documents one behind the other, then the question."""
        token_ids, ranges = list[int](), list[TokenRange]()
        for document in documents:
            ranges.append(TokenRange(len(token_ids), len(token_ids) + len(document)))
            token_ids += document
        return cls((*token_ids, *question), tuple(ranges))

    def request(
        self,
        name: str,
        choice: Choice,
        *,
        num_output: int = 1,
        ends: frozenset[int] = frozenset(),
        unmarked: frozenset[int] = frozenset(),
    ) -> Request:
        """Greedy. Documents whose numbers are `unmarked` are computed where they stand."""
        marked = [each for n, each in enumerate(self.documents) if n not in unmarked]
        return Request(
            request_id=name,
            prompt_token_ids=self.token_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=num_output),
            max_tokens=num_output,
            seed=0,
            stop_token_ids=ends,
            reuse=choice.over(marked),
        )


def new_engine(
    built: Built, args: EngineArgs, runner: ModelRunner | None = None, **changes: bool
) -> Engine:
    """A fresh scheduler, so an empty cache, over the model that is loaded already; with the KV
    arena of `runner`, by default the model's own, which one engine at a time may have."""
    config = replace(served_config(built.model, args), **changes)
    times = LearnedStepTime(built.prices.step_time, look_share(built.model.program))
    return Engine(
        Scheduler(config, times.late_time), runner or built.model.runner, step_times=times
    )


def other_runner(loaded: LoadedModel) -> ModelRunner:
    """With a KV arena of its own."""
    sizes = loaded.num_blocks, loaded.block_size, loaded.kv_dtype
    return ModelRunner(loaded.program, loaded.runner.backend, *sizes, {})


class Running:
    """One request, alone in its engine, step by step. Its seconds are those of its own steps, so
    that another engine may go on in between."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.request = engine, request
        self.seconds = 0.0  # until the first token
        self.num_tokens = 0  # that were computed, those of looks too
        self.answer: list[int] = []
        engine.add(request)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self) -> None:
        start = perf_counter()
        report = self._engine.step()
        if not self.answer:
            self.seconds += perf_counter() - start
        for update in report.updates:
            if update.error is not None:
                raise RuntimeError(f"request {update.request_id} failed: {update.error}")
            self.answer += [token.token_id for token in update.tokens]
        if report.record is not None:
            self.num_tokens += report.record.num_tokens

    def run(self) -> None:
        while self.has_work:
            self.step()


def check_found(request: Request) -> None:
    """Raises if a segment was not there: then what was measured is not what reuse takes."""
    harmless = (None, MissReason.AT_START, MissReason.ALL_COMPUTED)
    missing = [hit for hit in request.timings.segment_hits if hit.miss not in harmless]
    if missing:
        raise RuntimeError(f"{request.request_id}: segments were not found: {missing}")
