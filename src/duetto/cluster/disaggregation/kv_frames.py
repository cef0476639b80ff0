"""What two engines say to each other over a KV link, beside rows of blocks: typed frames of
msgpack, strictly parsed. The one that decodes speaks first (KVHello) and asks; the one that
prefills answers. Knows no link.
"""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from duetto.cluster.facts import PROTOCOL, WorkerFacts
from duetto.cluster.frames import FrameError
from duetto.cluster.links.link import MAX_FRAME_BYTES

MAX_BLOCKS = 2**20  # of a transfer
MAX_REASON = 400  # characters

_Count = Annotated[int, Meta(ge=0, lt=2**31)]
_Number = Annotated[int, Meta(ge=0, lt=2**62)]
_Name = Annotated[str, Meta(max_length=1024)]
_Reason = Annotated[str, Meta(max_length=MAX_REASON)]
_Salt = Annotated[bytes, Meta(max_length=1024)]


class _KVFrame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class KVHello(_KVFrame, frozen=True, tag="kv-hello"):
    """What the engine that decodes is. All of it must be equal on both sides."""

    protocol: int
    version: _Name
    model: _Name
    numerics: _Name
    kv_layout: _Name
    block_size: _Count
    block_bytes: _Number
    num_layers: _Count  # rows of a block

    @classmethod
    def of(cls, facts: WorkerFacts, num_layers: int) -> "KVHello":
        return cls(
            PROTOCOL,
            facts.version,
            facts.model,
            facts.numerics,
            facts.kv_layout,
            facts.scheduler.block_size,
            facts.block_bytes,
            num_layers,
        )


class KVWelcome(_KVFrame, frozen=True, tag="kv-welcome"):
    """Prompts may be sent."""


class KVUnfit(_KVFrame, frozen=True, tag="kv-unfit"):
    """These two cannot exchange blocks. Nothing follows."""

    reason: _Reason


class AskPrefill(_KVFrame, frozen=True, tag="ask"):
    """Compute full blocks, and send the KV of the last `num_blocks` of them."""

    transfer_id: _Number  # of this link: one that is larger than those before
    token_ids: Annotated[tuple[_Count, ...], Meta(min_length=1)]
    cache_salt: _Salt
    tenant: _Salt
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)]
    first_block: Annotated[int, Meta(ge=0, lt=MAX_BLOCKS)]
    num_blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    deadline_s: Annotated[float, Meta(gt=0, le=3600)]  # from now on, after which it is of no use


class PrefillAccepted(_KVFrame, frozen=True, tag="accepted"):
    transfer_id: _Number


class PrefillRefused(_KVFrame, frozen=True, tag="refused"):
    """No rows follow. Also when it was accepted, and failed."""

    transfer_id: _Number
    reason: _Reason


class PrefillDone(_KVFrame, frozen=True, tag="done"):
    """All has been sent."""

    transfer_id: _Number
    num_rows: _Number  # of one layer of one block each


class GotPrefill(_KVFrame, frozen=True, tag="got"):
    """All has arrived: its blocks need not be kept for this transfer."""

    transfer_id: _Number


class CancelPrefill(_KVFrame, frozen=True, tag="cancel"):
    """It is of no use any more; what comes of it is thrown away."""

    transfer_id: _Number


FromDecode = KVHello | AskPrefill | GotPrefill | CancelPrefill
FromPrefill = KVWelcome | KVUnfit | PrefillAccepted | PrefillRefused | PrefillDone
_T = TypeVar("_T")
_encode = msgspec.msgpack.Encoder().encode
_from_decode: "msgspec.msgpack.Decoder[FromDecode]" = msgspec.msgpack.Decoder(FromDecode)
_from_prefill: "msgspec.msgpack.Decoder[FromPrefill]" = msgspec.msgpack.Decoder(FromPrefill)


def encode_kv_frame(frame: FromDecode | FromPrefill) -> bytes:
    """Raises FrameError for one that is larger than the other side accepts."""
    data = _encode(frame)
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a prompt of {len(data)} bytes cannot be sent to another engine")
    return data


def read_from_decode(data: bytes) -> FromDecode:
    """Raises FrameError for what is no frame of an engine that asks."""
    return _decoded(data, _from_decode)


def read_from_prefill(data: bytes) -> FromPrefill:
    """Raises FrameError for what is no frame of an engine that answers."""
    return _decoded(data, _from_prefill)


def why_unfit(ours: KVHello, theirs: KVHello) -> str | None:
    """Why two engines cannot exchange blocks, with both values; None if they can."""
    for field in KVHello.__struct_fields__:
        own, other = getattr(ours, field), getattr(theirs, field)
        if own != other:
            name = field.replace("_", " ")
            return f"another {name}: {other!r:.120}, and here it is {own!r:.120}"
    return None


def _decoded(data: bytes, decoder: "msgspec.msgpack.Decoder[_T]") -> _T:
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes: at most {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"no frame of a KV link: {error}"[:MAX_REASON]) from None
