"""How a model is run: the options of every door that has an engine. Standard library only.

What each option means is resolved where it is used: the scheduler's in core/config.py, memory and
number formats in runner/load.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from duetto.core.embeddings import Runner
from duetto.core.errors import ConfigError
from duetto.core.options import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    SchedulingPolicy,
    check_choice,
    check_options,
)
from duetto.core.sampling_params import MAX_LOGPROBS
from duetto.core.speculation import SpeculativeConfig

BackendName = Literal["auto", "cpu", "reference", "cuda"]
QuantizationName = Literal["int8", "int4", "fp8", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """How a model is run. Names and meanings are vLLM's."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What weights are rounded to; auto is what the checkpoint says."""
    quantization: QuantizationName = "none"
    """How weights are quantized, at load; this changes answers. fp8 is the cuda backend's only."""
    quantization_skip: tuple[str, ...] = ()
    """Patterns of tensors that stay whole, as 'model.layers.0.*'; may be repeated."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"] = "auto"
    """What keys and values are stored in; auto is what the weights are. fp8 is the cuda backend's
    only."""
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
    """Memory for KV; by default at most a quarter of what is available, and on a GPU what is left
    of --gpu-memory-utilization."""
    gpu_memory_utilization: float | None = None
    """Part of the GPU's memory that may be used; 0.9 by default."""
    kv_offloading_size: float | None = None
    """GiB of RAM for KV that leaves the cache; by default none, or a little beside a disk."""
    kv_offloading_disk: str | None = None
    """A folder for KV that others may reuse, also after a restart; private to its user."""
    kv_offloading_disk_size: float | None = None
    """GiB that its files may take; 10 by default."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    enable_chunked_prefill: bool = True
    """Compute long prompts in parts that share steps with other requests."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """fcfs, priority (lower first, ageing), or static (batch by batch, to compare)."""
    max_logprobs: int = MAX_LOGPROBS
    """Most log-probabilities beside each token that a request may ask for; -1 is no limit. A
    request gets all of the vocabulary with -1, if that is no more."""
    backend: BackendName = "auto"
    """What computes: cuda (an NVIDIA GPU), cpu (native), or reference (slow, and plain to read);
    auto is cuda where there is a GPU that can be used."""
    threads: int | None = None
    """Threads that compute; by default as many as this process may use."""
    tensor_parallel_size: int = 1
    """(--tp) Ranks that share each layer, each a process on cores of its own; another number rounds
    otherwise."""
    pipeline_parallel_size: int = 1
    """(--pp) Stages that share the layers, each a process on cores of its own; as many batches are
    under way. Never changes an answer."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; by default its main branch."""
    chat_template: str | None = None
    """A file with a Jinja template, instead of the checkpoint's own."""
    tool_call_parser: str | None = None
    """How this model writes calls of tools, as hermes or llama3_json; by default what its chat
    template shows."""
    reasoning_parser: str | None = None
    """How this model marks its reasoning, as think or openai_gptoss; by default what its chat
    template shows."""
    packed_cache: str = "auto"
    """Where quantized weights are kept for the next start; off for nowhere."""
    speculative_config: str | dict[str, Any] | list[Any] | None = None
    """What proposes drafts, as JSON: method ngram, suffix or draft_model, or a list; never changes
    an answer."""
    speculative_model: str | None = None
    """A smaller model with the same tokenizer, that proposes drafts."""
    runner: Runner = "auto"
    """What the model is run for: generate, or pooling for embeddings; auto is what its files say
    (modules.json of sentence-transformers)."""
    matryoshka: bool = False
    """Embeddings may be cut to fewer dimensions, though the model's config.json does not say so."""
    seed: int | None = None
    """Seeds requests that bring none; by default LLM takes 0, and serve draws each."""

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the flag, for what needs no model to be refused."""
        if self.max_model_len == "auto":
            object.__setattr__(self, "max_model_len", None)
        check_options(self)
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))
        skip = self.quantization_skip  # of a text each letter would be a pattern
        if not isinstance(skip, list | tuple) or not all(isinstance(each, str) for each in skip):
            raise ConfigError(f"--quantization-skip: must be a list of patterns, not {skip!r:.80}")
        if skip and self.quantization == "none":
            raise ConfigError(
                f"--quantization-skip {skip[0]}: there is no --quantization (int8, int4, fp8)"
            )
        if not isinstance(self.packed_cache, str | Path) or not str(self.packed_cache):
            raise ConfigError(
                f"--packed-cache: must be a directory, auto or off, not {self.packed_cache!r:.80}"
            )
        if self.revision is not None and (type(self.revision) is not str or not self.revision):
            raise ConfigError(
                f"--revision: must be a branch, a tag or a commit, not {self.revision!r}"
            )
        template = self.chat_template
        if template is not None and (not isinstance(template, str | Path) or not str(template)):
            raise ConfigError(f"--chat-template: must be a file, not {template!r:.80}")
        if self.seed is not None and type(self.seed) is not int:
            raise ConfigError(f"--seed: must be a whole number, not {self.seed!r}")
        self._check_parts(SpeculativeConfig.parse(self.speculative_config, self.speculative_model))
        self._check_offloading()
        if type(self.matryoshka) is not bool:
            raise ConfigError(f"--matryoshka: must be True or False, not {self.matryoshka!r:.80}")
        if self.matryoshka and self.runner == "generate":
            raise ConfigError("--matryoshka with --runner generate: it is of embeddings")

    def _check_parts(self, drafts: SpeculativeConfig | None) -> None:
        """Raise ConfigError, naming the pair, for what cannot run with ranks or stages."""
        tiers = self.kv_offloading_size is not None or self.kv_offloading_disk is not None
        why_not = []
        if self.pipeline_parallel_size > 1:
            why_not = [
                (
                    drafts is not None,
                    "--speculative-config",
                    "what proposes drafts is of one batch",
                ),
                (tiers, "--kv-offloading-size", "what leaves the cache is of one batch"),
            ]
        elif self.tensor_parallel_size > 1:
            has_model = drafts is not None and drafts.draft_model is not None
            why_not = [(has_model, "a draft model", "its threads would take the ranks' cores")]
        flag = "--pp" if self.pipeline_parallel_size > 1 else "--tp"
        for is_given, other, why in why_not:
            if is_given:
                raise ConfigError(f"{flag} and {other}: {why}; leave one of the two out")

    def _check_offloading(self) -> None:
        folder = self.kv_offloading_disk
        if folder is not None and (not isinstance(folder, str | Path) or not str(folder)):
            raise ConfigError(f"--kv-offloading-disk: must be a folder, not {folder!r:.80}")
        if self.kv_offloading_disk_size is not None and folder is None:
            raise ConfigError("--kv-offloading-disk-size: there is no --kv-offloading-disk")
        has_tiers = folder is not None or self.kv_offloading_size is not None
        if has_tiers and not self.enable_prefix_caching:
            raise ConfigError(
                "--kv-offloading-size and --kv-offloading-disk keep what --enable-prefix-caching "
                "finds: leave them out, or turn it on"
            )

    @property
    def num_parts(self) -> int:
        """Processes that compute, beside the engine's; 1: it computes itself."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def asked_len(self) -> int | None:
        """max_model_len where it is a number; None: what fits."""
        return self.max_model_len if isinstance(self.max_model_len, int) else None
