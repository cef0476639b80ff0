"""Time that passes only when it is spent. Knows nobody who spends it."""


class VirtualClock:
    """Seconds since the start of a simulation; called, it is an Engine's clock."""

    __slots__ = ("now",)

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass. Raises ValueError for a time that is negative or no number."""
        if not seconds >= 0:
            raise ValueError(f"a step of {seconds} s: time does not go backwards")
        self.now += seconds

    def reach(self, time: float) -> None:
        """Wait until `time`; nothing happens if it has passed."""
        self.now = max(self.now, time)
