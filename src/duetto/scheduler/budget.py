"""How much one step may compute: a number of tokens and, with a target ITL, a time.

The price of a step is a function that is handed in; nothing is known here of models, hardware or
measurements. Without a target this is the token budget of Sarathi-Serve (Agrawal et al., OSDI
2024), which fixes the number that keeps a step short; with one, the number follows from the price.
"""

from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.core.shape import BatchShape, StepTime
from duetto.scheduler.plan import shape_of
from duetto.scheduler.reuse import num_wanted

_Spent = tuple[Request, int, int, Sequence[Source]]  # what it computes, and of what


class StepBudget:
    """The budget of one step. Next tokens come first, then chunks; the first chunk cut short is
    the last one, so no more than one running request is ever in the middle of its prompt."""

    def __init__(self, config: SchedulerConfig, step_time: StepTime | None) -> None:
        self._config = config
        self._step_time = None if config.target_itl_s is None else step_time
        self._num_tokens = config.max_num_batched_tokens  # that are left
        self._spent: list[_Spent] = []  # priced once a chunk is asked for
        self._has_streams = False  # someone waits for a next token of an answer
        self._has_chunk = False
        self._limit_s: float | None = None  # for the whole step
        self._is_closed = False

    @property
    def is_spent(self) -> bool:
        return self._is_closed or not self._num_tokens

    @property
    def num_left(self) -> int:
        """Tokens that nobody needs: for drafts."""
        return 0 if self._is_closed else self._num_tokens

    def limit_s(self, shape: BatchShape) -> float | None:
        """Seconds that the step may take, which would have this shape; None: any."""
        if self._step_time is None or self._limit_s is not None:
            return self._limit_s
        return self._limit(self._step_time(shape))

    def most(self, request: Request, num_past: int, sources: Sequence[Source] = ()) -> int:
        """How many tokens after its first `num_past` a request may compute, which will have
        `sources` if it is admitted. Changes nothing."""
        wanted = num_wanted(request, num_past, sources)
        if self._is_closed or not self._num_tokens or not wanted:
            return 0
        if wanted > self._num_tokens and not self._config.enable_chunked_prefill:
            return 0
        count = wanted if wanted < self._num_tokens else self._num_tokens
        # Where no stream waits for its next token, nobody's ITL is at stake.
        if self._step_time is None or not self._has_streams:
            return count
        if wanted == 1 and not self._has_chunk:  # a next token always goes
            return count
        return self._most_in_time((request, num_past, count, sources), self._step_time)

    def spend(
        self, request: Request, num_past: int, count: int, sources: Sequence[Source] = ()
    ) -> None:
        """Take what `most` has granted."""
        self._num_tokens -= count
        wanted = num_wanted(request, num_past, sources)
        self._is_closed = count < wanted
        if self._step_time is None:
            return
        self._has_chunk = self._has_chunk or wanted > 1
        if request.num_output_tokens + request.num_pending_tokens > 0 and not self._has_chunk:
            self._has_streams = True
        self._spent.append((request, num_past, count, sources))

    def _most_in_time(self, wanted: _Spent, step_time: StepTime) -> int:
        """The largest chunk with which the step ends in time, by bisection; at most `count`.

        At least one token if it is the step's first chunk: a prompt that has begun goes on.
        """
        request, num_past, count, sources = wanted
        spent = [shape_of(*each) for each in self._spent]
        if self._limit_s is None:
            self._limit_s = self._limit(step_time(BatchShape(tuple(spent))))
        limit_s = self._limit_s

        def fits(size: int) -> bool:
            shape = BatchShape((*spent, shape_of(request, num_past, size, sources)))
            return step_time(shape) <= limit_s

        if fits(count):
            return count
        fitting, too_many = 0 if self._has_chunk else 1, count
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if fits(middle):
                fitting = middle
            else:
                too_many = middle
        return fitting

    def _limit(self, streams_s: float) -> float:
        """Seconds that this step may take, of which its streams alone take `streams_s`."""
        return max(self._config.target_itl_s or 0.0, self._config.target_itl_steps * streams_s)
