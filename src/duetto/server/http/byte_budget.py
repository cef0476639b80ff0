"""How many bytes may be held at a time for all who ask. Lives on the event loop."""

from duetto.server.http.errors import overloaded


class ByteBudget:
    """Those who hold little find room where others are refused: twice as much."""

    def __init__(self, limit: int, little: int, what: str) -> None:
        """`what` is held, as an error says it."""
        self._limit = limit
        self._little = little
        self._what = what
        self.num_bytes = 0

    def hold(self, num_bytes: int = 0) -> "Held":
        """Raises ApiError 503 if it would be too much."""
        held = Held(self)
        held.add(num_bytes)
        return held

    def check(self, num_held: int, num_more: int) -> None:
        is_little = num_held + num_more <= self._little
        if self.num_bytes + num_more > (2 * self._limit if is_little else self._limit):
            raise overloaded(f"{self.num_bytes} bytes of {self._what}; try again later")


class Held:
    """What one request holds, until it is released; that may be told more than once."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises ApiError 503, and changes nothing, if it would be too much."""
        self._budget.check(self.num_bytes, num_bytes)
        self.num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self) -> None:
        self._budget.num_bytes -= self.num_bytes
        self.num_bytes = 0
