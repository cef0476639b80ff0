"""What a caller may ask of sampling. Knows nothing of logits, vocabularies or text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.structured import StructuredOutputsParams

MAX_N = 128
MAX_LOGPROBS = 20  # that a server gives without being told to give more
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
SEED_RANGE = (-(2**63), 2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens, and when to end. Field names and defaults are vLLM's.

    Raises InvalidRequest, naming the field, for a value of the wrong type or out of range.
    """

    n: int = 1  # answers per prompt
    max_tokens: int | None = 16  # None: as many as the context allows
    min_tokens: int = 0  # no end of sequence, no stop token before this many
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the likeliest token
    repetition_penalty: float = 1.0  # multiplicative, over prompt and output
    presence_penalty: float = 0.0  # additive, over output
    frequency_penalty: float = 0.0  # additive per occurrence, over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None  # None: drawn when the request is made
    # None: none; 0: the sampled token's only; k: and the k likeliest; -1: and all
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None  # what the answer must look like
    thinking_budget: int | None = None  # tokens of a chat's reasoning, which is then closed

    def __post_init__(self) -> None:
        self._freeze_collections()
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31)
        _check_int("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                "min_tokens", f"{self.min_tokens} is more than max_tokens, {self.max_tokens}"
            )
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, -1, 2**31)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            is_int = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_int or not 0 <= token_id < 2**31:
                cause = f"the key {token_id!r:.80} is wrong: keys are token ids, from 0"
                raise InvalidRequest("logit_bias", cause)
            _check_float("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids", "must name at least one token or be left out")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_int(name, token_id, 0, 2**31)
        _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        _check_strings("bad_words", self.bad_words, 1024)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(name, f"must be true or false, not {getattr(self, name)!r}")
        if self.seed is not None:
            _check_int("seed", self.seed, *SEED_RANGE)
        _check_structured(self.structured_outputs, ignore_eos=self.ignore_eos)
        if self.thinking_budget is not None:
            _check_int("thinking_budget", self.thinking_budget, 0, 2**31)
            if self.ignore_eos:
                raise InvalidRequest("thinking_budget", "cannot stand beside ignore_eos")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1, 2**31)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether sampling looks at the tokens before, beyond the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def with_logprobs(self, vocab_size: int, most: int) -> "SamplingParams":
        """The same with -1 log-probabilities as the number that it means for a vocabulary. Raises
        InvalidRequest for more than `most`, which is -1 for no limit."""
        meant: dict[str, Any] = {}
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is None:
                continue
            number = vocab_size if asked == -1 else asked
            if most != -1 and number > most:
                what = f"-1 is all {number} of the vocabulary" if asked == -1 else str(number)
                words = f"{what}; at most {most} are accepted here (--max-logprobs)"
                raise InvalidRequest(name, words)
            if (number := min(number, vocab_size)) != asked:
                meant[name] = number
        return replace(self, **meant) if meant else self

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest if a token id named here is outside the vocabulary."""
        named = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if token_id >= vocab_size:
                    what = "the key" if name == "logit_bias" else "token id"
                    raise InvalidRequest(
                        name, f"{what} {token_id} is outside the vocabulary of {vocab_size}"
                    )

    def _freeze_collections(self) -> None:
        """Accept the lists and single strings that callers write; keep tuples."""
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, ())
            elif isinstance(value, str):
                object.__setattr__(self, name, (value,))
        for name in ("stop", "bad_words", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif value is None and name == "stop_token_ids":
                object.__setattr__(self, name, ())
            elif value is not None and not isinstance(value, tuple):
                raise InvalidRequest(name, f"must be a list, not {type(value).__name__}")
        bias = self.logit_bias
        if bias is not None and not isinstance(bias, Mapping):
            raise InvalidRequest("logit_bias", f"must map token ids to numbers, not {bias!r}")
        object.__setattr__(self, "logit_bias", dict(bias or {}))


def _check_structured(asked: object, *, ignore_eos: bool) -> None:
    if asked is None:
        return
    if not isinstance(asked, StructuredOutputsParams):
        raise InvalidRequest(
            "structured_outputs", f"must be StructuredOutputsParams, not {asked!r:.80}"
        )
    if ignore_eos:
        raise InvalidRequest(
            "ignore_eos", "with structured outputs: such an answer ends where it is complete"
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"must be from {low} to {high}, not {value}")


def _check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, f"must be a number, not {value!r}")
    # NaN fails every comparison, so it has to be asked for by name.
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bound = f"above {low:g}" if open_low else f"from {low:g}"
        raise InvalidRequest(name, f"must be {bound} to {high:g}, not {value}")


def _check_strings(name: str, values: tuple[object, ...], most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(name, f"at most {most} strings are accepted, not {len(values)}")
    for value in values:
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                name,
                f"must be strings of 1 to {MAX_STOP_LENGTH} characters, not {value!r:.80}",
            )
