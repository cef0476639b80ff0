"""The disk's thread: reads first, bounded writes, a result for each move, whatever goes wrong."""

import errno
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from runner.tiers.test_folder import BLOCK_BYTES, blocks, key, open_folder

from duetto.core.batch import BlockMove, MoveResult
from duetto.runner.tiers import disk as disk_module
from duetto.runner.tiers.disk import DiskTier


def writing(move_id: int, *numbers: int) -> BlockMove:
    return BlockMove(move_id, "arena", "disk", tuple(map(key, numbers)), numbers, ())


def reading(move_id: int, *numbers: int) -> BlockMove:
    return BlockMove(move_id, "disk", "ram", tuple(map(key, numbers)), (), numbers)


def rows(count: int) -> list[np.ndarray]:
    return list(np.zeros((count, BLOCK_BYTES), np.uint8))


def results(disk: DiskTier) -> dict[int, MoveResult]:
    assert disk.flush(20)
    return {result.move_id: result for result in disk.take_results()}


class Gate:
    """Holds a folder's work back until it is opened, and notes the order."""

    def __init__(self, disk: DiskTier) -> None:
        self.open, self.begun, self.order = Event(), Event(), list[str]()
        folder = disk.folder
        self._read, self._write = folder.read, folder.write
        folder.read, folder.write = self.read, self.write  # type: ignore[method-assign]

    def _pass(self, what: str) -> None:
        self.begun.set()
        assert self.open.wait(20)
        self.order.append(what)

    def read(self, keys, outs):
        self._pass("read")
        return self._read(keys, outs)

    def write(self, keys, data, tenant):
        self._pass("write")
        return self._write(keys, data, tenant)


def test_what_is_written_comes_back(tmp_path):
    disk = DiskTier(open_folder(tmp_path))
    disk.write(writing(0, 1, 2), blocks(1, 2))
    assert results(disk)[0].num_done == 2
    into = rows(2)
    disk.read(reading(1, 2, 1), into)
    assert results(disk)[1].num_done == 2
    assert np.array_equal(into, blocks(2, 1))


def test_reads_go_before_writes_that_wait(tmp_path):
    disk = DiskTier(open_folder(tmp_path))
    gate = Gate(disk)
    for number in range(3):
        disk.write(writing(number, number), blocks(number))
    assert gate.begun.wait(20)
    disk.read(reading(3, 0), rows(1))
    gate.open.set()
    assert len(results(disk)) == 4
    assert gate.order == ["write", "read", "write", "write"]


def test_what_waits_to_be_written_is_bounded(tmp_path):
    disk = DiskTier(open_folder(tmp_path), max_queued=2 * BLOCK_BYTES)
    gate = Gate(disk)
    assert disk.has_room_for(5 * BLOCK_BYTES), "a run larger than the queue has to go too"
    disk.write(writing(0, 1), blocks(1))
    assert disk.has_room_for(BLOCK_BYTES) and not disk.has_room_for(2 * BLOCK_BYTES)
    disk.write(writing(1, 2), blocks(2))
    assert not disk.has_room_for(1)
    gate.open.set()
    results(disk)
    assert disk.has_room_for(2 * BLOCK_BYTES)


def test_a_wait_ends_with_a_result_or_after_a_moment(tmp_path):
    disk = DiskTier(open_folder(tmp_path))
    gate = Gate(disk)
    disk.read(reading(0, 1), rows(1))
    disk.wait([0, 7], 0.01)
    assert not disk.take_results()
    gate.open.set()
    disk.wait([0], 20)
    assert disk.take_results()[0].error == "it is not there"
    disk.wait([0], 20)  # it has its result already: no wait


def test_whatever_is_raised_is_a_miss_and_the_thread_goes_on(tmp_path):
    disk = DiskTier(open_folder(tmp_path))
    true_write = disk.folder.write

    def raising(*_args):
        raise MemoryError("planted")

    disk.folder.write = raising  # type: ignore[method-assign]
    disk.write(writing(0, 1), blocks(1))
    assert "planted" in results(disk)[0].error
    disk.folder.write = true_write  # type: ignore[method-assign]
    disk.write(writing(1, 1), blocks(1))
    assert results(disk)[1].error is None


def test_the_thread_ends_when_idle_and_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_module, "IDLE_S", 0.01)
    disk = DiskTier(open_folder(tmp_path))
    for move_id in range(3):
        disk.write(writing(move_id, move_id), blocks(move_id))
        assert results(disk)[move_id].num_done == 1
        with disk._changed:
            assert disk._changed.wait_for(lambda: True, 1)
        while disk._is_running:  # it ends by itself
            Event().wait(0.01)


def test_what_fell_out_is_told(tmp_path):
    disk = DiskTier(open_folder(tmp_path, 9000))
    for number in range(3):
        disk.write(writing(number, number), blocks(number))
    assert results(disk)[2].dropped in {(key(0),), (key(1),)}


@pytest.mark.parametrize("what", ["not a folder", "full"])
def test_a_disk_that_is_of_no_use_answers_all_the_same(tmp_path: Path, monkeypatch, what):
    path = tmp_path / "kv"
    if what == "not a folder":
        path.write_text("")
    disk = DiskTier(open_folder(path))
    if what == "full":

        def full(*_args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("duetto.runner.tiers.folder.write", full)
    for number in range(4):
        disk.write(writing(number, number), blocks(number))
        disk.read(reading(10 + number, number), rows(1))
    found = results(disk)
    assert len(found) == 8 and all(result.num_done == 0 for result in found.values())
