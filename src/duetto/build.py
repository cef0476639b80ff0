"""Where the parts are joined: a checkpoint and EngineArgs become an engine that can run.

Whatever was chosen on a user's behalf is in `Built.notes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from duetto.checkpoints.checkpoint import Checkpoint
from duetto.checkpoints.config import ModelConfig, read_config, read_generation_config
from duetto.checkpoints.other_formats import (
    directory_of_others,
    neither_here_nor_there,
    other_format,
)
from duetto.checkpoints.same_tokenizer import difference
from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.config import SchedulerConfig, scheduler_config
from duetto.core.embeddings import EmbeddingModel
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError, InvalidRequest
from duetto.core.reuse_choice import (
    ReuseChoice,
    ReuseLimits,
    ReuseRules,
    insisted,
    parse_reuse,
)
from duetto.core.shape import StepTime
from duetto.core.speculation import FLAG, DraftModelOptions, SpeculativeConfig
from duetto.demo import DEMO_MODELS, demo_model_dir
from duetto.dialects.choose import choose_dialects
from duetto.engine.engine import Engine
from duetto.engine.speech import Speech
from duetto.engine.virtual_engines import VirtualEngines
from duetto.evals.reuse_verdicts import ReuseGate
from duetto.grammars.compile import CompiledGrammars
from duetto.pricing.drafting import SpeculationPrices
from duetto.pricing.host import HostPrices, gpu_prices, host_prices
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.reuse import look_share
from duetto.program.program import Program
from duetto.progress import show_progress
from duetto.runner.device_runner import DeviceRunner
from duetto.runner.load import Companion, LoadedModel, load_model
from duetto.runner.masks import Masks
from duetto.runner.model_runner import ModelRunner
from duetto.runner.proposers.load import check_contexts, plan_companion, plan_draft
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import DraftPolicy, NoDrafts
from duetto.scheduler.grammar_drafts import GrammarDrafts
from duetto.scheduler.guarded_drafts import GuardedDrafts
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.thinking import Thinking
from duetto.scheduler.tiers import NO_TIERS, Tiers, TierSizes


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What a door needs of a model beside an engine: all but its weights."""

    root: Path
    name: str
    config: ModelConfig
    codec: Tokenizer
    default_sampling: dict[str, Any]  # the checkpoint's recommendations, as SamplingParams fields
    grammars: CompiledGrammars  # of its vocabulary
    speech: Speech  # what its answers mean
    companion: Companion | None  # what proposes drafts, if that is asked for
    notes: tuple[str, ...]


