"""What carries out a planner's decisions: something that has workers and can start and stop them.

Implementations are in `cluster/`: processes of this machine, and actors of Ray.
"""

from typing import Protocol


class Actuator(Protocol):
    """Workers of one cluster. Its methods block, and raise DuettoError for what cannot be done."""

    def scale(self, replicas: int, prefill: int) -> None:
        """Start what is missing, and drain and stop what is too much: workers that are stopped take
        no more requests, and end those they have."""
        ...

    def live(self) -> tuple[int, int]:
        """How many of both kinds run."""
        ...

    def stop(self) -> None:
        """Drain and stop all."""
        ...
