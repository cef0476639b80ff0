"""A CUDA graph on a CPU: launches are recorded, and done again with the very same arguments.

A launch has its grid, its numbers and its tensors for good, as in a graph. What a graph could not
record is an error: a computation of torch, or memory that is allocated while recording.
"""

from collections.abc import Callable
from typing import Any

import triton.runtime.interpreter as interpreter
from torch.utils._python_dispatch import TorchDispatchMode

Launch = Callable[[], None]

_VIEWS = ("slice", "view", "select", "as_strided", "alias", "detach", "t", "transpose", "unsqueeze")


class _OnlyViews(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removeprefix("_")
        assert name in _VIEWS, f"recorded {func}: a graph would compute it, this recorder cannot"
        return func(*args, **(kwargs or {}))


class LaunchRecorder:
    """A Recorder (backends/cuda/graphs.py) for Triton's interpreter."""

    def __init__(self) -> None:
        self.num_replays = 0
        self.num_launches: list[int] = []  # of each graph

    def record(self, launch: Launch) -> Launch:
        launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        call = interpreter.GridExecutor.__call__

        def recording(executor: Any, *args: Any, **kwargs: Any) -> None:
            launches.append((executor, args, kwargs))

        interpreter.GridExecutor.__call__ = recording
        try:
            with _OnlyViews():
                launch()
        finally:
            interpreter.GridExecutor.__call__ = call
        assert launches, "nothing was launched"
        self.num_launches.append(len(launches))

        def replay() -> None:
            self.num_replays += 1
            for executor, args, kwargs in launches:
                call(executor, *args, **kwargs)

        return replay