def build_front(model: str | Path, args: EngineArgs) -> FrontEnd:
    """All of `build` for which no weight is read. Raises what `build` raises."""
    root = find_checkpoint(model, args.revision)
    generation = read_generation_config(root)
    model_config = read_config(root)
    ends = {*model_config.eos_token_ids, *generation.eos_token_ids}
    strange = sorted(i for i in ends if not 0 <= i < model_config.vocab_size)
    codec = load_tokenizer(
        root,
        eos_token_ids=ends.difference(strange),
        vocab_size=model_config.vocab_size,
        chat_template=None if args.chat_template is None else Path(args.chat_template),
    )
    notes = [f"end of sequence {i} is outside the vocabulary, and ignored" for i in strange]
    notes += _notes_on_rows(codec.tokens_without_row)
    notes += [codec.chat_note] if codec.chat_note else []
    companion = companion_of(args, model_config.context_length, codec)
    grammars = CompiledGrammars(codec.vocabulary)
    recommended = asdict(generation)
    del recommended["eos_token_ids"]
    return FrontEnd(
        root=root,
        name=root.resolve().name if Path(model).exists() else str(model),
        config=model_config,
        codec=codec,
        default_sampling={k: v for k, v in recommended.items() if v is not None},
        grammars=grammars,
        speech=_speech(codec, args, grammars),
        companion=companion,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that can run, and what a door needs beside it."""

    engine: Engine | VirtualEngines
    codec: Tokenizer
    scheduler_config: SchedulerConfig
    default_sampling: dict[str, Any]  # the checkpoint's recommendations, as SamplingParams fields
    model: LoadedModel
    name: str
    root: Path
    notes: tuple[str, ...]
    prices: HostPrices  # of its steps on this machine
    grammars: CompiledGrammars  # of its vocabulary
    speech: Speech  # what its answers mean


def build(
    model: str | Path, args: EngineArgs, on_status: Callable[[str], None] | None = None
) -> Built:
    """Load `model` (a directory, or org/name on the Hugging Face hub) as `args` say.

    `on_status` is told, in a line, of work that will take a while.
    Raises ConfigError or CheckpointError, with one line that names the flag or the file.
    """
    front = build_front(model, args)  # weights come last: what can be refused without them is
    codec = front.codec
    with show_progress(f"loading {front.root.name}") as bar:
        loaded = load_model(
            front.root,
            args,
            on_progress=bar.reach,
            on_status=on_status,
            companion=front.companion,
            masks=Masks(front.grammars),
        )
    config = served_config(loaded, args)
    prices = _prices(loaded)
    return Built(
        engine=_make_engines(
            loaded,
            config,
            prices.step_time,
            decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
        ),
        codec=codec,
        scheduler_config=config,
        default_sampling=front.default_sampling,
        model=loaded,
        name=front.name,
        root=front.root,
        notes=(*loaded.notes, *front.notes, *prices.notes),
        prices=prices,
        grammars=front.grammars,
        speech=front.speech,
    )


def _prices(loaded: LoadedModel) -> HostPrices:
    if loaded.device is None:
        return host_prices(loaded.program, loaded.precision)
    return gpu_prices(loaded.program, loaded.precision, loaded.dtype, loaded.device)


def _speech(codec: Tokenizer, args: EngineArgs, grammars: CompiledGrammars) -> Speech:
    """Raises ConfigError for a parser that is not known."""
    facts = codec.chat_template_facts(with_tools=True)
    dialects = choose_dialects(
        None if facts is None else facts.source,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )
    special = frozenset(token for token, is_special in codec.tokens().values() if is_special)
    return Speech(dialects, special, grammars)


def model_key(built: Built) -> str:
    """Under which it is kept what was measured of a model's answers: other weights have another,
    and so have the same weights held in other numbers."""
    return _key_of(built.root, built.model.program, built.model.numerics)


def _key_of(root: Path, program: Program, numerics: str) -> str:
    with Checkpoint(root, program) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    return sha256(f"{fingerprint}/{numerics}".encode()).hexdigest()[:32]


def served_config(loaded: LoadedModel, args: EngineArgs) -> SchedulerConfig:
    """The scheduler's configuration for a model that is in memory."""
    config = scheduler_config(
        args,
        num_blocks=loaded.num_blocks,
        max_model_len=loaded.max_model_len,
        cache_namespace=loaded.numerics.encode(),
        is_pooling=loaded.embeddings is not None,
    )
    return replace(config, max_logprobs=args.max_logprobs)


def reuse_choice(word: str) -> ReuseChoice | None:
    """What `--reuse` means. Raises ConfigError for what is no choice."""
    try:
        return parse_reuse(word)
    except InvalidRequest as error:
        raise ConfigError(f"--reuse {word:.60}: {error.message}") from None


class ReusedModel(NamedTuple):
    """What decides how parts of a text may be reused."""

    root: Path
    program: Program
    numerics: str
    embeddings: EmbeddingModel | None
    limits: ReuseLimits
    scheduler_config: SchedulerConfig

    @classmethod
    def of(cls, built: Built) -> "ReusedModel":
        model = built.model
        return cls(
            *(built.root, model.program, model.numerics),
            *(model.embeddings, model.reuse_limits, built.scheduler_config),
        )


def reuse_rules(
    built: Built | ReusedModel, default: ReuseChoice | None, *, allow_unmeasured: bool
) -> ReuseRules:
    """Who may choose what of a server, where `default` is for who does not choose.

    Raises ConfigError for a default that cannot be, or that nobody vouches for.
    """
    model = ReusedModel.of(built) if isinstance(built, Built) else built
    if default is not None and model.embeddings is not None:
        raise ConfigError(f"--reuse {default} and embeddings: no part of a text can be marked")
    limits = model.limits
    why_not = insisted if allow_unmeasured else _gate(model)
    if default is None:
        return ReuseRules(why_not=why_not, limits=limits)
    if not model.scheduler_config.enable_prefix_caching:
        raise ConfigError("--reuse with --no-enable-prefix-caching: what is reused is kept there")
    if (reason := limits.why_not(default) or why_not(default)) is not None:
        raise ConfigError(f"--reuse {default}: {reason}")
    # What nobody asked for must not be the reason to refuse.
    default = replace(default, on_unsupported="compute")
    return ReuseRules(default=default, why_not=why_not, limits=limits)


def _gate(model: ReusedModel) -> Callable[[ReuseChoice], str | None]:
    """Lets through what `duetto calibrate-reuse` found to be good enough on this model."""
    gate = ReuseGate(_key_of(model.root, model.program, model.numerics))

    def why_not(choice: ReuseChoice) -> str | None:
        reason = gate.why_not(choice)
        return reason and f"{reason}; --allow-unmeasured-reuse lets the server take it"

    return why_not


def companion_of(
    args: EngineArgs, context_length: int, codec: Tokenizer | None = None
) -> Companion | None:
    """What proposes drafts beside the model, if that is asked for. `context_length` is the model's,
    and `codec` its tokenizer, where drafts are to be of use to it.

    Raises ConfigError or CheckpointError for what does not fit together.
    """
    config = SpeculativeConfig.parse(args.speculative_config, args.speculative_model)
    if config is None:
        return None
    draft, options = None, config.draft_model
    if options is not None:
        draft_dir = _find_draft(options)
        draft = plan_draft(draft_dir, options, args)
        if codec is not None:
            theirs = load_tokenizer(draft_dir, vocab_size=draft.program.vocab_size)
            _check_same_tokenizer(codec, theirs, options.model)
    length = min(args.asked_len or context_length, context_length)
    check_contexts(config, length, draft)
    return plan_companion(config, draft, args.max_num_seqs)


def _find_draft(options: DraftModelOptions) -> Path:
    try:
        return find_checkpoint(options.model, options.revision)
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: the draft model: {error}") from error


def _check_same_tokenizer(codec: Tokenizer, theirs: Tokenizer, name: str) -> None:
    if (found := difference(codec, theirs)) is not None:
        raise ConfigError(
            f"{FLAG}: the draft model {name} has another tokenizer: {found}; "
            f"a draft must have the tokenizer of its model"
        )


def _notes_on_rows(tokens_without_row: Mapping[int, str]) -> list[str]:
    if not tokens_without_row:
        return []
    shown = ", ".join(f"{token!r} ({i})" for i, token in sorted(tokens_without_row.items())[:4])
    more = len(tokens_without_row) - 4
    shown += f" and {more} more" if more > 0 else ""
    return [f"the model has no row for {shown}: a text that spells one is refused"]


def _make_engines(
    loaded: LoadedModel,
    config: SchedulerConfig,
    step_time: StepTime,
    decode: Callable[[Sequence[int], bool], str],
) -> Engine | VirtualEngines:
    """One, or one for each batch that is under way at one time: they share out the requests that
    run, and each has blocks of its own."""
    count = len(loaded.runners)
    if count == 1:
        return make_engine(loaded, config, step_time, decode)
    own = replace(config, max_num_seqs=-(-config.max_num_seqs // count))
    return VirtualEngines(
        [make_engine(loaded, own, step_time, decode, runner) for runner in loaded.runners]
    )


def make_engine(
    loaded: LoadedModel,
    config: SchedulerConfig,
    step_time: StepTime | None = None,
    decode: Callable[[Sequence[int], bool], str] | None = None,
    runner: ModelRunner | DeviceRunner | None = None,
) -> Engine:
    """An engine with an empty cache, which learns from its own steps what a step takes; it begins
    with `step_time`. That decides when the tokens of prompts are computed, never an answer.
    `runner`: one of the model's; by default the first."""
    runner = runner or loaded.runner
    times, thinking = LearnedStepTime(step_time, look_share(loaded.program)), Thinking(perf_counter)
    policy, tiers = _draft_policy(loaded, times, thinking), _tiers(loaded, times)
    of_grammars = GuardedDrafts(GrammarDrafts(times.row_times))
    scheduler = Scheduler(config, times.late_time, policy, tiers, of_grammars)
    depth = runner.depth
    return Engine(
        *(scheduler, runner, decode),
        step_times=times,
        depth=depth,
        thinking=thinking,
    )


def _tiers(loaded: LoadedModel, times: LearnedStepTime) -> Tiers:
    """What becomes of KV that leaves the arena."""
    room = loaded.tiers
    if room is None:
        return Tiers(NO_TIERS, loaded.block_size)
    sizes = TierSizes(room.num_slots, room.disk is not None)
    keys = room.disk.folder.keys if room.disk is not None else ()
    return Tiers(sizes, loaded.block_size, keys, times.step_time)


def _draft_policy(loaded: LoadedModel, times: LearnedStepTime, thinking: Thinking) -> DraftPolicy:
    """Who is asked for how many drafts, and which are verified: as many as pay."""
    if not loaded.max_drafts:
        return NoDrafts()
    return GuardedDrafts(AdaptiveDrafts(loaded.max_drafts, SpeculationPrices(times), thinking))


def find_checkpoint(model: str | Path, revision: str | None = None) -> Path:
    """A directory as it is; a model that ships by its name; `org/name` from the hub's cache or the
    hub, there as it is at a branch, tag or commit.

    Raises ConfigError or CheckpointError, in one line.
    """
    if not str(model):
        raise ConfigError(f"an empty name: {neither_here_nor_there(model)}")
    path = Path(model)
    is_here = path.is_dir() or model in DEMO_MODELS
    if is_here and revision is not None:
        raise ConfigError(f"--revision: is for models on the hub, and {model} is here")
    if path.is_dir():
        if (why := directory_of_others(path)) is not None:
            raise CheckpointError(path, why)
        return path
    if is_here:
        return demo_model_dir(str(model))
    if (why := other_format(model)) is not None:
        raise ConfigError(f"{model}: {why}")
    is_name = isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/"))
    if path.exists() or not is_name:
        raise CheckpointError(path, neither_here_nor_there(model, DEMO_MODELS))
    # Loaded only here: the hub's client takes longer to import than all the rest of Duetto.
    hub = import_module("duetto.checkpoints.hub")
    with show_progress(f"downloading {model}") as bar:
        found: Path = hub.download(str(model), revision, bar.reach)
    return found
