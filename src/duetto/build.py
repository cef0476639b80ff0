"""Where the parts are joined: a checkpoint and EngineArgs become an engine that can run.

The only reader of "auto" and None in EngineArgs. Whatever was chosen is in `Built.notes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from duetto.checkpoints.config import read_config, read_generation_config
from duetto.checkpoints.other_formats import (
    directory_of_others,
    neither_here_nor_there,
    other_format,
)
from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.config import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    SchedulerConfig,
    SchedulingPolicy,
    batched_tokens,
    check_policy,
    itl_target,
)
from duetto.core.errors import CheckpointError, ConfigError
from duetto.demo import DEMO_MODELS, demo_model_dir
from duetto.engine.engine import Engine
from duetto.pricing.host import HostPrices, StepTime, host_prices
from duetto.pricing.learned import LearnedStepTime
from duetto.program.dtype import kv_head_bytes
from duetto.program.shape import Precision
from duetto.progress import show_progress
from duetto.runner.load import LoadedModel, LoadOptions, load_model
from duetto.scheduler.scheduler import Scheduler

_POSITIVE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "threads",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """How a model is run. Names and meanings are vLLM's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights are rounded to; auto is what the checkpoint says."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """How weights are quantized, at load; this changes answers."""
    quantization_skip: tuple[str, ...] = ()
    """Patterns of tensors that stay whole, as 'model.layers.0.*'; may be repeated."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """What keys and values are stored in; auto is what the weights are."""
    max_model_len: int | Literal["auto"] | None = None
    """Longest prompt and answer together; by default, and for auto, the model's own or what
    fits."""
    max_num_seqs: int = MAX_NUM_SEQS
    """Most requests that run at one time."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step; 512 by default, or a whole context without chunking."""
    target_itl: float | Literal["auto", "off"] | None = "auto"
    """Milliseconds that a step beside streams is to take at most; prompts are cut accordingly.
    auto is 250, or four steps of the streams alone if that is more; off is no limit."""
    block_size: int = BLOCK_SIZE
    """Tokens in a KV block."""
    kv_cache_memory_bytes: int | None = None
    """Memory for KV; by default at most a quarter of what is available."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    enable_chunked_prefill: bool = True
    """Compute long prompts in parts that share steps with other requests."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """fcfs, priority (lower first, ageing), or static (batch by batch, to compare)."""
    backend: Literal["auto", "cpu", "reference"] = "auto"
    """What computes: cpu (native), or reference (slow, and plain to read)."""
    threads: int | None = None
    """Threads that compute; by default as many as this process may use."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; by default its main branch."""
    packed_cache: str = "auto"
    """Where quantized weights are kept for the next start; off for nowhere."""
    seed: int | None = None
    """Seeds requests that bring none; by default LLM takes 0, and serve draws each."""

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the flag, for what needs no model to be refused."""
        if self.max_model_len == "auto":
            object.__setattr__(self, "max_model_len", None)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: must be a whole number above 0, not {value!r}")
        itl_target(self.target_itl, enable_chunked_prefill=True)
        check_policy(self.scheduling_policy)
        self._check_others()
        if self.revision is not None and (type(self.revision) is not str or not self.revision):
            raise ConfigError(
                f"--revision: must be a branch, a tag or a commit, not {self.revision!r}"
            )
        if self.seed is not None and type(self.seed) is not int:
            raise ConfigError(f"--seed: must be a whole number, not {self.seed!r}")

    def _check_others(self) -> None:
        """What Python's callers get wrong: the command line reads these as what they are to be."""
        for name in ("enable_prefix_caching", "enable_chunked_prefill"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: must be True or False, not {value!r:.80}")
        skip = self.quantization_skip  # of a text each letter would be a pattern
        if not isinstance(skip, list | tuple) or not all(isinstance(each, str) for each in skip):
            raise ConfigError(f"--quantization-skip: must be a list of patterns, not {skip!r:.80}")
        if not isinstance(self.packed_cache, str | Path):
            raise ConfigError(
                f"--packed-cache: must be a directory, auto or off, not {self.packed_cache!r:.80}"
            )

    @property
    def asked_len(self) -> int | None:
        """max_model_len where it is a number; None: what fits."""
        return self.max_model_len if isinstance(self.max_model_len, int) else None


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that can run, and what a door needs beside it."""

    engine: Engine
    codec: Tokenizer
    scheduler_config: SchedulerConfig
    default_sampling: dict[str, Any]  # the checkpoint's recommendations, as SamplingParams fields
    model: LoadedModel
    name: str
    root: Path
    notes: tuple[str, ...]
    prices: HostPrices  # of its steps on this machine


def build(
    model: str | Path, args: EngineArgs, on_status: Callable[[str], None] | None = None
) -> Built:
    """Load `model` (a directory, or org/name on the Hugging Face hub) as `args` say.

    `on_status` is told, in a line, of work that will take a while.
    Raises ConfigError or CheckpointError, with one line that names the flag or the file.
    """
    root = find_checkpoint(model, args.revision)
    # Weights come last: whatever can be refused without them is.
    generation = read_generation_config(root)
    model_config = read_config(root)
    ends = {*model_config.eos_token_ids, *generation.eos_token_ids}
    strange = sorted(i for i in ends if not 0 <= i < model_config.vocab_size)
    rows = model_config.vocab_size
    codec = load_tokenizer(root, eos_token_ids=ends.difference(strange), vocab_size=rows)
    notes = [f"end of sequence {i} is outside the vocabulary, and ignored" for i in strange]
    notes += _told(codec.tokens_without_row)
    notes += [codec.chat_note] if codec.chat_note else []
    loaded = _load(root, args, on_status)
    config = scheduler_config(loaded, args)
    prices = host_prices(loaded.program, _precision(loaded))
    recommended = asdict(generation)
    del recommended["eos_token_ids"]
    return Built(
        engine=make_engine(
            loaded,
            config,
            prices.step_time,
            decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
        ),
        codec=codec,
        scheduler_config=config,
        default_sampling={k: v for k, v in recommended.items() if v is not None},
        model=loaded,
        name=root.resolve().name if Path(model).exists() else str(model),
        root=root,
        notes=(*loaded.notes, *notes, *prices.notes),
        prices=prices,
    )


def _told(tokens_without_row: Mapping[int, str]) -> list[str]:
    if not tokens_without_row:
        return []
    shown = ", ".join(f"{token!r} ({i})" for i, token in sorted(tokens_without_row.items())[:4])
    more = len(tokens_without_row) - 4
    shown += f" and {more} more" if more > 0 else ""
    return [f"the model has no row for {shown}: a text that spells one is refused"]


def make_engine(
    loaded: LoadedModel,
    config: SchedulerConfig,
    step_time: StepTime | None = None,
    decode: Callable[[Sequence[int], bool], str] | None = None,
) -> Engine:
    """An engine with an empty cache, which learns from its own steps what a step takes; it begins
    with `step_time`. That decides when the tokens of prompts are computed, never an answer."""
    times = LearnedStepTime(step_time)
    return Engine(
        Scheduler(config, times.late_time), loaded.runner, decode=decode, step_times=times
    )


def _precision(loaded: LoadedModel) -> Precision:
    """Bytes per number as they are held; activations are fp32 on every backend of this host."""
    head_dim = loaded.program.kv[0].head_dim
    return Precision(
        weight_bytes=loaded.weight_bytes / loaded.program.num_parameters,
        activation_bytes=4.0,
        kv_bytes=kv_head_bytes(loaded.kv_dtype, head_dim) / head_dim,
    )


def scheduler_config(loaded: LoadedModel, args: EngineArgs) -> SchedulerConfig:
    """The scheduler's part of `args`, with nothing left to choose."""
    budget = batched_tokens(
        args.max_num_batched_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        max_model_len=loaded.max_model_len,
    )
    target = itl_target(args.target_itl, enable_chunked_prefill=args.enable_chunked_prefill)
    return SchedulerConfig(
        num_blocks=loaded.num_blocks,
        max_model_len=loaded.max_model_len,
        block_size=loaded.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=budget,
        target_itl_s=target.seconds,
        target_itl_steps=target.steps,
        enable_chunked_prefill=args.enable_chunked_prefill,
        enable_prefix_caching=args.enable_prefix_caching,
        scheduling_policy=args.scheduling_policy,
        cache_namespace=loaded.numerics.encode(),
    )


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


def plan_options(args: EngineArgs) -> LoadOptions:
    """The part of `args` that decides how a model is held in memory."""
    return LoadOptions(
        dtype=args.dtype,
        quantization=args.quantization,
        quantization_skip=args.quantization_skip,
        kv_cache_dtype=args.kv_cache_dtype,
        backend=args.backend,
        threads=args.threads,
        packed_cache=args.packed_cache,
        max_num_seqs=args.max_num_seqs,
        block_size=args.block_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    )


def _load(root: Path, args: EngineArgs, on_status: Callable[[str], None] | None) -> LoadedModel:
    options = plan_options(args)
    options["on_status"] = on_status
    with show_progress(f"loading {root.name}") as bar:
        return load_model(root, max_model_len=args.asked_len, on_progress=bar.reach, **options)
