"""What crosses between deciding and computing in one step, and what a step changes for callers.

Frozen and plain: ints, strings, bytes and tuples of them; no text, no arrays, no Request. A batch
and an output encode with msgspec and cross to another process as they are. What every step makes
anew for each request is a named tuple, which takes a third of the time of a frozen dataclass.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from duetto.core.cache_control import CacheCounts
from duetto.core.draft_counts import StepDrafts
from duetto.core.embeddings import PoolingParams
from duetto.core.kv_transfers import KVTransfers
from duetto.core.request import FinishReason
from duetto.core.reuse import LookMethod, TokenRange
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import EMPTY, BatchShape, RequestShape, shape_at
from duetto.core.structured import Grammar
from duetto.core.timings import RequestTimings

ATTENTION_UNIT = 2.0**-20
PLACEHOLDER = -1  # a token that this request samples in a step in flight: the executor knows it


class SamplingInput(NamedTuple):
    """All that the sampler needs beside the logits; whole, so that the executor stays stateless."""

    params: SamplingParams
    seed: int
    num_output_tokens: int  # the place in the request's random stream
    forbidden_token_ids: tuple[int, ...] = ()  # ends before min_tokens, ends of bad words
    prompt_token_ids: tuple[int, ...] = ()  # filled only if params.needs_history
    output_token_ids: tuple[int, ...] = ()  # and these also if there is a grammar
    grammar: Grammar | None = None  # what the answer must be
    # Of forbidden_token_ids: ends before min_tokens, where the grammar lets something else follow.
    held_back_token_ids: tuple[int, ...] = ()
    num_left: int = 0  # tokens that the answer may still have, this one among them


class Drafting(NamedTuple):
    """Whom to ask for drafts after the step, and the tokens that the proposer has not been sent."""

    method: str
    num_wanted: int  # drafts, at most; 0: the proposer only keeps up with the tokens
    tenant: bytes  # and its cache_salt: nothing that proposers learn crosses from one to another
    start: int  # position of the first of token_ids; 0: the proposer begins anew
    # Known tokens, up to the step's last or fewer. A placeholder of the step, and what the step
    # samples, follow them; they are sent again with the next ones, as known tokens.
    token_ids: tuple[int, ...]
    num_prompt_tokens: int = 0  # positions from here on are the answer's


class KVMove(NamedTuple):
    """KV of a text that lies alone in some blocks, brought to a request's own slots before it
    computes: values as they are, keys turned from the text's positions to the request's."""

    blocks: tuple[int, ...]  # the text's, from its first token on
    start: int  # tokens [start, end) of the text
    end: int
    position: int  # of token `start` in the request


Tier = Literal["arena", "ram", "disk"]  # where a block of KV can lie; kernels read the arena
MoveTarget = Literal[
    "arena", "ram", "disk", "nowhere"
]  # to nowhere: it is removed from where it lies


class BlockMove(NamedTuple):
    """KV of some blocks, copied from one tier to another before the step computes. To the disk and
    from it, it is under way until it is reported. From the disk to nowhere: what was dropped; it
    wins over all that was to be written before it."""

    move_id: int  # ascending; it is done once, however often its step is submitted
    source: Tier
    target: MoveTarget
    keys: tuple[bytes, ...]  # hashes of the blocks: what they are called on the disk
    source_blocks: tuple[int, ...]  # of the arena, or of RAM; () on the disk
    target_blocks: tuple[int, ...]
    tenant: bytes = b""  # whose it is: where room is short, who has the most loses some
    # Of each block, if one is not full: what lies behind them is somebody else's, and stays there.
    num_tokens: tuple[int, ...] = ()


class MoveResult(NamedTuple):
    """What came of a BlockMove: told by the step that did it or a later one, and by all after it,
    until a batch says that it has been taken."""

    move_id: int
    num_done: int  # of its blocks, from the first on
    seconds: float = 0.0
    error: str | None = None  # why not all
    dropped: tuple[bytes, ...] = ()  # keys that are no longer on the disk
    was_submitted: bool = True  # False: its step never came, so nobody tried


class Look(NamedTuple):
    """What a step is to tell of tokens, so that it can be chosen which ones are computed anew.

    `attention`: the tokens are computed as ever, and for each position in `ranges` it is told how
    much attention they gave to it: the sum over the later half of the layers, heads and tokens, in
    whole units of ATTENTION_UNIT, so that chunks of any size add up to the same. `deviation`: the
    tokens go through the first two layers only, and for each of them it is told how far its key and
    value there are from what lay in their place (squared differences in fp32, of all heads)."""

    method: LookMethod
    # Ascending, within the request's blocks: all chunks may ask for the same ones, as what lies
    # behind a token gets nothing from it.
    ranges: tuple[TokenRange, ...] = ()


class ScheduledRequest(NamedTuple):
    """What one request computes in one step."""

    request_id: str
    token_ids: tuple[int, ...]  # the tokens to compute, at least one; the last num_drafts: drafts
    num_computed_tokens: int  # position of the first of them
    block_table: tuple[int, ...]  # covers all positions up to the last of them
    # For each of the last len(rows) tokens: how to sample the next. None, or 1 + num_drafts.
    rows: tuple[SamplingInput, ...] = ()
    # For each of token_ids that has a next token in the prompt: that token, to be scored.
    prompt_logprob_targets: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0  # how many of the likeliest to report beside the target
    num_drafts: int = 0  # proposals that this step verifies
    positions: tuple[int, ...] | None = None  # of token_ids, where they are not contiguous
    epoch: int = 0  # how often the request had been preempted when this was planned
    drafting: Drafting | None = None
    moves: tuple[KVMove, ...] = ()  # done first
    # Not tokens of its own, but those of its `source`th text alone, into that one's blocks.
    source: int | None = None
    look: Look | None = None  # what else it is to tell
    # The last of token_ids is to be pooled, in place of rows: its hidden state is the result.
    pooling: PoolingParams | None = None
    has_grammar_drafts: bool = False  # its drafts come of its grammar, and not of a proposer

    @property
    def end(self) -> int:
        """The position after the last of its tokens."""
        if self.positions is not None:
            return self.positions[-1] + 1
        return self.num_computed_tokens + len(self.token_ids)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The positions as intervals [start, end) without gaps."""
        if self.positions is None:
            return [(self.num_computed_tokens, self.end)]
        runs: list[tuple[int, int]] = []
        start = last = self.positions[0]
        for position in self.positions[1:]:
            if position != last + 1:
                runs.append((start, last + 1))
                start = position
            last = position
        return [*runs, (start, last + 1)]

    @property
    def num_wanted_rows(self) -> int:
        """Of its last tokens, those that something is wanted of: logits to sample from, or the
        hidden state."""
        return len(self.rows) if self.pooling is None else 1

    @property
    def is_next_token(self) -> bool:
        """Whether this is more of an answer, token by token: a shape for reports, never for
        decisions."""
        rows = self.rows
        if not rows or len(self.token_ids) > len(rows):
            return False
        return rows[0].num_output_tokens > 0

    @property
    def shape(self) -> RequestShape:
        num_rows = len(self.prompt_logprob_targets) + self.num_wanted_rows
        if self.positions is not None:
            return shape_at(self.positions, num_rows)
        is_short = self.look is not None and self.look.method == "deviation"
        return RequestShape(len(self.token_ids), self.num_computed_tokens, num_rows, is_short)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    requests: tuple[ScheduledRequest, ...]
    block_moves: tuple[BlockMove, ...] = ()  # done first, in this order
    awaits: tuple[int, ...] = ()  # moves for whose results all that could be computed waits
    num_results_taken: int = 0  # of moves, since the start: told no more
    shape: BatchShape = field(init=False, repr=False, compare=False)  # all that its price needs

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", BatchShape(tuple([r.shape for r in self.requests])))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.requests or self.block_moves or self.awaits)

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


