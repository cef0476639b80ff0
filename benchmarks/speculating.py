"""What speculation.py measures with: engines with and without drafts over one model in memory.

All engines of a bench share threads and weights. Engines without drafts have one KV arena, those
with drafts another one; of each kind only one may run at one time.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from duetto.backends.backend import Backend, FloatArray, KVMoves, StepArrays
from duetto.build import companion_of, served_config
from duetto.checkpoints.config import read_config
from duetto.checkpoints.json_file import read_json
from duetto.checkpoints.shapes import SHAPES
from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.batch import SampledToken
from duetto.core.draft_counts import NO_CHAINS, Chains
from duetto.core.engine_args import EngineArgs
from duetto.core.files import Progress
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape
from duetto.engine.engine import Engine
from duetto.models.make_model import make_model
from duetto.pricing.drafting import SpeculationPrices
from duetto.pricing.host import host_prices
from duetto.pricing.learned import LearnedStepTime
from duetto.program.dtype import KVDtype
from duetto.runner.load import Companion, LoadedModel, ModelPlan, load_model
from duetto.runner.model_runner import ModelRunner
from duetto.runner.proposers.proposer import DraftRequest, Proposer
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, DraftPolicy, Planned
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.thinking import Thinking

MOST_DRAFTS = 16  # of a request in a step, for methods that are asked
NUM_PROMPT = 8  # tokens of a random prompt
_FORCED = 1e4  # a logit that nothing else reaches


class Replaceable:
    """A proposer whose place is taken by one after the other."""

    needs_hidden = False

    def __init__(self) -> None:
        self.now: Proposer | None = None

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[tuple[int, ...]]:
        return [()] * len(requests) if self.now is None else self.now.propose(requests)


class Always:
    """A policy that asks one proposer for `most` drafts each step, and verifies all it gets."""

    is_on = True

    def __init__(self, method: str, most: int) -> None:
        self._method, self._most = method, most

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,  # noqa: ARG002
        room: int,  # noqa: ARG002
        limit_s: float | None = None,  # noqa: ARG002
    ) -> Mapping[str, int]:
        return {request.request_id: len(drafts) for request, drafts in candidates}

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        return {
            request.request_id: Ask(self._method, min(self._most, num_left))
            for request, num_left, _ in planned
        }

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


class Forced:
    """A backend whose one request says a given text, whatever its weights would. For greedy
    requests that are alone."""

    def __init__(self, backend: Backend, text: Sequence[int]) -> None:
        self._backend, self._text = backend, text

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> object:
        return self._backend.allocate_kv(num_blocks, block_size, dtype)

    def run(self, step: StepArrays, kv: object) -> FloatArray:
        logits = self._backend.run(step, kv)
        for row, place in enumerate(step.logit_rows.tolist()):
            position = int(step.positions[place]) + 1
            if position < len(self._text):
                logits[row, self._text[position]] = _FORCED
        return logits

    def move_kv(self, moves: KVMoves, kv: object) -> None:
        self._backend.move_kv(moves, kv)


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of some requests, all at one time. Seconds and tokens are those of the window in
    which all of them decode: from the last one's first token to the first one's end."""

    seconds: float
    num_tokens: int
    steps: Sequence[tuple[int, float]]  # of the window: tokens computed, seconds
    answers: Mapping[str, list[SampledToken]]
    chains: Chains  # of drafts that were verified, in the whole run

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def token_ids(self) -> dict[str, list[int]]:
        return {name: [t.token_id for t in tokens] for name, tokens in self.answers.items()}


