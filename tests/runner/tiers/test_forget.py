"""What is dropped is in no file, whatever waits, fails or is killed; and its tests have teeth."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from runner.tiers.test_disk import Gate, reading, results, rows, writing
from runner.tiers.test_folder import BLOCK_BYTES, blocks, keep, key, open_folder, read
from scheduler.mutants import Fault

from duetto.core.batch import BlockMove
from duetto.runner.tiers import disk as disk_module
from duetto.runner.tiers import folder as folder_module
from duetto.runner.tiers.block_file import file_bytes
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.folder import Folder


def forgetting(move_id: int, *numbers: int) -> BlockMove:
    return BlockMove(move_id, "disk", "nowhere", tuple(map(key, numbers)), (), ())


@dataclass
class Place:
    """A folder of its own, and the code under test."""

    path: Path
    make_folder: Callable[..., Folder] = Folder
    make_disk: Callable[..., DiskTier] = DiskTier
    max_bytes: int = 1 << 20
    name: str = field(default="a model")

    def open(self) -> Folder:
        return self.make_folder(self.path, self.max_bytes, self.name, BLOCK_BYTES)

    def disk(self) -> DiskTier:
        return self.make_disk(self.open())

    @property
    def content(self) -> bytes:
        return b"".join(file.read_bytes() for file in self.path.iterdir())

    def has(self, number: int) -> bool:
        """Whether some file has the bytes of this block, findable or not."""
        return blocks(number).tobytes() in self.content


def forget(folder: Folder, *numbers: int) -> str | None:
    return folder.forget([key(number) for number in numbers])


# --- files ---------------------------------------------------------------------------------------


def is_in_no_file(place: Place) -> None:
    folder = place.open()
    keep(folder, 1, 2)
    keep(folder, 3)
    assert forget(folder, 1, 2, 3, 4) is None
    assert not [*place.path.iterdir()] and not folder.keys and folder.num_bytes == 0
    assert sorted(folder.take_dropped()) == sorted(map(key, (1, 2, 3)))
    assert not place.open().keys
    assert keep(folder, 1) is None and read(folder, 1) == (1, None)


def leaves_what_else_a_file_has(place: Place) -> None:
    for gone in ((1,), (2,), (3,), (1, 3), (1, 2)):
        folder = place.open()
        keep(folder, 1, 2, 3, tenant=b"whose")
        keep(folder, 7)
        forget(folder, *gone)
        left = {1, 2, 3} - {*gone}
        assert folder.take_dropped() == tuple(map(key, gone))
        for each in (folder, place.open()):
            assert {*each.keys} == {key(number) for number in (*left, 7)}
            assert read(each, *sorted(left), 7) == (len(left) + 1, None)
            assert each.num_bytes >= sum(file.stat().st_size for file in place.path.iterdir())
        assert not any(map(place.has, gone))
        forget(folder, 1, 2, 3, 7)


def is_whose_it_was_when_it_is_written_again(place: Place) -> None:
    place.max_bytes = 3 * file_bytes(1, BLOCK_BYTES)
    folder = place.open()
    keep(folder, 1, 2, tenant=b"large")
    forget(folder, 1)
    for number in (3, 4, 5):
        keep(folder, number, tenant=b"small" if number == 3 else b"large")
    assert key(3) in folder.keys and key(2) not in folder.keys


def is_not_left_in_a_second_file(place: Place) -> None:
    folder = place.open()
    keep(folder, 1, 2)
    keep(folder, 2, 3)
    keep(folder, 4, 2)
    forget(folder, 2)
    assert not place.has(2)
    assert {*place.open().keys} == set(map(key, (1, 3, 4)))


def is_not_left_in_another_process_file(place: Place) -> None:
    """Nor in one that could not be read for a while, and is known no more."""
    mine, others = place.open(), place.open()
    keep(others, 1, 2)
    keep(others, 5)
    forget(mine, 1)
    assert not place.has(1) and {*place.open().keys} == set(map(key, (2, 5)))
    mine._drop(f"{mine._fingerprint}-{key(5).hex()[:48]}.kv")
    forget(mine, 5)
    assert not place.has(5)


def leaves_other_models_files(place: Place) -> None:
    keep(place.open(), 1)
    place.name = "another model"
    other = place.open()
    keep(other, 1)
    forget(other, 1)
    assert len([*place.path.iterdir()]) == 1


def is_gone_though_the_rest_cannot_be_kept(place: Place) -> None:
    """Damaged, or the disk is full: the rest is a miss."""
    folder = place.open()
    keep(folder, 1, 2)
    (file,) = place.path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])  # of the second block
    assert forget(folder, 1) is None
    assert not [*place.path.iterdir()] and not folder.keys
    keep(folder, 1, 2)

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder._write_file = full  # type: ignore[method-assign]
    assert forget(folder, 1) is None
    assert not [*place.path.iterdir()] and not folder.keys


def says_so_if_a_file_cannot_be_removed(place: Place) -> None:
    folder, unlink = place.open(), Path.unlink
    keep(folder, 1)

    def refusing(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    Path.unlink = refusing  # type: ignore[method-assign]
    try:
        disk = place.make_disk(folder)
        disk.forget(forgetting(0, 1))
        result = results(disk)[0]
    finally:
        Path.unlink = unlink  # type: ignore[method-assign]
    assert result.num_done == 0 and result.error is not None
    assert "cannot be removed: Read-only" in result.error
    assert result.dropped == (key(1),), "it is not to be asked for"


def does_nothing_in_what_is_no_folder(place: Place) -> None:
    place.path /= "file"
    place.path.write_text("")
    assert forget(place.open(), 1) is None


def keeps_the_bytes_within_their_bound(place: Place) -> None:
    place.max_bytes = 2 * file_bytes(3, BLOCK_BYTES)
    folder = place.open()
    keep(folder, 1, 2, 3)
    keep(folder, 4, 5, 6)
    most = []
    true_write = folder._write_file

    def watched(*args: Any) -> None:
        most.append(sum(file.stat().st_size for file in place.path.iterdir()))
        true_write(*args)
        most.append(sum(file.stat().st_size for file in place.path.iterdir()))

    folder._write_file = watched  # type: ignore[method-assign]
    forget(folder, 2)
    forget(folder, 4)
    assert len(most) == 4 and max(most) <= place.max_bytes
    assert {*folder.keys} == set(map(key, (1, 3, 5, 6)))


# --- the thread ----------------------------------------------------------------------------------


def wins_over_what_is_being_written(place: Place) -> None:
    disk = place.disk()
    gate = Gate(disk)
    disk.write(writing(0, 1, 2), blocks(1, 2))
    assert gate.begun.wait(20)
    disk.forget(forgetting(1, 1))
    gate.open.set()
    found = results(disk)
    assert found[0].num_done == 2 and found[1].dropped == (key(1),)
    assert not place.has(1) and place.open().keys == [key(2)]


def is_not_written_if_it_waits_for_that(place: Place) -> None:
    """It never comes to the disk: nobody has to be quick enough to remove it."""
    disk = place.disk()
    gate, written = Gate(disk), list[bytes]()
    disk.write(writing(0, 9), blocks(9))
    assert gate.begun.wait(20)
    disk.write(writing(1, 1, 2, 3), blocks(1, 2, 3))
    disk.write(writing(2, 4), blocks(4))
    disk.forget(forgetting(3, 2, 4))
    disk.write(writing(4, 4, 5), blocks(4, 5))  # computed again
    true_write = gate._write

    def noting(keys: Any, data: Any, tenant: bytes) -> str | None:
        written.extend(keys)
        return true_write(keys, data, tenant)

    gate._write = noting  # type: ignore[method-assign]
    gate.open.set()
    found = results(disk)
    assert written == [key(n) for n in (9, 1, 3, 4, 5)]
    assert all(result.error is None for result in found.values())
    again = place.open()
    assert {*again.keys} == set(map(key, (9, 1, 3, 4, 5)))
    assert read(again, 9, 1, 3, 4, 5) == (5, None)
    assert not place.has(2)


def goes_before_what_is_to_be_written(place: Place) -> None:
    disk = place.disk()
    disk.write(writing(0, 1), blocks(1))
    results(disk)
    gate = Gate(disk)
    true_forget = disk.folder.forget

    def forgetting_in_order(keys: Any) -> str | None:
        gate.order.append("forget")
        return true_forget(keys)

    disk.folder.forget = forgetting_in_order  # type: ignore[method-assign]
    for number in range(2, 5):
        disk.write(writing(number, number), blocks(number))
    assert gate.begun.wait(20)
    disk.forget(forgetting(5, 1))
    disk.read(reading(6, 1), rows(1))
    gate.open.set()
    assert results(disk)[5].num_done == 1
    assert gate.order == ["write", "read", "forget", "write", "write"]


OF_DROPS: tuple[Callable[[Place], None], ...] = (
    is_in_no_file,
    leaves_what_else_a_file_has,
    is_whose_it_was_when_it_is_written_again,
    is_not_left_in_a_second_file,
    is_not_left_in_another_process_file,
    leaves_other_models_files,
    is_gone_though_the_rest_cannot_be_kept,
    says_so_if_a_file_cannot_be_removed,
    does_nothing_in_what_is_no_folder,
    keeps_the_bytes_within_their_bound,
    wins_over_what_is_being_written,
    is_not_written_if_it_waits_for_that,
    goes_before_what_is_to_be_written,
)

FAULTS = [
    Fault(
        "only the file that is known for a block is removed",
        "folder",
        "if gone.isdisjoint(self._keys_of.get(name, ())):",
        "if name not in {self._file_of.get(each) for each in gone}:",
    ),
    Fault("others' files are not looked at", "folder", "        self._look_again()\n", ""),
    Fault(
        "the rest of a file is lost",
        "folder",
        "            if rest is not None:\n",
        "            if False:\n",
    ),
    Fault(
        "a file is written again as it was",
        "folder",
        "if key not in gone and self._file_of.get(key) == name]",
        "if self._file_of.get(key) == name]",
    ),
    Fault(
        "the new file is there before the old one is gone",
        "folder",
        "            error, is_any = self._remove(name), True\n"
        "            why = why or error\n"
        "            if rest is not None:\n"
        "                self._keep(*rest)\n",
        "            if rest is not None:\n"
        "                self._keep(*rest)\n"
        "            error, is_any = self._remove(name), True\n"
        "            why = why or error\n",
    ),
    Fault(
        "the rest is nobody's",
        "folder",
        "        return keys, blocks, header.tenant\n",
        '        return keys, blocks, ""\n',
    ),
    Fault(
        "what cannot be removed is removed",
        "folder",
        "            why = why or error\n",
        "",
    ),
    Fault(
        "what waits is written",
        "disk",
        "if key not in job.forgotten]",
        "if True]",
    ),
    Fault(
        "a drop waits for all that is to be written",
        "disk",
        "return self._reads, self._forgets, self._writes",
        "return self._reads, self._writes, self._forgets",
    ),
    Fault(
        "a part of a run is written with the wrong blocks",
        "disk",
        "tuple([keys[index] for index in wanted]), blocks[wanted]",
        "tuple([keys[index] for index in wanted]), blocks[: len(wanted)]",
    ),
]
MODULES = {"folder": folder_module, "disk": disk_module}


@pytest.mark.parametrize("holds", OF_DROPS, ids=lambda holds: holds.__name__)
def test_what_is_dropped(holds: Callable[[Place], None], tmp_path: Path) -> None:
    holds(Place(tmp_path))


def planted(fault: Fault) -> dict[str, Any]:
    true = MODULES[fault.module]
    text = Path(str(true.__file__)).read_text()
    assert text.count(fault.old) == 1, f"{fault.name}: its text does not stand there once"
    module = ModuleType("planted")
    exec(compile(text.replace(fault.old, fault.new), "<planted>", "exec"), module.__dict__)
    if fault.module == "folder":
        return {"make_folder": module.Folder}
    return {"make_disk": module.DiskTier}


def _raises(holds: Callable[[Place], None], makers: dict[str, Any]) -> bool:
    with TemporaryDirectory() as path:
        try:
            holds(Place(Path(path), **makers))
        except NameError:
            raise  # the planted text is at fault, and catches nothing
        except Exception:
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_of_drops_is_caught(fault: Fault) -> None:
    makers = planted(fault)
    assert any(_raises(holds, makers) for holds in OF_DROPS)


FORGETTER = """
import sys
sys.path.insert(0, {tests!r})
from runner.tiers.test_folder import keep, key, open_folder
from pathlib import Path
folder = open_folder(Path({path!r}), 1 << 30)
for first in range(0, 1 << 20, 8):
    keep(folder, *range(first, first + 8))
    print(first, flush=True)
    folder.forget([key(first + at) for at in (0, 3, 5)])
    print(first, flush=True)
