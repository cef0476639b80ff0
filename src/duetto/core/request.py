"""One generation: what was asked, and how far it has come. Knows no text and no arrays."""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from duetto.core.embeddings import PoolingParams
from duetto.core.reuse import Choosing, Reuse, Source, Text, TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar
from duetto.core.timings import RequestTimings


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One generation. Only the Scheduler writes the fields below the line.

    known tokens   0 ............................... num_tokens | placeholders (num_pending_tokens)
    computed       0 ...... num_written ...... num_computed

    Computed: by steps in flight too, their drafts included. Written: by steps whose results are in.
    Between two steps of which none is in flight, the two are one number.
    """

    request_id: str  # made by us and unique; a caller's own id is a label kept elsewhere
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int  # resolved: never None
    seed: int  # resolved: the request's own random stream
    stop_token_ids: frozenset[int] = frozenset()  # the caller's, and end of sequence unless ignored
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    arrival_time: float = 0.0
    priority: int = 0  # lower first
    tenant: bytes = b""  # whose it is: where several wait, they take turns
    cache_salt: bytes = b""  # requests with different salts never share a block
    reuse: Reuse | None = None  # parts of the prompt whose KV may come from elsewhere
    why_not_reused: str | None = None  # nothing of it, though it was asked for: `reuse` is empty
    grammar: Grammar | None = None  # of the answer
    # It wants an embedding instead of an answer; max_tokens is then 1, and nothing is sampled.
    pooling: PoolingParams | None = None
    num_imported_tokens: int = 0  # whose KV comes with the request; 0 again once that is lost
    prefill_at: tuple[str, ...] = ()  # links of engines that may compute its prompt, best first

    # --- written by the Scheduler only -----------------------------------------------------
    token_ids: list[int] = field(init=False)  # prompt, then output; append-only
    num_computed_tokens: int = field(init=False, default=0)  # with KV once all steps have run
    num_written_tokens: int = field(init=False, default=0)  # of those: the results are in
    num_loaded_tokens: int = field(init=False, default=0)  # with KV once its first step has run
    num_pending_tokens: int = field(init=False, default=0)  # sampled in steps in flight
    num_in_flight: int = field(init=False, default=0)  # steps in flight that compute some of it
    # The next plan depends on a step in flight: on how many drafts are right, or on new ones.
    has_drafts_in_flight: bool = field(init=False, default=False)
    drafts: tuple[int, ...] = field(init=False, default=())  # proposed to follow the last token
    grammar_drafts: tuple[int, ...] = field(init=False, default=())  # that its grammar makes follow
    num_sent_tokens: int = field(init=False, default=0)  # to a proposer, since it was admitted ...
    sent_to: str | None = field(init=False, default=None)  # ... the one that was asked last
    num_scored_tokens: int = field(init=False, default=0)  # whose scores have been told
    num_cached_tokens: int = field(init=False, default=0)  # of those, found at first admission
    num_missing_tokens: int = field(init=False, default=0)  # of texts to reuse, not found then
    num_lost_tokens: int = field(init=False, default=0)  # computed once, before a preemption
    block_table: list[int] = field(init=False, default_factory=list)
    block_hashes: list[bytes] = field(init=False, default_factory=list)  # of the full blocks
    candidates: tuple[TokenRange, ...] = field(init=False, default=())  # positions of reused texts
    reused: tuple[TokenRange, ...] = field(init=False, default=())  # those of them not computed
    choosing: Choosing | None = field(init=False, default=None)  # some of them must be chosen yet
    texts: tuple[Text, ...] | None = field(init=False, default=None)  # None: not asked for so far
    num_passed_over: int = field(init=False, default=0)  # steps: others computed its prefix or text
    sources: list[Source] = field(init=False, default_factory=list)  # of them; [] once moved
    has_moved: bool = field(init=False, default=False)  # what is reused is in its place
    num_published_blocks: int = field(init=False, default=0)  # of block_table, that others may find
    arrival_index: int = field(init=False, default=0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    timings: RequestTimings = field(init=False)
    _bad_words_after: dict[int | None, list[tuple[int, ...]]] | None = field(
        init=False, default=None
    )

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        if self.reuse is not None:
            self.candidates = self.reused = self.reuse.reused(len(self.prompt_token_ids))
        self.timings = RequestTimings(self.arrival_time)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Progress is this one number: prompt chunk, next token and recompute look alike."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_exact_tokens(self) -> int:
        """Tokens from the first on whose KV is what a full prefill gives."""
        return self.candidates[0].start if self.candidates else len(self.token_ids)

    @property
    def num_outputs_left(self) -> int:
        """Tokens that may be sampled still, beside those that steps in flight sample."""
        return self.most_tokens - len(self.token_ids) - self.num_pending_tokens

    def bad_words_after(self, token_id: int | None) -> Sequence[tuple[int, ...]]:
        """Bad words whose last token but one this is; None: those of one token. Indexed when first
        asked for, as there may be thousands, and each step of each answer asks."""
        if self._bad_words_after is None:
            self._bad_words_after = {}
            for word in self.bad_word_ids:
                before = word[-2] if len(word) > 1 else None
                self._bad_words_after.setdefault(before, []).append(word)
        return self._bad_words_after.get(token_id, ())

    @property
    def most_tokens(self) -> int:
        """The longest this request can become."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]


def fan_out(request: Request) -> list[Request]:
    """The `sampling.n` requests that answer one prompt; the prefix cache computes the prompt once.

    The first keeps the seed, so `n` answers begin with the answer of n=1; every other one's seed
    follows from it and its index alone. The first also is the only one that scores the prompt.
    """
    if request.sampling.n == 1:
        return [request]
    unscored = request.sampling
    if unscored.prompt_logprobs is not None:
        unscored = replace(unscored, prompt_logprobs=None)
    first = replace(request, request_id=f"{request.request_id}-0")
    others = [
        replace(
            request,
            request_id=f"{request.request_id}-{index}",
            seed=_derive_seed(request.seed, index),
            sampling=unscored,
        )
        for index in range(1, request.sampling.n)
    ]
    return [first, *others]


def _derive_seed(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"duetto/seed/{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
