"""What crosses between deciding and computing in one step, and what a step changes for callers.

Frozen and made of ints: no text, no arrays, no Request. An executor gets a ScheduledBatch and
returns a StepOutput; it keeps no state per request besides the KV in the blocks. What every step
makes anew for each request is a named tuple, which takes a third of the time of a frozen dataclass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from duetto.core.request import FinishReason
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import EMPTY, BatchShape, RequestShape
from duetto.core.timings import RequestTimings


class SamplingInput(NamedTuple):
    """All that the sampler needs beside the logits; whole, so that the executor stays stateless."""

    params: SamplingParams
    seed: int
    num_output_tokens: int  # the place in the request's random stream
    forbidden_token_ids: tuple[int, ...] = ()  # ends before min_tokens, ends of bad words
    prompt_token_ids: tuple[int, ...] = ()  # both filled only if params.needs_history
    output_token_ids: tuple[int, ...] = ()


class ScheduledRequest(NamedTuple):
    """What one request computes in one step."""

    request_id: str
    token_ids: tuple[int, ...]  # the tokens to compute, at least one
    num_computed_tokens: int  # position of the first of them
    block_table: tuple[int, ...]  # covers num_computed_tokens + len(token_ids)
    sampling: SamplingInput | None  # None: the last token is not among them, so nothing is sampled
    # For each of token_ids that has a next token in the prompt: that token, to be scored.
    prompt_logprob_targets: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0  # how many of the likeliest to report beside the target

    @property
    def is_next_token(self) -> bool:
        """Whether this is one more token of an answer: a shape for reports, never for decisions."""
        if self.sampling is None or len(self.token_ids) > 1:
            return False
        return self.sampling.num_output_tokens > 0

    @property
    def shape(self) -> RequestShape:
        num_rows = len(self.prompt_logprob_targets) + (0 if self.sampling is None else 1)
        return RequestShape(len(self.token_ids), self.num_computed_tokens, num_rows)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    requests: tuple[ScheduledRequest, ...]
    shape: BatchShape = field(init=False, repr=False, compare=False)  # all that its price needs

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", BatchShape(tuple([r.shape for r in self.requests])))

    @property
    def num_tokens(self) -> int:
        return sum([len(r.token_ids) for r in self.requests])


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, before temperature, penalties and masks."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), likeliest first


class SampledToken(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None = None  # only if asked for


class StepOutput(NamedTuple):
    """What a step computed. Every request that was to be sampled is in `sampled` or in `failed`."""

    sampled: Mapping[str, tuple[SampledToken, ...]]  # one token each; more under speculation
    prompt_logprobs: Mapping[str, tuple[TokenLogprob, ...]] = MappingProxyType({})
    failed: Mapping[str, str] = MappingProxyType({})  # request id -> what may be shown


class RequestUpdate(NamedTuple):
    """What one step changed for one caller. Exactly one update per request is final."""

    request_id: str
    tokens: tuple[SampledToken, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt tokens that this step scored
    text: str = ""  # the text that became certain; filled by the engine
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None
    timings: RequestTimings | None = None  # with the final update


class StepRecord(NamedTuple):
    """One step as numbers: for metrics, traces and benchmarks."""

    start_time: float
    end_time: float
    num_tokens: int  # tokens computed
    num_prompt_tokens: int  # of those, tokens of prompts (or recomputed)
    num_scheduled: int  # requests in the batch
    num_running: int  # after the step
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int  # in this step
    num_queried_tokens: int  # prompt tokens of requests admitted in this step ...
    num_hit_tokens: int  # ... and how many of them the prefix cache held
    shape: BatchShape = EMPTY  # what was computed ...
    request_ids: tuple[str, ...] = ()  # ... and for whom, in the same order
    predicted_s: float | None = None  # by the price of the shape, before the step ran