class Bench:
    """A model in memory, its plain engine, and as many others as are asked for."""

    def __init__(
        self, loaded: LoadedModel, args: EngineArgs, recorded: Replaceable, tokenizer: Tokenizer
    ) -> None:
        self.loaded, self.recorded, self.tokenizer = loaded, recorded, tokenizer
        self.vocab_size = loaded.program.vocab_size
        self.config = served_config(loaded, args)
        self._step_time = host_prices(loaded.program, loaded.precision).step_time
        self._plain = self._runner(loaded.runner.backend, {})

    def _runner(self, backend: Backend, proposers: Mapping[str, Proposer]) -> ModelRunner:
        """With a KV arena of its own."""
        loaded = self.loaded
        sizes = loaded.num_blocks, loaded.block_size, loaded.kv_dtype
        return ModelRunner(loaded.program, backend, *sizes, proposers)

    def engine(
        self,
        policy: Callable[[LearnedStepTime, Thinking], DraftPolicy] | None = None,
        runner: ModelRunner | None = None,
    ) -> Engine:
        """A fresh scheduler, with an empty cache and nothing learned."""
        times, thinking = LearnedStepTime(self._step_time), Thinking(perf_counter)
        drafts = None if policy is None else policy(times, thinking)
        scheduler = Scheduler(self.config, times.late_time, drafts)
        own = self._plain if drafts is None else self.loaded.runner
        return Engine(scheduler, runner or own, step_times=times, thinking=thinking)

    def shipped(self, *methods: str, runner: ModelRunner | None = None) -> Engine:
        """With the policy that ships."""
        most = dict.fromkeys(methods, MOST_DRAFTS)
        return self.engine(
            lambda times, thinking: AdaptiveDrafts(most, SpeculationPrices(times), thinking), runner
        )

    def always(self, method: str, most: int, runner: ModelRunner | None = None) -> Engine:
        return self.engine(lambda _, __: Always(method, most), runner)

    def saying(self, text: Sequence[int], proposers: Mapping[str, Proposer]) -> ModelRunner:
        """A runner whose one request says a given text."""
        return self._runner(Forced(self.loaded.runner.backend, text), proposers)

    def requests(self, count: int, num_output: int) -> list[Request]:
        """Random prompts; the same each time."""
        rng = random.Random(0)
        prompts = [[rng.randrange(self.vocab_size) for _ in range(NUM_PROMPT)] for _ in range(64)]
        return [new_request(str(i), prompts[i], num_output) for i in range(count)]


def load(path: Path, args: EngineArgs) -> Bench:
    """A model, what `args` say that proposes drafts, and the method "recorded" beside it."""
    recorded = Replaceable()
    config = read_config(path)
    codec = load_tokenizer(path, eos_token_ids=config.eos_token_ids, vocab_size=config.vocab_size)
    asked = companion_of(args, config.context_length, codec)

    def proposers(plan: ModelPlan, on_progress: Progress | None) -> dict[str, Proposer]:
        others = {} if asked is None else asked.load(plan, on_progress)
        return {**others, "recorded": recorded}

    companion = Companion(
        name="the proposers of this benchmark",
        weight_bytes=0 if asked is None else asked.weight_bytes,
        fixed_bytes=0 if asked is None else asked.fixed_bytes,
        block_bytes=0 if asked is None else asked.block_bytes,
        max_drafts={},
        load=proposers,
    )
    return Bench(load_model(path, args, companion=companion), args, recorded, codec)


def new_request(
    request_id: str,
    prompt: Sequence[int],
    num_output: int,
    *,
    seed: int = 0,
    ends: frozenset[int] = frozenset(),
    **sampling: Any,
) -> Request:
    """Greedy if nothing is said, and as long as it may be if it has no ends."""
    params = SamplingParams(max_tokens=num_output, **{"temperature": 0.0, **sampling})
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=params,
        max_tokens=num_output,
        seed=seed,
        arrival_time=0.0,
        stop_token_ids=ends,
    )


