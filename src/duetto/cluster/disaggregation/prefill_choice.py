"""Whether a prompt is to be computed on another engine, by price, and how long that should take.
Knows no link and no queue of another engine."""

from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape, StepTime

FIRST_BYTES_PER_S = 1e9  # of a link, until it has been measured
ROUND_TRIP_S = 0.002  # an ask and its answers, beside what is computed
TIMES_PREDICTED = 4.0  # that a transfer may take ...
LEAST_TIMEOUT_S, MOST_TIMEOUT_S = 0.5, 60.0  # ... but no less, and no more
WEIGHT = 0.2  # of the newest transfer in a link's measured speed


@dataclass(frozen=True, slots=True)
class HereNow:
    """What an engine has to do already."""

    num_running: int
    num_waiting_tokens: int  # of prompts that are not computed yet


class PrefillChoice:
    """Conditional disaggregation (as in NVIDIA Dynamo): short and cached prompts stay at home."""

    def __init__(
        self,
        block_bytes: int,
        block_size: int,
        max_batched_tokens: int,
        step_time: StepTime | None = None,
        max_local_prefill: int | None = None,
        least_timeout_s: float = LEAST_TIMEOUT_S,
    ) -> None:
        """`max_local_prefill` uncached tokens, and no price, decide where it is given."""
        if max_local_prefill is not None and max_local_prefill < 0:
            raise ConfigError(f"--max-local-prefill {max_local_prefill}: must be 0 or more")
        self._bytes_per_token = block_bytes / block_size
        self._most = max_batched_tokens
        self._step_time = step_time
        self._max_local = max_local_prefill
        self._least_timeout_s = least_timeout_s
        self._bytes_per_s = FIRST_BYTES_PER_S

    def is_remote(self, num_new: int, num_past: int, here: HereNow) -> bool:
        """`num_new` tokens of a prompt are not cached here, and come after `num_past` that are.

        At home a prompt waits for those before it, and whoever is answered meanwhile waits for it:
        its own time then counts twice.
        """
        if self._max_local is not None:
            return num_new > self._max_local
        if self._step_time is None:
            return True
        own_s = self.compute_s(num_new, num_past)
        here_s = self.compute_s(here.num_waiting_tokens, 0) + own_s
        if here.num_running:
            here_s += own_s
        return self.elsewhere_s(num_new, num_past) < here_s

    def elsewhere_s(self, num_new: int, num_past: int) -> float:
        """Until all is here, if nothing waits there: the last layer comes after all is computed,
        or the link is what takes longer."""
        travel_s = num_new * self._bytes_per_token / self._bytes_per_s
        return ROUND_TRIP_S + max(self.compute_s(num_new, num_past) * 1.05, travel_s)

    def timeout_s(self, num_new: int, num_past: int) -> float:
        predicted_s = TIMES_PREDICTED * self.elsewhere_s(num_new, num_past)
        return min(max(self._least_timeout_s, predicted_s), MOST_TIMEOUT_S)

    def compute_s(self, num_new: int, num_past: int) -> float:
        """0 where there are no prices."""
        if self._step_time is None:
            return 0.0
        seconds, end = 0.0, num_past + num_new
        for start in range(num_past, end, self._most):
            shape = RequestShape(min(self._most, end - start), start)
            seconds += self._step_time(BatchShape((shape,)))
        return seconds

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A transfer's rows came within this time: of a link that waits for layers, too little."""
        if seconds > 0:
            self._bytes_per_s += WEIGHT * (num_bytes / seconds - self._bytes_per_s)
