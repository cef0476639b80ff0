"""Configuration that is finished: no "auto" is left, and it never changes."""

import math
from dataclasses import dataclass

from duetto.core.errors import ConfigError, InvalidRequest, RequestTooLong
from duetto.core.options import (
    BATCHED_TOKENS,
    BLOCK_SIZE,
    LEAST_ITL_STEPS,
    MAX_NUM_SEQS,
    SchedulerOptions,
    SchedulingPolicy,
    batched_tokens,
    check_options,
    itl_target,
)
from duetto.core.request import Request
from duetto.core.reuse import Reuse
from duetto.core.sampling_params import MAX_LOGPROBS

ONLY_EMBEDS = (
    "this model is served for embeddings, at /v1/embeddings, and generates nothing; "
    "--runner generate serves it to generate"
)
ONLY_GENERATES = (
    "this model is served to generate: no modules.json says that it is made for embeddings, or "
    "--runner generate was asked for; --runner pooling makes embeddings of any decoder"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Raises ConfigError, naming the flag or pair of flags, if the parts do not fit together."""

    num_blocks: int
    max_model_len: int
    block_size: int = BLOCK_SIZE
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = BATCHED_TOKENS
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    max_preemptions: int = 4  # after which a request is admitted with all the room it can need
    target_itl_s: float | None = None  # a step beside streams is to take no longer than this ...
    target_itl_steps: float = LEAST_ITL_STEPS  # ... or than so many steps of the streams alone
    ageing_s: float = 30.0  # waiting this long is worth one level of priority
    cache_namespace: bytes = b""  # whatever makes KV incomparable: model, KV dtype
    max_logprobs: int = MAX_LOGPROBS  # beside each token; -1: as many as there are
    is_pooling: bool = False  # the model gives embeddings, and nothing to sample from

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_preemptions < 0 or not self.ageing_s > 0:
            raise ConfigError("max_preemptions must be 0 or more, and ageing_s above 0")
        self._check_target()
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"--no-enable-chunked-prefill with --max-num-batched-tokens "
                f"{self.max_num_batched_tokens}: a prompt of --max-model-len {self.max_model_len} "
                f"tokens must fit into one step; raise the one or lower the other"
            )

    def _check_target(self) -> None:
        if self.target_itl_s is None:
            return
        if not 0 < self.target_itl_s < math.inf:
            raise ConfigError("--target-itl: must be a number of milliseconds above 0")
        if not LEAST_ITL_STEPS <= self.target_itl_steps < math.inf:
            raise ConfigError(f"target_itl_steps must be {LEAST_ITL_STEPS} or more")
        if not self.enable_chunked_prefill:
            raise ConfigError(
                "--target-itl with --no-enable-chunked-prefill: a whole prompt takes as long as it "
                "takes; leave one of the two out"
            )

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def context_length(self) -> int:
        """The longest that prompt and answer together can become, in tokens.

        One more than the blocks hold: the last token is never computed, so it needs no KV.
        """
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def too_long(
        self, num_prompt: int, num_output: int, *, is_lower_bound: bool = False
    ) -> RequestTooLong:
        """The error for what exceeds `context_length`, with the numbers; in one place for all."""
        cause = ""
        if self.context_length < self.max_model_len:
            cause = f"The KV cache holds {self.num_blocks} blocks of {self.block_size} tokens."
        return RequestTooLong(
            "prompt" if num_prompt >= self.context_length else "max_tokens",
            limit=self.context_length,
            num_prompt=num_prompt,
            num_output=num_output,
            is_lower_bound=is_lower_bound,
            cause=cause,
        )

    @property
    def longest_embedded(self) -> int:
        """The longest text that can be embedded, in tokens: nothing follows it, and all of it is
        computed."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def too_long_to_embed(self, num_tokens: int, *, is_lower_bound: bool = False) -> RequestTooLong:
        """The error for what exceeds `longest_embedded`, with the numbers."""
        cause = ""
        if self.longest_embedded < self.max_model_len:
            cause = f"The KV cache holds {self.num_blocks} blocks of {self.block_size} tokens."
        return RequestTooLong(
            "prompt",
            limit=self.longest_embedded,
            num_prompt=num_tokens,
            num_output=0,
            is_lower_bound=is_lower_bound,
            cause=cause,
        )

    def check_priority(self, priority: object) -> None:
        """Refuse a priority that is no number, or that this policy would ignore."""
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 2**31:
            raise InvalidRequest("priority", f"must be from -2**31 to 2**31, not {priority!r:.80}")
        if priority and self.scheduling_policy != "priority":
            raise InvalidRequest("priority", "needs --scheduling-policy priority")

    def check_fits(self, request: Request) -> None:
        """Refuse, with the numbers, a request that could never run. Any thread may ask."""
        if not request.prompt_token_ids:
            raise InvalidRequest("prompt", "must hold at least one token")
        if self.is_pooling != (request.pooling is not None):
            raise InvalidRequest("model", ONLY_EMBEDS if self.is_pooling else ONLY_GENERATES)
        if request.pooling is not None:
            if request.num_prompt_tokens > self.longest_embedded:
                raise self.too_long_to_embed(request.num_prompt_tokens)
        elif request.most_tokens > self.context_length:
            raise self.too_long(request.num_prompt_tokens, request.max_tokens)
        if request.reuse is not None:
            self._check_reuse(request, request.reuse)

    def _check_reuse(self, request: Request, reuse: Reuse) -> None:
        reuse.check(request.num_prompt_tokens)
        if not request.reused:
            return
        if not self.enable_prefix_caching:
            raise InvalidRequest("reuse", "needs the prefix cache: --enable-prefix-caching")
        if request.sampling.prompt_logprobs is not None:
            raise InvalidRequest("reuse", "with prompt_logprobs: they need a full prefill")
        texts = {request.prompt_token_ids[start:end] for start, end in reuse.segments}
        own = self.num_blocks_for(request.most_tokens - 1)
        apart = sum([self.num_blocks_for(len(text)) for text in texts])
        if own + apart > self.num_blocks:
            raise InvalidRequest(
                "reuse",
                f"the request needs {own} blocks of KV and its segments {apart} beside it; there "
                f"are {self.num_blocks}. Mark fewer segments, or raise --kv-cache-memory-bytes",
            )


def scheduler_config(
    options: SchedulerOptions,
    *,
    num_blocks: int,
    max_model_len: int,
    cache_namespace: bytes = b"",
    is_pooling: bool = False,
) -> SchedulerConfig:
    """What `options` mean for a model whose KV has `num_blocks` blocks, with nothing left to
    choose: the one way from flags to a scheduler, simulated or not. Raises ConfigError."""
    target = itl_target(options)
    return SchedulerConfig(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=batched_tokens(options, max_model_len),
        enable_chunked_prefill=options.enable_chunked_prefill,
        enable_prefix_caching=options.enable_prefix_caching,
        scheduling_policy=options.scheduling_policy,
        target_itl_s=target.seconds,
        target_itl_steps=target.steps,
        cache_namespace=cache_namespace,
        is_pooling=is_pooling,
    )
