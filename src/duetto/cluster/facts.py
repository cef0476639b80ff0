"""What a worker is, as it says when it joins, and whether two workers can serve together."""

from typing import Literal, get_args

import msgspec

from duetto.core.config import SchedulerConfig

PROTOCOL = 1  # of the frames between a door and a worker, and between two workers
WorkerRole = Literal["both", "prefill", "decode"]
ROLES: tuple[WorkerRole, ...] = get_args(WorkerRole)


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """All that others must know of a worker before they send it something."""

    protocol: int = PROTOCOL
    version: str  # of Duetto
    worker_id: str  # of this start of the worker: one that was restarted has another
    role: WorkerRole = "both"
    name: str  # of the model, for people
    model: str  # fingerprint of the checkpoint
    numerics: str  # all that decides KV, bit for bit, beside the model and the tokens
    kv_layout: str  # what the bytes of a block mean: equal layouts may exchange them
    block_bytes: int
    scheduler: SchedulerConfig
    hardware: bytes = b""  # a HardwareSpec as JSON, for prices; b"": unknown
    weight_bytes: float = 2.0  # per number, as they are held
    kv_bytes: float = 2.0
    process: int = 0  # its number on its machine, for people
    link: str = ""  # where its KV link listens; "": nowhere
    events: str = ""  # where it publishes KV events
    replay: str = ""  # where they are asked for again


def why_not_together(ours: WorkerFacts, theirs: WorkerFacts) -> str | None:
    """Why a worker cannot serve beside another one, with both values; None if it can."""
    for field, told in _MUST_AGREE.items():
        own, other = getattr(ours, field), getattr(theirs, field)
        if own != other:
            return f"another {told}: {other!r:.120}, and here it is {own!r:.120}"
    own_size, other_size = ours.scheduler.block_size, theirs.scheduler.block_size
    if own_size != other_size:
        return f"another --block-size: {other_size}, and here it is {own_size}"
    return None


_MUST_AGREE = {
    "protocol": "protocol",
    "version": "version of Duetto",
    "model": "model",
    "numerics": "numerics (backend, dtypes)",
}
