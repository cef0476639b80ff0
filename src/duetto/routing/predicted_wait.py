"""How long the tokens of prompts take on a worker, by the price of its steps. Knows no clocks."""

from duetto.core.config import SchedulerConfig
from duetto.core.shape import BatchShape, RequestShape, StepTime

_MAX_PRICES = 8192  # that are remembered; then all are forgotten
_EXACT_BITS = 6  # of the sizes that are priced: they are at most 3 % too small


class WaitPrices:
    """Seconds that the chunks of prompts take beside answers.

    A router asks for two of them per worker and request, so prices are remembered, of sizes that
    are rounded: that is nothing beside what else is not known of a wait.
    """

    def __init__(self, step_time: StepTime, config: SchedulerConfig) -> None:
        self._step_time = step_time
        self._chunk = config.max_num_batched_tokens
        self.max_num_seqs = config.max_num_seqs
        self._known: dict[tuple[int, int, int, int], float] = {}

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._known)

    def forget(self) -> None:
        """The price of steps has changed."""
        self._known.clear()

    def seconds(self, num_tokens: int, num_past: int, num_answers: int, context: int) -> float:
        """What so many tokens of prompts take, behind `num_past` others on average, in steps that
        also compute the next tokens of answers with `context` tokens in all."""
        if num_tokens <= 0:
            return 0.0
        num_steps = -(-num_tokens // max(1, self._chunk - num_answers))
        mean = context // num_answers if num_answers else 0
        chunk = -(-num_tokens // num_steps)
        key = (_rounded(chunk), _rounded(num_past), _rounded(num_answers), _rounded(mean))
        price = self._known.get(key)
        if price is None:
            if len(self._known) >= _MAX_PRICES:
                self._known.clear()
            price = self._known[key] = self._price(*key)
        return num_steps * price

    def _price(self, chunk: int, past: int, num_answers: int, context: int) -> float:
        answers = (RequestShape(1, context),) * num_answers
        return self._step_time(BatchShape((RequestShape(chunk, past), *answers)))


def _rounded(size: int) -> int:
    bits = size.bit_length() - _EXACT_BITS
    return size if bits <= 0 else size >> bits << bits