class Running:
    """A run of some requests, all at one time, step by step."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._answers: dict[str, list[SampledToken]] = {r.request_id: [] for r in requests}
        self._has_ended = False
        self._steps: list[tuple[int, float]] = []
        self._num_tokens = 0
        self.seconds = 0.0  # of the steps that count
        for request in requests:
            engine.add(request)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    @property
    def in_window(self) -> bool:
        """All of them decode."""
        return not self._has_ended and all(self._answers.values())

    def step(self, *, counts: bool) -> None:
        start = perf_counter()
        report = self._engine.step()
        step_s = perf_counter() - start
        for update in report.updates:
            if update.error is not None:
                raise RuntimeError(f"request {update.request_id} failed: {update.error}")
            self._answers[update.request_id] += update.tokens
            self._has_ended = self._has_ended or update.finish_reason is not None
        if counts and report.record is not None:
            self.seconds += step_s
            self._num_tokens += sum(len(update.tokens) for update in report.updates)
            self._steps.append((report.record.num_tokens, step_s))

    def ran(self) -> Ran:
        chains = NO_CHAINS
        for request in self._requests:
            if request.timings.speculation is not None:
                chains = chains.plus(request.timings.speculation.chains)
        return Ran(self.seconds, self._num_tokens, self._steps, self._answers, chains)


def run(engine: Engine, requests: Sequence[Request]) -> Ran:
    """All requests at one time, to the end."""
    running = Running(engine, requests)
    while running.has_work:
        running.step(counts=running.in_window)
    return running.ran()


def run_both(first: Running, second: Running) -> tuple[Ran, Ran]:
    """Two runs at one time, step by step in turn, so that a slow moment of the machine, which may
    last for seconds, meets both. Each gets half of the time; only the part in which both decode
    counts. Their engines must not share KV."""
    runs = first, second
    while any(each.has_work for each in runs):
        begun = [each for each in runs if each.has_work]
        counts = all(each.in_window for each in runs)
        if not counts:  # bring the one that is not there yet to its window
            begun = [each for each in begun if not each.in_window] or begun
        min(begun, key=lambda each: each.seconds).step(counts=counts)
    return first.ran(), second.ran()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Runs of the same requests without drafts and with them, in turn."""

    plain: Sequence[float]  # tokens per second
    drafted: Sequence[float]
    chains: Chains

    @property
    def ratios(self) -> list[float]:
        return [d / p for p, d in zip(self.plain, self.drafted, strict=True)]

    @property
    def ratio(self) -> float:
        """Without the first pair, in which prices and acceptance are not known yet."""
        return statistics.median(self.ratios[1:] or self.ratios)

    @property
    def first_ratio(self) -> float:
        return self.ratios[0]

    @property
    def tokens_per_step(self) -> float:
        """Of the steps that verified drafts."""
        return self.chains.mean_length or 1.0

    def as_json(self) -> dict[str, object]:
        proposed, accepted = self.chains.total
        return {
            "ratio": self.ratio,
            "first_ratio": self.first_ratio,
            "ratios": self.ratios,
            "plain_tokens_per_s": statistics.median(self.plain),
            "num_proposed": proposed,
            "num_accepted": accepted,
            "tokens_per_drafted_step": self.tokens_per_step,
        }


def pairs(
    plain: Engine,
    drafted: Engine,
    requests: Callable[[], list[Request]],
    *,
    least: int,
    most: int,
    until: float,
    before_each: Callable[[int], None] = lambda _: None,
) -> Pairs:
    """At least `least` pairs, and more until the clock says `until`. `before_each` is told the
    number of the pair. The engines must not share KV. Raises if an answer differs."""
    rates: tuple[list[float], list[float]] = [], []
    chains = NO_CHAINS
    while len(rates[0]) < least or (len(rates[0]) < most and perf_counter() < until):
        before_each(len(rates[0]))
        rans = run_both(Running(plain, requests()), Running(drafted, requests()))
        if rans[0].answers != rans[1].answers:
            raise RuntimeError("answers with drafts and without differ")
        for each, ran in zip(rates, rans, strict=True):
            each.append(ran.rate)
        chains = chains.plus(rans[1].chains)
    return Pairs(rates[0], rates[1], chains)


@contextmanager
def directory_of(shape: str) -> Iterator[Path]:
    """A checkpoint, or one of random weights that is made for the occasion."""
    with TemporaryDirectory() as folder:
        path = Path(shape)
        if not path.is_dir():
            path = Path(folder) / shape
            make_model(SHAPES[shape], path)
        yield path


def useless_draft(target: Path, folder: Path) -> Path:
    """A random model of the target's vocabulary, a quarter as wide and as deep."""
    config = dict(read_json(target / "config.json").values)
    config |= {
        "hidden_size": max(64, config["hidden_size"] // 4),
        "intermediate_size": max(128, config["intermediate_size"] // 4),
        "num_hidden_layers": max(1, config["num_hidden_layers"] // 4),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": max(16, config["hidden_size"] // 8),
    }
    make_model(config, folder / "useless", seed=1)
    return folder / "useless"
