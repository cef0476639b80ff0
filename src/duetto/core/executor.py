"""The one seam between deciding and computing: a model on a device, or a model of a model."""

from typing import NamedTuple, Protocol

from duetto.core.batch import ScheduledBatch, StepOutput


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> StepOutput:
        """Wait for it. Asked once. Raises what the step raised."""
        ...


class Executor(Protocol):
    def submit(self, batch: ScheduledBatch) -> Pending:
        """Compute a step, now or later: steps run in the order of their submission. May raise what
        the step raises. Keeps nothing about a request but the KV in its blocks, and what the last
        few steps sampled (for placeholders)."""
        ...


class Done(NamedTuple):
    """A step that was computed when it was submitted."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output
