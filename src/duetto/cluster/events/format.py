"""KV events as bytes, as vLLM publishes them (vllm/distributed/kv_events.py), so that its readers
(llm-d, Dynamo) read ours and we read its.

A message has three parts: topic, sequence number (8 bytes, big endian), payload. The payload is
msgpack: [ts, [event, ...], data_parallel_rank]. An event is an array that begins with its name; of
late vLLM writes maps with a "type". Both are read, written is the array. Fields that are unknown
are passed over, and so are events that are.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from duetto.core.errors import DuettoError
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

MAX_PAYLOAD_BYTES = 16 << 20  # larger ones are refused
MAX_EVENT_BLOCKS, MAX_EVENT_TOKENS = 4096, 1 << 18  # of one event that we write
MAX_BATCH_TOKENS = 1 << 19  # of one message that we write; a hash counts as eight
MAX_HASH_BYTES = 64
MEDIUM = "GPU"  # where blocks are that a step reads: vLLM's word, on a CPU too
SEQ_BYTES = 8
# In vLLM the end of a replay. Asked for, nobody has a batch of that number: so vLLM's publisher
# answers with nothing, and ours with all that is published.
END = ALL = (1 << 64) - 1

WireHash = Annotated[bytes, Meta(max_length=MAX_HASH_BYTES)] | int
Hashes = Annotated[list[WireHash], Meta(max_length=1 << 16)]
Tokens = Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(max_length=1 << 22)]
ShortText = Annotated[str, Meta(max_length=4096)]
ExtraKeys = Annotated[list[Any], Meta(max_length=1 << 16)]


class EventBatch(NamedTuple):
    """One payload."""

    time: float  # of its writer's clock
    events: tuple[KVEvent, ...]
    rank: int | None


class MalformedEvents(DuettoError):
    """A payload that is none; the message says what is wrong with it."""


# --- reading -----------------------------------------------------------------------------------


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: Annotated[list[msgspec.Raw], Meta(max_length=1 << 16)]
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: Annotated[list[msgspec.Raw], Meta(max_length=1 << 16)]
    data_parallel_rank: int | None = None


class _Stored(msgspec.Struct, array_like=True, gc=False, tag="BlockStored"):
    block_hashes: Hashes
    parent_block_hash: WireHash | None
    token_ids: Tokens
    block_size: Annotated[int, Meta(ge=1, lt=1 << 20)]
    lora_id: int | None = None
    medium: ShortText | None = None
    lora_name: ShortText | None = None
    extra_keys: ExtraKeys | None = None
    group_idx: int | None = None


class _StoredMap(msgspec.Struct, gc=False, tag="BlockStored"):
    block_hashes: Hashes
    parent_block_hash: WireHash | None
    token_ids: Tokens
    block_size: Annotated[int, Meta(ge=1, lt=1 << 20)]
    lora_id: int | None = None
    medium: ShortText | None = None
    lora_name: ShortText | None = None
    extra_keys: ExtraKeys | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct, array_like=True, gc=False, tag="BlockRemoved"):
    block_hashes: Hashes
    medium: ShortText | None = None
    group_idx: int | None = None


class _RemovedMap(msgspec.Struct, gc=False, tag="BlockRemoved"):
    block_hashes: Hashes
    medium: ShortText | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, array_like=True, gc=False, tag="AllBlocksCleared"):
    pass


class _ClearedMap(msgspec.Struct, gc=False, tag="AllBlocksCleared"):
    pass


class _NameMap(msgspec.Struct, gc=False):
    type: ShortText


_batch = msgspec.msgpack.Decoder(_Batch)
_batch_map = msgspec.msgpack.Decoder(_BatchMap)
_event = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
_event_map = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_name = msgspec.msgpack.Decoder(Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=64)])
_name_map = msgspec.msgpack.Decoder(_NameMap)
_text = msgspec.msgpack.Decoder(ShortText)
_KNOWN = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


def read_events(payload: bytes) -> EventBatch:
    """Raises MalformedEvents. Blocks of another medium are left out."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MalformedEvents(f"{len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are accepted")
    try:
        batch: _Batch | _BatchMap
        batch = (_batch_map if _is_map(payload) else _batch).decode(payload)
        events = [event for raw in batch.events if (event := _read(bytes(raw))) is not None]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # one of text, too
        raise MalformedEvents(f"{error}"[:200]) from None
    return EventBatch(batch.ts, tuple(events), batch.data_parallel_rank)


def _is_map(raw: bytes) -> bool:
    return raw[:1] >= b"\x80" and (raw[0] & 0xF0 == 0x80 or raw[0] in (0xDE, 0xDF))


def _read(raw: bytes) -> KVEvent | None:
    """None for what is unknown, or of no interest."""
    is_map = _is_map(raw)
    try:
        event: Any = (_event_map if is_map else _event).decode(raw)
    except msgspec.ValidationError:
        if _name_of(raw, is_map) in _KNOWN:
            raise
        return None
    if isinstance(event, _Cleared | _ClearedMap):
        return BlocksCleared()
    if event.medium not in (None, MEDIUM) or event.group_idx:
        return None
    hashes = tuple([_hash(one) for one in event.block_hashes])
    if isinstance(event, _Removed | _RemovedMap):
        return BlocksRemoved(hashes)
    parent = None if event.parent_block_hash is None else _hash(event.parent_block_hash)
    keys = event.lora_id is not None or event.lora_name is not None or any(event.extra_keys or ())
    return BlocksStored(hashes, parent, tuple(event.token_ids), event.block_size, keys)


def _name_of(raw: bytes, is_map: bool) -> str:
    return _name_map.decode(raw).type if is_map else _text.decode(_name.decode(raw)[0])


def _hash(value: bytes | int) -> bytes:
    """vLLM's numbers have 64 bits, with a sign once."""
    return value if isinstance(value, bytes) else (value % (1 << 64)).to_bytes(8, "big")


def read_seq(part: bytes) -> int:
    """Raises MalformedEvents."""
    if len(part) != SEQ_BYTES:
        raise MalformedEvents(f"a sequence number of {len(part)} bytes, not of {SEQ_BYTES}")
    return int.from_bytes(part, "big")


# --- writing -----------------------------------------------------------------------------------


def write_seq(seq: int) -> bytes:
    return seq.to_bytes(SEQ_BYTES, "big")


class EventWriter:
    """Makes payloads of events."""

    def __init__(self, *, int_hashes: bool = False, rank: int = 0) -> None:
        """With `int_hashes` the last 64 bits of a hash, as a number: vLLM's default."""
        self._int_hashes = int_hashes
        self._rank = rank
        self._encoder = msgspec.msgpack.Encoder()

    def payloads(self, events: Sequence[KVEvent], time: float) -> Iterator[bytes]:
        """As many as it takes; each is within what readers accept."""
        wire: list[Any] = []
        weight = 0
        for event in events:
            for part in _parts(event):
                wire.append(self._wire(part))
                weight += _weight(part)
                if weight >= MAX_BATCH_TOKENS:
                    yield self._encoder.encode((time, wire, self._rank))
                    wire, weight = [], 0
        if wire:
            yield self._encoder.encode((time, wire, self._rank))

    def _wire(self, event: KVEvent) -> Sequence[Any]:
        match event:
            case BlocksStored(hashes, parent, token_ids, block_size, is_salted):
                keys = None
                if is_salted and parent is None:  # that none but these blocks have
                    first = (f"duetto:{hashes[0].hex()[:32]}",)
                    keys = [first, *[None] * (len(hashes) - 1)]
                before = None if parent is None else self._hash(parent)
                told = self._hashes(hashes)
                # ..., lora_id, medium, lora_name, extra_keys
                where = (None, MEDIUM, None, keys)
                return ("BlockStored", told, before, token_ids, block_size, *where)
            case BlocksRemoved(hashes):
                return ("BlockRemoved", self._hashes(hashes), MEDIUM)
            case BlocksCleared():
                return ("AllBlocksCleared",)

    def _hashes(self, hashes: Sequence[bytes]) -> Sequence[bytes | int]:
        return [self._hash(one) for one in hashes] if self._int_hashes else hashes

    def _hash(self, block_hash: bytes) -> bytes | int:
        return int.from_bytes(block_hash[-8:], "big") if self._int_hashes else block_hash


def _weight(event: KVEvent) -> int:
    match event:
        case BlocksStored():
            return 8 * len(event.hashes) + len(event.token_ids)
        case BlocksRemoved():
            return 8 * len(event.hashes)
        case _:
            return 1


def _parts(event: KVEvent) -> Iterator[KVEvent]:
    """A large one as several."""
    if isinstance(event, BlocksCleared):
        yield event
        return
    hashes, step = event.hashes, MAX_EVENT_BLOCKS
    if isinstance(event, BlocksStored):
        step = max(1, min(step, MAX_EVENT_TOKENS // event.block_size))
    for start in range(0, len(hashes), step):
        part = hashes[start : start + step]
        if isinstance(event, BlocksRemoved):
            yield BlocksRemoved(part)
            continue
        size = event.block_size
        token_ids = event.token_ids[start * size : (start + len(part)) * size]
        yield event._replace(
            hashes=part, parent=hashes[start - 1] if start else event.parent, token_ids=token_ids
        )