"""


@pytest.mark.parametrize("num_lines", [2, 7, 24])
def test_who_is_killed_while_forgetting_leaves_no_half_of_anything(
    tmp_path: Path, num_lines: int
) -> None:
    code = FORGETTER.format(tests=str(Path(__file__).parents[2]), path=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [int(process.stdout.readline()) for _ in range(num_lines)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = open_folder(tmp_path)
    there = {int.from_bytes(each[:4], "little") for each in folder.keys}
    assert folder.keys and not [*tmp_path.glob(".unfinished-kv-*")][1:]
    for number in there:
        assert read(folder, number) == (1, None)
    for first in lines[1::2]:  # of those that were told to be forgotten
        assert there.isdisjoint({first, first + 3, first + 5})
        assert {first + at for at in (1, 2, 4, 6, 7)} <= there


def test_blocks_of_several_files_are_forgotten_as_a_set_would(tmp_path: Path) -> None:
    """The slow twin is a set; files overlap."""
    random, twin = np.random.default_rng(0), set[int]()
    max_bytes = 12 * file_bytes(3, BLOCK_BYTES)
    folder = open_folder(tmp_path, max_bytes)
    for _ in range(120):
        some = random.choice(30, random.integers(1, 7), replace=False).tolist()
        if random.random() < 0.5:
            keep(folder, *some)
            twin |= {*some}
        else:
            forget(folder, *some)
            twin -= {*some}
            assert not {*map(key, some)} & {*open_folder(tmp_path).keys}
        assert {*folder.keys} <= set(map(key, twin))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= max_bytes
        for number in random.choice(30, 3).tolist():
            if key(number) in folder.keys:
                assert read(folder, number) == (1, None)
