"""What heartbeats tell: how long a frame travels there and back, and what the other clock says."""

from duetto.cluster.frames import Heartbeat

_NEW_SHARE = 0.1  # of a new measurement in the mean


class RoundTrip:
    """Of one connection. Written on its wire's thread; any thread may read."""

    def __init__(self) -> None:
        self.num_measured = 0
        self.least_s = float("inf")
        self.mean_s = 0.0  # of the last ones, mostly
        self.clock_offset_s = 0.0  # their clock minus ours, where the trip was shortest
        self._theirs: float | None = None  # the time that they sent last ...
        self._heard_at = 0.0  # ... and when

    def beat(self, now: float) -> Heartbeat:
        """The heartbeat to send."""
        theirs, self._theirs = self._theirs, None  # one echo for each
        return Heartbeat(now, theirs, 0.0 if theirs is None else now - self._heard_at)

    def heard(self, theirs: float, echo: float | None, held_s: float, now: float) -> None:
        self._theirs, self._heard_at = theirs, now
        if echo is None:
            return
        trip_s = now - echo - held_s
        if not 0 <= trip_s < 3600:  # an echo of nothing that was sent
            return
        self.mean_s += (trip_s - self.mean_s) * (_NEW_SHARE if self.num_measured else 1.0)
        self.num_measured += 1
        if trip_s <= self.least_s:
            self.least_s = trip_s
            self.clock_offset_s = theirs - (now - trip_s / 2)
