"""The bytes are vLLM's; what is read from others is bounded, and strict in what matters."""

from random import Random
from typing import Any

import msgspec
import pytest
from cluster.events.vllm_events import ARRAYS, LAYOUTS

from duetto.cluster.events.format import (
    MAX_EVENT_BLOCKS,
    MAX_PAYLOAD_BYTES,
    EventWriter,
    MalformedEvents,
    read_events,
    read_seq,
    write_seq,
)
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

A, B, C = (bytes([letter]) * 32 for letter in b"ABC")
EVENTS: tuple[KVEvent, ...] = (
    BlocksCleared(),
    BlocksStored((A, B), None, (1, 2, 3, 4), 2, False),
    BlocksStored((C,), B, (5, 70_000), 2, False),
    BlocksRemoved((C, B)),
)


def vllm(structs: dict[str, Any], *, ints: bool = False) -> Any:
    """EVENTS as vLLM would have them."""

    def told(value: bytes | None) -> bytes | int | None:
        return int.from_bytes(value, "big") & (1 << 64) - 1 if ints and value else value

    stored = structs["BlockStored"]
    return structs["KVEventBatch"](
        ts=1.5,
        events=[
            structs["AllBlocksCleared"](),
            stored([told(A), told(B)], None, [1, 2, 3, 4], 2, None, "GPU", None),
            stored([told(C)], told(B), [5, 70_000], 2, None, "GPU", None),
            structs["BlockRemoved"]([told(C), told(B)], "GPU"),
        ],
        data_parallel_rank=0,
    )


@pytest.mark.parametrize("ints", [False, True])
def test_what_is_written_is_what_vllm_writes(ints):
    (payload,) = EventWriter(int_hashes=ints).payloads(EVENTS, 1.5)
    assert payload == msgspec.msgpack.encode(vllm(ARRAYS, ints=ints))
    assert msgspec.msgpack.decode(payload, type=ARRAYS["KVEventBatch"]) == vllm(ARRAYS, ints=ints)


