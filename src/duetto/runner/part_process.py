"""The process of one part of a model: loads what is its own of a checkpoint, then serves.

Started by runner/parts_loader.py. Knows no requests, and of the other parts only how it is joined
to them.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from duetto.backends.cpu.native import native
from duetto.backends.parts.messages import (
    OrderFailed,
    PartChannel,
    PartLoading,
    PartReady,
    StartPart,
    ToPart,
)
from duetto.backends.parts.part import ModelPart, PartPlace
from duetto.backends.parts.serve import PartServer, end_with, failure_of
from duetto.backends.parts.wiring import Wiring
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.engine_args import QuantizationName
from duetto.core.files import Progress
from duetto.models.programs import load_program
from duetto.program.dtype import Dtype
from duetto.program.program import Program
from duetto.program.rewrites.headless import headless
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages
from duetto.runner.loaders import CpuLoader, ReferenceLoader

if TYPE_CHECKING:  # the module may not have been built
    from duetto._native import Member


class PartLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a part is to load, and how."""

    wiring: Wiring
    model_dir: str
    asked_len: int | None
    is_headless: bool
    backend: str  # cpu or reference
    dtype: Dtype
    quantization: QuantizationName
    quantization_skip: tuple[str, ...]
    threads: int
    cores: tuple[int, ...]  # on which it computes; none: on any
    cache_dir: str | None


def part_program(whole: Program, place: PartPlace) -> Program:
    """What one part computes of a program."""
    return stages(shard(whole, place.num_ranks, place.rank), place.num_stages)[place.stage]


def main(descriptor: int) -> None:
    """Serve the engine's process, at the other end of this socket, until it ends."""
    channel: PartChannel[ToPart] = PartChannel(socket.socket(fileno=descriptor), ToPart)
    end_with(channel.socket)
    try:
        start = channel.receive()
        assert isinstance(start, StartPart)
        server, ready = _load(msgspec.msgpack.decode(start.spec, type=PartLoad), channel)
    except Exception as error:
        channel.send(OrderFailed(0, failure_of(error), str(error)))
        return
    channel.send(ready)
    server.serve(channel)


def _load(load: PartLoad, channel: "PartChannel[ToPart]") -> tuple[PartServer, PartReady]:
    if load.cores:
        os.sched_setaffinity(0, load.cores)  # before a thread is started
    _, whole = load_program(Path(load.model_dir), load.asked_len)
    if load.is_headless:
        whole = headless(whole)
    program = part_program(whole, load.wiring.place)
    last = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or done - last > total / 50:
            last = done
            channel.send(PartLoading(done, total))

    member, end_group = _join(load.wiring)
    part, ready = _loaded(load, program, whole, member, on_progress)
    return PartServer(load.wiring, program, part, end_group), ready


def _join(wiring: Wiring) -> "tuple[Member | None, Callable[[], None] | None]":
    """Where this rank meets the others of its stage, and what ends that for all."""
    if wiring.group is None:
        return None, None
    group = native.Group.open(wiring.group)
    return native.Member(group, wiring.place.rank), group.end


def _loaded(
    load: PartLoad,
    program: Program,
    whole: Program,
    member: "Member | None",
    on_progress: Progress,
) -> tuple[ModelPart, PartReady]:
    model_dir = Path(load.model_dir)
    if load.backend == "reference":
        weights = load_weights(model_dir, program, load.dtype, on_progress, whole)
        num_bytes = ReferenceLoader(program, load.dtype).weight_bytes
        part = ReferenceBackend(program, weights, is_stage=True, member=member)
        return part, PartReady(num_bytes, [])
    quantization = load.quantization
    assert quantization != "fp8"
    loader = CpuLoader(
        program,
        load.dtype,
        None if quantization == "none" else quantization,
        load.quantization_skip,
        threads=load.threads,
        cache_dir=None if load.cache_dir is None else Path(load.cache_dir),
        whole=whole,
        member=member,
    )
    backend = loader.load(program, model_dir, on_progress)
    return backend, PartReady(loader.weight_bytes, loader.notes)
