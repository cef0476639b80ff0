"""What the scheduler has counted since the start."""

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerCounts:
    """Written by `Room` (preemptions) and `Admission` (the others) only."""

    num_preemptions: int = 0
    num_queried_tokens: int = 0  # tokens of requests at their first admission ...
    num_hit_tokens: int = 0  # ... and those of them that the prefix cache held

    def copy(self) -> "SchedulerCounts":
        return SchedulerCounts(self.num_preemptions, self.num_queried_tokens, self.num_hit_tokens)

    def since(self, before: "SchedulerCounts") -> "SchedulerCounts":
        """What was counted after an earlier copy of these."""
        return SchedulerCounts(
            self.num_preemptions - before.num_preemptions,
            self.num_queried_tokens - before.num_queried_tokens,
            self.num_hit_tokens - before.num_hit_tokens,
        )
