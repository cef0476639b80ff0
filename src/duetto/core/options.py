"""The options of an engine that more than one door has: defaults, checks and what they mean.

`EngineArgs` (an engine that runs), `Layout` (one that is simulated) and `SchedulerConfig` (either,
when it is finished) read them here, so that a flag means the same to all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard, get_args

from duetto.core.errors import ConfigError

SchedulingPolicy = Literal["fcfs", "priority", "static"]

BLOCK_SIZE = 32  # tokens
MAX_NUM_SEQS = 64  # requests that run at one time
BATCHED_TOKENS = 512  # of a step
GPU_MEMORY_UTILIZATION = 0.9  # what of a device's memory may be used

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


class SchedulerOptions(Protocol):
    """What decides a scheduler's configuration, beside the model and its memory."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int | None: ...
    @property
    def target_itl(self) -> float | str | None: ...
    @property
    def block_size(self) -> int: ...
    @property
    def enable_prefix_caching(self) -> bool: ...
    @property
    def enable_chunked_prefill(self) -> bool: ...
    @property
    def scheduling_policy(self) -> SchedulingPolicy: ...


def itl_target(options: SchedulerOptions) -> ItlTarget:
    """What `--target-itl` means: milliseconds, "off", or "auto" (also None), the default.

    "auto" sets no limit where prompts are not cut into chunks.
    """
    asked = options.target_itl
    if asked is None or asked == "auto":
        return DEFAULT_ITL_TARGET if options.enable_chunked_prefill else NO_ITL_TARGET
    return NO_ITL_TARGET if asked == "off" else ItlTarget(float(asked) / 1000)


def batched_tokens(options: SchedulerOptions, max_model_len: int) -> int:
    """What `--max-num-batched-tokens` means: without chunking, a step holds a whole context."""
    context = 0 if options.enable_chunked_prefill else max_model_len
    return options.max_num_batched_tokens or max(BATCHED_TOKENS, context)


# --- checks --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Check:
    accepts: Callable[[Any], bool]
    words: str  # what is accepted


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_target(value: object) -> bool:
    if _is_number(value):
        return 0 < value <= DAY_MS
    return value in (None, "auto", "off")


_COUNT = _Check(_is_count, "1 or more (a whole number)")
_OPTIONAL_COUNT = _Check(lambda value: value is None or _is_count(value), _COUNT.words)
_SIZE = _Check(
    lambda value: value is None or (_is_number(value) and 0 < value <= 2**20),
    "GiB above 0, up to 1,048,576",
)
_PART = _Check(
    lambda value: value is None or (_is_number(value) and 0 < value <= 1), "above 0 and at most 1"
)
_SWITCH = _Check(lambda value: isinstance(value, bool), "True or False")
_CHECKS: Mapping[str, _Check] = {
    "max_model_len": _OPTIONAL_COUNT,
    "max_num_seqs": _COUNT,
    "max_num_batched_tokens": _OPTIONAL_COUNT,
    "block_size": _COUNT,
    "num_blocks": _COUNT,
    "kv_cache_memory_bytes": _OPTIONAL_COUNT,
    "gpu_memory_utilization": _PART,
    "kv_offloading_size": _SIZE,
    "kv_offloading_disk_size": _SIZE,
    "threads": _OPTIONAL_COUNT,
    "tensor_parallel_size": _COUNT,
    "pipeline_parallel_size": _COUNT,
    "max_logprobs": _Check(
        lambda value: value in (0, -1) or _is_count(value), "0 or more, or -1: no limit"
    ),
    "target_itl": _Check(_is_target, "milliseconds above 0, auto or off"),
    "enable_prefix_caching": _SWITCH,
    "enable_chunked_prefill": _SWITCH,
}


def check_options(options: object) -> None:
    """Raise ConfigError, naming the flag, for a value that no engine can have, whatever the model.

    Checks those of the shared options that `options` has.
    """
    for name, check in _CHECKS.items():
        value = getattr(options, name, None)
        if hasattr(options, name) and not check.accepts(value):
            raise ConfigError(f"{flag_of(name)}: must be {check.words}, not {value!r:.80}")
    if (policy := getattr(options, "scheduling_policy", None)) is not None:
        check_choice("scheduling_policy", policy, get_args(SchedulingPolicy))


def check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    """Raise ConfigError, naming the flag, for a value that is not one of `accepted`."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise ConfigError(f"{flag_of(name)}: {value!r:.80} is not one of {', '.join(accepted)}")


def flag_of(name: str) -> str:
    """The flag of an option's field."""
    return f"--{name.replace('_', '-')}"