def test_the_bytes_of_a_small_batch():
    (payload,) = EventWriter().payloads([BlocksRemoved((b"\xab",))], 2.0)
    assert payload.hex(" ") == (
        "93 cb 40 00 00 00 00 00 00 00 91 93"
        " ac 42 6c 6f 63 6b 52 65 6d 6f 76 65 64 91 c4 01 ab a3 47 50 55 00"
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ints", [False, True])
def test_all_layouts_of_vllm_are_read(name, ints):
    batch = read_events(msgspec.msgpack.encode(vllm(LAYOUTS[name], ints=ints)))
    assert (batch.time, batch.rank) == (1.5, 0)
    if not ints:
        assert batch.events == EVENTS
    else:
        assert batch.events[3] == BlocksRemoved((C[:8], B[:8]))
        assert batch.events[2] == BlocksStored((C[:8],), B[:8], (5, 70_000), 2, False)


def test_fields_and_events_of_other_versions_are_passed_over():
    first = ["BlockStored", [A, -1], None, [1, 2], 1, 7]  # no medium; a hash with a sign
    payload = msgspec.msgpack.encode(
        [
            1,
            [
                first,
                [*first[:5], None, "GPU", None, None, None, "full", 4096, "local", "new"],
                {"type": "BlockMigrated", "block_hashes": [A], "destination": "x"},
                ["TierBlocksCleared", "CPU"],
                {"type": "BlockRemoved", "block_hashes": [A], "new": {"a": [1]}},
                ["BlockRemoved", [A], "CPU"],  # it is where no step reads it
                ["BlockRemoved", [A], "GPU", 1],  # of another group of layers
            ],
            None,
            "new",
        ]
    )
    stored = BlocksStored((A, b"\xff" * 8), None, (1, 2), 1, True)  # LoRA 7 is not in its tokens
    events = read_events(payload).events
    assert events == (stored, stored._replace(is_salted=False), BlocksRemoved((A,)))


def test_what_is_salted_says_so_with_what_no_other_block_has():
    salted = BlocksStored((A, B), None, (1, 2), 1, True)
    (payload,) = EventWriter().payloads([salted], 0.0)
    assert read_events(payload).events == (salted,)
    event = msgspec.msgpack.decode(payload, type=ARRAYS["KVEventBatch"]).events[0]
    assert event.extra_keys == [("duetto:" + "41" * 16,), None]  # as vLLM's: of the first block


def test_large_events_are_several_that_follow_one_another():
    count = 3 * MAX_EVENT_BLOCKS + 5
    hashes = tuple([number.to_bytes(32, "big") for number in range(count)])
    events = [
        BlocksStored(hashes, A, tuple(range(4 * count)), 4, False),
        BlocksRemoved(hashes),
    ]
    payloads = list(EventWriter().payloads(events * 30, 0.0))
    assert len(payloads) > 1
    assert max(map(len, payloads)) < MAX_PAYLOAD_BYTES // 2
    read = [event for payload in payloads for event in read_events(payload).events]
    stored = [event for event in read if isinstance(event, BlocksStored)]
    assert all(len(event.token_ids) == 4 * len(event.hashes) for event in stored)
    assert sum([event.hashes for event in stored[:4]], ()) == hashes
    assert [event.parent for event in stored[:4]] == [
        A,
        *[event.hashes[-1] for event in stored[:3]],
    ]
    removed = [event.hashes for event in read if isinstance(event, BlocksRemoved)]
    assert sum(removed[:4], ()) == hashes


@pytest.mark.parametrize(
    "batch",
    [
        None,
        [],
        [1.0],
        ["1", []],
        [1.0, {}],
        [1.0, [5]],
        [1.0, [[]]],
        [1.0, [[5]]],
        [1.0, [{}]],
        [1.0, [["BlockStored"]]],
        [1.0, [["BlockStored", [A], None, [-1], 1]]],
        [1.0, [["BlockStored", [A], None, [1 << 32], 1]]],
        [1.0, [["BlockStored", [A], None, [1], 0]]],
        [1.0, [["BlockStored", [1.5], None, [1], 1]]],
        [1.0, [["BlockStored", [b"A" * 65], None, [1], 1]]],
        [1.0, [["BlockRemoved", "A"]]],
        [1.0, [{"type": "BlockRemoved"}]],
        [1.0, [["BlockRemoved", [A] * 70_000]]],
        [1.0, [["AllBlocksCleared"]] * 70_000],
        [1.0, [["BlockRemoved", [A], "x" * 5000]]],
    ],
)
def test_what_is_no_batch_is_refused_in_one_line(batch):
    with pytest.raises(MalformedEvents) as error:
        read_events(msgspec.msgpack.encode(batch))
    assert "\n" not in str(error.value)


def test_what_claims_to_be_large_or_deep_is_refused():
    for claim in (b"\xdd\xff\xff\xff\xff", b"\x91\x93\xacBlockRemoved\xdd\x7f\xff\xff\xff"):
        with pytest.raises(MalformedEvents):
            read_events(b"\x92\xcb" + bytes(8) + claim)
    deep = b"\x92\xcb" + bytes(8) + b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(MalformedEvents):
        read_events(deep)
    stored = b"\x99\xabBlockStored\x90\xc0\x90\x01\xc0\xc0\xc0" + b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(MalformedEvents):
        read_events(b"\x92\xcb" + bytes(8) + b"\x91" + stored)
    with pytest.raises(MalformedEvents, match="at most"):
        read_events(bytes(MAX_PAYLOAD_BYTES + 1))


def test_random_damage_is_refused_or_read_and_nothing_else():
    rng = Random(17)
    whole = [
        msgspec.msgpack.encode(vllm(structs, ints=ints))
        for structs in LAYOUTS.values()
        for ints in (False, True)
    ]
    num_read = 0
    for _ in range(20_000):
        payload = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(payload))
            match rng.randrange(4):
                case 0:
                    payload[at] = rng.randrange(256)
                case 1:
                    del payload[at : at + rng.randint(1, 8)]
                case 2:
                    payload[at:at] = rng.randbytes(rng.randint(1, 5))
                case 3:
                    payload[at] ^= 1 << rng.randrange(8)
            if not payload:
                break
        try:
            batch = read_events(bytes(payload))
        except MalformedEvents:
            continue
        num_read += 1
        for event in batch.events:
            assert isinstance(event, BlocksCleared) or all(
                isinstance(block_hash, bytes) and len(block_hash) <= 64
                for block_hash in event.hashes
            )
    assert 100 < num_read < 19_000
    for _ in range(5_000):
        try:
            read_events(rng.randbytes(rng.randrange(40)))
        except MalformedEvents:
            continue


def test_a_sequence_number_has_eight_bytes():
    assert read_seq(write_seq(1_234_567_890_123_456)) == 1_234_567_890_123_456
    assert write_seq(258) == b"\0\0\0\0\0\0\1\2"
    for part in (b"", b"\0" * 7, b"\0" * 9):
        with pytest.raises(MalformedEvents):
            read_seq(part)
