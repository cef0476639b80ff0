"""Attention with other numbers of warps and stages: the second half of the part `tuning`."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from time import monotonic
from typing import Any

import torch

from duetto.backends.cuda.kernels import attention
from duetto.backends.cuda.kernels.attention_launch import AttentionLaunch
from duetto.backends.cuda.launch_times import LaunchTimes
from duetto.core.shape import BatchShape
from duetto.measure.gpu import step_of
from gpu.bench import Bench
from gpu.device_model import DeviceModel, decoding, prompt

Best = dict[str, Any]


def sweep_attention(bench: Bench, until: float) -> tuple[int, list[Best], list[str]]:
    """How many were tried, the best of each shape, and those with other bits."""
    shapes = _shapes(bench)
    model = DeviceModel.open(bench, "llama-3-8b", list(shapes.values()), num_layers=2)
    times = LaunchTimes(
        model.program, model.backend, model.kv, bench.watch, 1 if bench.rehearse else 5
    )
    tried, best, odd = 0, [], []
    for name, shape in shapes.items():
        now_s, bits = _seconds(times, shape), _bits(model, times, shape)
        one: Best = {"kernel": "attention", "shape": name, "rows": shape.num_tokens, "now_s": now_s}
        one |= {"best_s": now_s, "best": "as now"}
        for warps, stages in ((2, 1),) if bench.rehearse else product((4, 8, 2), (2, 3, 1)):
            if monotonic() > until:
                break
            tried += 1
            with _launched_by(warps, stages):
                try:
                    seconds = _seconds(times, shape)
                    is_same = torch.equal(_bits(model, times, shape), bits)
                except Exception as error:  # too much shared memory, too many registers
                    print(f"{name}, {warps} warps, {stages} stages: {error}")
                    continue
            if not is_same:
                odd.append(f"attention {name}: {warps} warps, {stages} stages")
            elif seconds < 0.99 * one["best_s"]:
                one |= {"best_s": seconds, "best": f"{warps} warps, {stages} stages"}
        best.append(one)
    return tried, best, odd


def _shapes(bench: Bench) -> dict[str, BatchShape]:
    if bench.rehearse:
        return {"B = 1 at 20": decoding(1, 20)}
    decodes = {f"B = {b} at {c:,}": decoding(b, c) for b, c in ((1, 1024), (32, 1024), (1, 8192))}
    return decodes | {f"a prompt of {n:,}": prompt(n) for n in (2048, 8192)}


@contextmanager
def _launched_by(warps: int, stages: int) -> Iterator[None]:
    before = attention.launch_of
    attention.launch_of = lambda *_: AttentionLaunch(warps, stages)
    try:
        yield
    finally:
        attention.launch_of = before


def _seconds(times: LaunchTimes, shape: BatchShape) -> float:
    return times.of(step_of(shape), kinds=("attention",))[0][1]


def _bits(model: DeviceModel, times: LaunchTimes, shape: BatchShape) -> torch.Tensor:
    """What the first layer's attention gives for the same queries each time."""
    buffers = model.backend._held.buffers
    torch.manual_seed(7)
    for numbers in buffers.values():
        numbers.normal_()
    op = times.launch_first(step_of(shape), "attention")
    return buffers[op.writes[0].buffer][: shape.num_tokens].clone()
