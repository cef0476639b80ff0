"""Configuration that is finished: no "auto" is left, and it never changes."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from duetto.core.errors import ConfigError, InvalidRequest, RequestTooLong
from duetto.core.request import Request

SchedulingPolicy = Literal["fcfs", "priority", "static"]

# What an engine takes where it is not told, simulated or not: every room reads these here.
BLOCK_SIZE = 32  # tokens
MAX_NUM_SEQS = 64  # requests that run at one time
BATCHED_TOKENS = 512  # of a step

# Chunks may always take a quarter of what the streams' own tokens take, so a target that is too low
# for the model slows streams by at most that (or by the price of one token, if that is more), and a
# prompt has at least a fifth of the engine: its TTFT is at most about five times as long as alone.
# A floor in tokens would bound neither, as their price differs a thousandfold between machines.
LEAST_ITL_STEPS = 1.25
DAY_MS = 86_400_000


class ItlTarget(NamedTuple):
    """How long a step beside streams may take: `seconds`, or as long as `steps` steps of the
    streams alone, whichever is more. Without `seconds` it may take any time."""

    seconds: float | None
    steps: float = LEAST_ITL_STEPS


NO_ITL_TARGET = ItlTarget(None)
# A quarter of a second is a pause that readers see and forgive. On a machine whose plain steps are
# themselves slow, four of them: a prompt then has three quarters of the engine.
DEFAULT_ITL_TARGET = ItlTarget(0.25, 4.0)


def itl_target(asked: float | str | None, *, enable_chunked_prefill: bool) -> ItlTarget:
    """What `--target-itl` means: milliseconds, "off", or "auto" (also None), the default.

    Whole prompts take as long as they take: "auto" leaves them alone. Raises ConfigError.
    """
    if asked is None or asked == "auto":
        return DEFAULT_ITL_TARGET if enable_chunked_prefill else NO_ITL_TARGET
    if asked == "off":
        return NO_ITL_TARGET
    if type(asked) not in (int, float) or not 0 < float(asked) <= DAY_MS:
        raise ConfigError(
            f"--target-itl: must be milliseconds above 0, auto or off, not {asked!r:.80}"
        )
    return ItlTarget(float(asked) / 1000)


def batched_tokens(asked: int | None, *, enable_chunked_prefill: bool, max_model_len: int) -> int:
    """What `--max-num-batched-tokens` means: without chunking, a step holds a whole context."""
    whole = 0 if enable_chunked_prefill else max_model_len
    return asked or max(BATCHED_TOKENS, whole)


def check_policy(name: str) -> None:
    """Raise ConfigError for a scheduling policy that there is not."""
    if name not in get_args(SchedulingPolicy):
        accepted = ", ".join(get_args(SchedulingPolicy))
        raise ConfigError(f"--scheduling-policy: {name!r} is not one of {accepted}")


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

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "block_size", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more")
        if self.max_num_batched_tokens < 1:
            raise ConfigError("--max-num-batched-tokens: must be 1 or more")
        if self.max_preemptions < 0 or not self.ageing_s > 0:
            raise ConfigError("max_preemptions must be 0 or more, and ageing_s above 0")
        check_policy(self.scheduling_policy)
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
        if request.most_tokens > self.context_length:
            raise self.too_long(request.num_prompt_tokens, request.max_tokens)
