"""Where the parts are joined: a checkpoint and EngineArgs become an engine that can run.

The only reader of "auto" and None in EngineArgs. Whatever was chosen is in `Built.notes`.
"""

from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from duetto.core.config import SchedulerConfig, SchedulingPolicy, check_policy
from duetto.core.errors import CheckpointError, ConfigError
from duetto.engine.engine import Engine
from duetto.models.config import read_config, read_generation_config
from duetto.models.tokenizer import Tokenizer, load_tokenizer
from duetto.progress import show_progress
from duetto.runner.load import LoadedModel, load_model
from duetto.scheduler.scheduler import Scheduler

DEFAULT_BATCHED_TOKENS = 512
_POSITIVE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """How a model is run. Names and meanings are vLLM's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights are rounded to; auto is what the checkpoint says."""
    quantization: str | None = None
    """How weights are quantized; none is available in this version."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What keys and values are stored in; auto loses nothing."""
    max_model_len: int | None = None
    """Longest prompt and answer together; by default the model's own, or what fits."""
    max_num_seqs: int = 64
    """Most requests that run at one time."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step; 512 by default, or a whole context without chunking."""
    block_size: int = 32
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
    """What computes; reference is the only one in this version."""
    seed: int | None = None
    """Seeds requests that bring none; by default LLM takes 0, and serve draws each."""

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the flag, for what needs no model to be refused."""
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: must be a whole number above 0, not {value!r}")
        check_policy(self.scheduling_policy)
        if self.seed is not None and type(self.seed) is not int:
            raise ConfigError(f"--seed: must be a whole number, not {self.seed!r}")


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


def build(model: str | Path, args: EngineArgs) -> Built:
    """Load `model` (a directory, or org/name on the Hugging Face hub) as `args` say.

    Raises ConfigError or CheckpointError, with one line that names the flag or the file.
    """
    root = find_checkpoint(model)
    # Weights come last: whatever can be refused without them is.
    generation = read_generation_config(root)
    model_config = read_config(root)
    ends = {*model_config.eos_token_ids, *generation.eos_token_ids}
    strange = sorted(i for i in ends if not 0 <= i < model_config.vocab_size)
    codec = load_tokenizer(root, eos_token_ids=ends.difference(strange))
    codec.check_vocabulary(model_config.vocab_size)
    notes = [f"end of sequence {i} is outside the vocabulary, and ignored" for i in strange]
    loaded = _load(root, args)
    config = scheduler_config(loaded, args)
    recommended = asdict(generation)
    del recommended["eos_token_ids"]
    return Built(
        engine=Engine(
            Scheduler(config),
            loaded.runner,
            decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
        ),
        codec=codec,
        scheduler_config=config,
        default_sampling={k: v for k, v in recommended.items() if v is not None},
        model=loaded,
        name=root.resolve().name if Path(model).exists() else str(model),
        root=root,
        notes=(*loaded.notes, *notes),
    )


def scheduler_config(loaded: LoadedModel, args: EngineArgs) -> SchedulerConfig:
    """The scheduler's part of `args`, with nothing left to choose."""
    budget = args.max_num_batched_tokens
    if budget is None:
        whole = 0 if args.enable_chunked_prefill else loaded.max_model_len
        budget = max(DEFAULT_BATCHED_TOKENS, whole)
    return SchedulerConfig(
        num_blocks=loaded.num_blocks,
        max_model_len=loaded.max_model_len,
        block_size=loaded.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=args.enable_chunked_prefill,
        enable_prefix_caching=args.enable_prefix_caching,
        scheduling_policy=args.scheduling_policy,
        cache_namespace=f"{loaded.backend}/{loaded.dtype}/{loaded.kv_dtype}".encode(),
    )


def find_checkpoint(model: str | Path) -> Path:
    """A directory as it is; `org/name` from the hub's cache or the hub."""
    path = Path(model)
    if path.is_dir():
        return path
    is_name = isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/"))
    if path.exists() or not is_name:
        raise CheckpointError(path, "is not a directory with a checkpoint")
    # Loaded only here: the hub's client takes longer to import than all the rest of Duetto.
    found: Path = import_module("duetto.models.hub").download(str(model))
    return found


def _load(root: Path, args: EngineArgs) -> LoadedModel:
    with show_progress(f"loading {root.name}") as bar:
        return load_model(
            root,
            dtype=args.dtype,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            backend=args.backend,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            block_size=args.block_size,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            on_progress=bar.reach,
        )
