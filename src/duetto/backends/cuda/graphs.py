"""Steps of next tokens as recorded launches: one replay in place of hundreds of launches.

A graph is recorded for a few numbers of requests; a step is padded to the next of them. A recorded
launch has its sizes, its numbers and its addresses for good. Knows no operations and no kernels.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

Recorded = Callable[[], None]


class Recorder(Protocol):
    def record(self, launch: Recorded) -> Recorded:
        """What does again what `launch` did, with the same tensors at the same places."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, launch: Recorded) -> Recorded:
        """`launch` must have run before: what it compiles or allocates once cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Not by torch.cuda.graph, which empties caches and collects garbage for every graph.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            launch()
            graph.capture_end()
        replay: Recorded = graph.replay
        return replay


class StepGraphs:
    def __init__(
        self, recorder: Recorder, sizes: Sequence[int], launch: Callable[[int], None]
    ) -> None:
        """launch(n) computes a step of n requests, all of whose inputs lie where they always do.
        The largest is recorded first, so that the others find all memory there."""
        self._graphs: Mapping[int, Recorded] = {
            size: recorder.record(lambda size=size: launch(size))  # type: ignore[misc]
            for size in sorted(sizes, reverse=True)
        }
        self._sizes = sorted(sizes)

    def size_for(self, num_requests: int) -> int | None:
        """The number of requests that a step of these is padded to; None: there are too many."""
        place = bisect_left(self._sizes, num_requests)
        return self._sizes[place] if place < len(self._sizes) else None

    def replay(self, size: int) -> None:
        self._graphs[size]()
