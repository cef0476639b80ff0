"""How long work takes on the device. On a CPU, in Triton's interpreter, by the host's clock.

Knows no kernel: what is timed is a function that launches.
"""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch

Launch = Callable[[], object]

WARM_UPS = 3
# A graph's launches follow each other without the host; this many make its own start no matter.
LAUNCHES = 16


class Stopwatch:
    """Times launches on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"

    def times(self, launch: Launch, runs: int = 20) -> list[float]:
        """Seconds of each run, after some that do not count: there, kernels are compiled."""
        if not self.is_gpu:
            launch()
            return [_host_s(launch) for _ in range(runs)]
        for _ in range(WARM_UPS):
            launch()
        pairs = [(_event(), _event()) for _ in range(runs)]
        for start, end in pairs:
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def median(self, launch: Launch, runs: int = 20) -> float:
        return median(self.times(launch, runs))

    def paired(self, launches: Sequence[Launch], rounds: int = 5, runs: int = 4) -> list[float]:
        """The median of each, measured in turns: what changes meanwhile changes all."""
        found: list[list[float]] = [[] for _ in launches]
        for _ in range(rounds):
            for own, launch in zip(found, launches, strict=True):
                own += self.times(launch, runs)
        return [median(own) for own in found]

    def graphed(self, launch: Launch) -> Launch:
        """What launches the same work as one graph; the function itself where there is no GPU."""
        if not self.is_gpu:
            return launch
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay: Launch = graph.replay
        return replay

    def each(self, launches: Sequence[Launch], runs: int = 10, least: int = LAUNCHES) -> float:
        """Seconds of one of several launches alike, on other data each, in one graph together: what
        the host adds to a small kernel is not the kernel's."""
        repeats = max(1, -(-least // len(launches))) if self.is_gpu else 1

        def run() -> None:
            for _ in range(repeats):
                for launch in launches:
                    launch()

        return self.median(self.graphed(run), runs) / (repeats * len(launches))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _host_s(launch: Launch) -> float:
    start = perf_counter()
    launch()
    return perf_counter() - start


def watch_on(device: str) -> Stopwatch:
    return Stopwatch(torch.device(device))
