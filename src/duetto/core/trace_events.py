"""Chrome's trace events, which Perfetto (ui.perfetto.dev) loads, for steps that ran or were
simulated. Knows no steps.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from collections.abc import Mapping
from typing import Any

Event = dict[str, Any]


def span(process: int, track: int, name: str, start: float, end: float, /, **args: Any) -> Event:
    """Something that took from `start` to `end`, in seconds; `args` are shown when it is chosen."""
    at = _us(start)
    times = {"ts": at, "dur": round(_us(end) - at, 3)}
    return {"name": name, "ph": "X", "pid": process, "tid": track, **times, "args": args}


def counter(process: int, name: str, time: float, values: Mapping[str, float]) -> Event:
    """Values that hold from `time` on, in seconds: a track of its own, for each name."""
    return {"name": name, "ph": "C", "pid": process, "tid": 0, "ts": _us(time), "args": values}


def process_name(process: int, name: str) -> Event:
    return _named("process_name", process, 0, name)


def track_name(process: int, track: int, name: str) -> Event:
    return _named("thread_name", process, track, name)


def _named(what: str, process: int, track: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
