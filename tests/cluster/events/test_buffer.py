"""What a publisher remembers of what it has sent."""

from duetto.cluster.events.buffer import EventBuffer
from duetto.cluster.events.format import EventWriter, read_events
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored


def stored(number: int) -> BlocksStored:
    return BlocksStored((bytes([number]) * 32,), None, (number,), 1, False)


def buffer_of(count: int, **bounds: int) -> EventBuffer:
    buffer = EventBuffer(EventWriter(), 100, **bounds)
    for number in range(count):
        (batch,) = buffer.add([stored(number)], 0.0)
        assert batch.seq == 100 + number
    return buffer


def test_says_again_what_it_remembers():
    buffer = buffer_of(10, max_batches=4)
    assert [batch.seq for batch in buffer.since(0)] == [106, 107, 108, 109]
    assert [batch.seq for batch in buffer.since(108)] == [108, 109]
    assert read_events(buffer.since(109)[0].payload).events == (stored(9),)
    assert buffer.since(110) == buffer.since(1 << 63) == []


def test_is_bounded_by_bytes_too():
    buffer = buffer_of(10, max_bytes=300)
    batches = buffer.since(0)
    assert 1 < len(batches) < 10
    assert sum(len(batch.payload) for batch in batches) <= 300
    assert batches[-1].seq == 109


def test_all_is_what_is_there_now():
    buffer = buffer_of(3)
    buffer.add([BlocksRemoved((bytes([1]) * 32, b"unknown"))], 0.0)
    (batch,) = buffer.all(0.0)
    assert batch.seq == 103
    cleared, there = read_events(batch.payload).events
    assert cleared == BlocksCleared()
    assert there == BlocksStored((bytes(32), bytes([2]) * 32), None, (), 1, False)
    buffer.add([BlocksCleared()], 0.0)
    (batch,) = buffer.all(0.0)
    assert read_events(batch.payload).events == (BlocksCleared(),)