class RequestResult(NamedTuple):
    """What a step gave one request."""

    # The accepted drafts, and the token after them; without the latter if that row alone failed:
    # the request then computes its last token again, and fails there as it would have without
    # drafts.
    tokens: tuple[SampledToken, ...] = ()
    drafts: tuple[int, ...] = ()  # proposed for the next step
    scores: tuple[TokenLogprob, ...] = ()  # of prompt tokens
    error: str | None = None  # what may be shown; the others are empty then
    looked: tuple[float, ...] = ()  # what a Look asked for, in the order of the positions
    embedding: bytes = b""  # numbers of 4 bytes: fp32, little-endian
    grammar_drafts: tuple[int, ...] = ()  # for the next step: what the grammar makes follow


class StepOutput(NamedTuple):
    """What a step computed: one result for each request, in the batch's order."""

    results: tuple[RequestResult, ...]
    drafting_s: float = 0.0  # what proposing drafts took
    moving_s: float = 0.0  # what moving blocks took
    moved: tuple[MoveResult, ...] = ()
    mask_s: float = 0.0  # what a row's mask took, of rows that have one


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
    embedding: bytes = b""  # of a request that asks for one, with the final update


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
    drafts: StepDrafts | None = None  # None: it verified none, and proposed none
    cache: CacheCounts = CacheCounts()  # when its record was made
    engine: int = 0  # which of several engines ran it; what is free or waits is then of all
    transfers: KVTransfers | None = None  # to and from other engines; None: nothing new
