"""Stages of a pipeline in virtual time: when a batch that enters leaves again.

Batches go through all stages in the order in which they entered, and several may be under way.
Knows no prices, no requests and no scheduler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from duetto.core.batch import ScheduledBatch
from duetto.core.executor import Done
from duetto.core.shape import BatchShape
from duetto.simulation.executor import NextPrices, answers
from duetto.simulation.virtual_clock import VirtualClock


class Passage(NamedTuple):
    """What a batch takes of a pipeline: seconds in each stage, and between two of them."""

    stages_s: tuple[float, ...]
    send_s: float = 0.0  # a stage that sends computes on meanwhile

    @property
    def alone_s(self) -> float:
        """Through an empty pipeline."""
        return sum(self.stages_s) + (len(self.stages_s) - 1) * self.send_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """The stages of one replica, and how many batches may be in them at one time."""

    num_stages: int
    num_batches: int
    passage: Callable[[BatchShape], Passage]
    # For requests with so many tokens before their next one: the passages of steps that compute
    # one token of each, step after step without end. Exactly what `passage` says of their shapes.
    next_passages: NextPrices[Passage]


class Pipeline:
    """Which stage is free when."""

    def __init__(self, num_stages: int) -> None:
        self._free_at = [0.0] * num_stages
        self.computed_s = 0.0  # of all stages together
        self.entered = 0.0  # when the last batch came into the first stage

    def enter(self, start: float, passage: Passage) -> float:
        """Let a batch that is ready at `start` go through; returns when it leaves the last stage.

        Batches must enter in the order of their starts: none overtakes another.
        """
        free_at = self._free_at
        self.entered = now = max(start, free_at[0])
        for index, seconds in enumerate(passage.stages_s):
            now = max(now, free_at[index]) + seconds
            free_at[index] = now
            now += passage.send_s
        self.computed_s += sum(passage.stages_s)
        return free_at[-1]


class PipelineExecutor:
    """An Executor whose batches share a pipeline with those of others."""

    def __init__(
        self, passage: Callable[[BatchShape], Passage], pipeline: Pipeline, clock: VirtualClock
    ) -> None:
        self._passage = passage
        self._pipeline = pipeline
        self._clock = clock

    def submit(self, batch: ScheduledBatch) -> Done:
        passage = self._passage(batch.shape)
        self._clock.reach(self._pipeline.enter(self._clock.now, passage))
        return Done(answers(batch))
