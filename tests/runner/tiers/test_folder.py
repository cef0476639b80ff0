"""Files of KV: what is found again, what is a miss and why, and the bytes that they take."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from duetto.core import files
from duetto.runner.tiers import folder as folder_module
from duetto.runner.tiers.block_file import VERSION, file_bytes
from duetto.runner.tiers.folder import Folder

BLOCK_BYTES = 1000
PLENTY = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def blocks(*numbers: int) -> np.ndarray:
    """The content of blocks: of each number another one."""
    rows = [
        np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, np.uint8) for number in numbers
    ]
    return np.array(rows)


def open_folder(path: Path, max_bytes: int = PLENTY, name: str = "a model") -> Folder:
    return Folder(path, max_bytes, name, BLOCK_BYTES)


def keep(folder: Folder, *numbers: int, tenant: bytes = b"") -> str | None:
    return folder.write([key(n) for n in numbers], blocks(*numbers), tenant)


def read(folder: Folder, *numbers: int) -> tuple[int, str | None]:
    outs = np.zeros((len(numbers), BLOCK_BYTES), np.uint8)
    done, why = folder.read([key(n) for n in numbers], list(outs))
    assert np.array_equal(outs[:done], blocks(*numbers)[:done])
    return done, why


def only_file(path: Path) -> Path:
    (file,) = path.glob("*.kv")
    return file


def test_what_was_written_is_read_in_any_order(tmp_path):
    folder = open_folder(tmp_path / "new" / "folder")
    assert keep(folder, 1, 2, 3) is None and keep(folder, 4) is None
    assert read(folder, 3, 4, 1) == (3, None)
    assert read(folder, 2, 5, 1) == (1, "it is not there")


def test_another_start_finds_it(tmp_path):
    keep(open_folder(tmp_path), 1, 2, 3)
    again = open_folder(tmp_path)
    assert sorted(again.keys) == sorted(map(key, (1, 2, 3)))
    assert read(again, 1, 2, 3) == (3, None)


def test_another_model_does_not(tmp_path):
    keep(open_folder(tmp_path), 1)
    other = open_folder(tmp_path, name="another model")
    assert not other.keys and other.num_bytes > BLOCK_BYTES
    assert read(other, 1) == (0, "it is not there")


def test_files_are_private(tmp_path):
    keep(open_folder(tmp_path / "kv"), 1)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert only_file(tmp_path / "kv").stat().st_mode & 0o777 == 0o600


def test_the_bytes_are_bounded_and_the_least_recently_used_goes(tmp_path):
    size = file_bytes(1, BLOCK_BYTES)
    folder = open_folder(tmp_path, 3 * size)
    for number in (1, 2, 3):
        keep(folder, number)
    read(folder, 1)
    keep(folder, 4)
    assert sorted(folder.keys) == sorted(map(key, (1, 3, 4)))
    assert folder.take_dropped() == (key(2),) and folder.take_dropped() == ()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * size


def test_the_tenant_with_the_most_loses_first(tmp_path):
    folder = open_folder(tmp_path, 4 * file_bytes(1, BLOCK_BYTES))
    keep(folder, 1, tenant=b"small")
    for number in (2, 3, 4, 5, 6):
        keep(folder, number, tenant=b"large")
    assert sorted(folder.keys) == sorted(map(key, (1, 4, 5, 6)))


def test_a_tenant_is_known_again_and_named_nowhere(tmp_path):
    keep(open_folder(tmp_path), 1, tenant=b"who it is")
    assert b"who it is" not in only_file(tmp_path).read_bytes()
    again = open_folder(tmp_path, 2 * file_bytes(1, BLOCK_BYTES))
    keep(again, 2, tenant=b"another")
    keep(again, 3, tenant=b"another")
    assert sorted(again.keys) == sorted(map(key, (1, 3)))


def test_a_smaller_bound_holds_from_the_start(tmp_path):
    folder = open_folder(tmp_path)
    for number in range(8):
        keep(folder, number)
    smaller = open_folder(tmp_path, 3 * file_bytes(1, BLOCK_BYTES))
    assert len(smaller.keys) == 3 == len([*tmp_path.glob("*.kv")])


def test_files_of_another_model_count_and_go(tmp_path):
    keep(open_folder(tmp_path), 1)
    other = open_folder(tmp_path, file_bytes(1, BLOCK_BYTES), "another model")
    assert keep(other, 2) is None
    assert len([*tmp_path.glob("*.kv")]) == 1 and read(other, 2) == (1, None)


def test_other_peoples_files_stay(tmp_path):
    (tmp_path / "thesis.kv").write_bytes(bytes(5000))
    (tmp_path / "notes.txt").write_text("notes")
    folder = open_folder(tmp_path, file_bytes(1, BLOCK_BYTES))
    keep(folder, 1)
    keep(folder, 2)
    assert (tmp_path / "thesis.kv").exists() and (tmp_path / "notes.txt").exists()


def test_a_run_that_is_larger_than_all_is_refused(tmp_path):
    folder = open_folder(tmp_path, file_bytes(2, BLOCK_BYTES))
    assert "more than" in keep(folder, *range(20))
    assert not [*tmp_path.iterdir()]


def damaged(change):
    """Cases of damage: each changes the bytes of a file."""
    return [
        ("a flipped bit of a block", lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        ("truncated", lambda data: data[:-1]),
        ("longer", lambda data: data + b"x"),
        ("nothing", lambda _: b""),
        ("half a header", lambda data: data[:30]),
        ("a flipped bit of the header", lambda data: data[:60] + b"~" + data[61:]),
        ("another version", lambda data: data[:8] + bytes([VERSION + 1]) + data[9:]),
        ("another kind of file", lambda data: b"#!/bin/sh" + data[9:]),
        ("an endless header", lambda data: data[:12] + b"\xff\xff\xff\x7f" + data[16:]),
        ("zeros, as after a power cut", lambda data: bytes(len(data))),
        ("its end is zeros", lambda data: data[:4096] + bytes(len(data) - 4096)),
    ][change]


@pytest.mark.parametrize("before_the_start", [True, False])
@pytest.mark.parametrize("case", range(11))
def test_a_damaged_file_is_a_miss_told_once(tmp_path, caplog, case, before_the_start):
    _, change = damaged(case)
    folder = open_folder(tmp_path)
    keep(folder, 1, 2)
    file = only_file(tmp_path)
    file.write_bytes(change(file.read_bytes()))
    if before_the_start:
        folder = open_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        outs = np.zeros((2, BLOCK_BYTES), np.uint8)
        done, why = folder.read([key(1), key(2)], list(outs))
    assert done < 2 and why is not None
    assert np.array_equal(outs[:done], blocks(1, 2)[:done])
    assert not [*tmp_path.glob("*.kv")] and key(2) not in folder.keys
    assert keep(folder, 1, 2) is None and read(folder, 1, 2) == (2, None)


def test_the_reason_is_told_once(tmp_path, caplog):
    folder = open_folder(tmp_path)
    for number in (1, 2):
        keep(folder, number)
    for file in tmp_path.glob("*.kv"):
        file.write_bytes(file.read_bytes()[:-1])
    caplog.clear()
    assert "is damaged: it has" in read(folder, 1)[1] and "is damaged" in read(folder, 2)[1]
    assert len(caplog.records) == 1 and "told once" in caplog.text


def test_a_file_that_holds_other_kv_than_its_name_says(tmp_path):
    folder = open_folder(tmp_path)
    keep(folder, 1)
    file = only_file(tmp_path)
    data = file.read_bytes()
    keep(folder, 2)
    (other,) = set(tmp_path.glob("*.kv")) - {file}
    other.write_bytes(data)
    assert "holds other KV" in read(folder, 2)[1]


def test_a_file_that_is_gone_is_a_miss(tmp_path):
    folder = open_folder(tmp_path)
    keep(folder, 1)
    only_file(tmp_path).unlink()
    done, why = read(folder, 1)
    assert done == 0 and "No such file" in why
    assert folder.take_dropped() == (key(1),) and folder.num_bytes == 0


def test_somebody_elses_file_is_not_read(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    keep(folder, 1)
    monkeypatch.setattr(files.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(
        files.os, "fstat", lambda _: os.stat_result((0o100600, 0, 0, 1, 77, 0, 1, 0, 0, 0))
    )
    assert "belongs to" in read(folder, 1)[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing_is_told_once_and_read_on(tmp_path, monkeypatch, caplog, code):
    folder = open_folder(tmp_path)
    keep(folder, 1)

    def refusing(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module, "write", refusing)
    for number in (2, 3):
        assert os.strerror(code) in keep(folder, number)
    assert len(caplog.records) == 1
    assert [*tmp_path.iterdir()] == [*tmp_path.glob("*.kv")], "something is left behind"
    assert read(folder, 1) == (1, None)
    monkeypatch.undo()
    assert keep(folder, 2) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_says_so():
    with Path("/dev/full").open("wb") as file, pytest.raises(OSError) as caught:
        folder_module.write(file, "f", "t", [key(1)], blocks(1))
    assert caught.value.errno in (errno.ENOSPC, errno.ENODEV)


def test_a_folder_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    """Root may write anywhere, so the system is made to refuse."""
    keep(open_folder(tmp_path), 1)

    def refusing(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folder_module, "NamedTemporaryFile", refusing)
    monkeypatch.setattr(folder_module.os, "utime", refusing)
    folder = open_folder(tmp_path)
    assert read(folder, 1) == (1, None)
    assert "Read-only" in keep(folder, 2)


def test_what_is_no_folder_is_told_and_holds_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = open_folder(tmp_path / "file")
    assert "cannot be used for KV" in caplog.text
    assert not folder.keys and keep(folder, 1) is not None


def test_unfinished_files_of_the_dead_go_and_others_stay(tmp_path):
    old, new = tmp_path / ".unfinished-kv-old", tmp_path / ".unfinished-kv-new"
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    open_folder(tmp_path)
    assert not old.exists() and new.exists()


WRITER = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from runner.tiers.test_folder import keep, open_folder
from pathlib import Path
folder = open_folder(Path({path!r}), 1 << 30)
for first in range(0, 1 << 20, 8):
    keep(folder, *range(first, first + 8))
    print(first, flush=True)
"""


@pytest.mark.parametrize("num_files", [1, 5, 17])
def test_a_writer_that_is_killed_loses_what_it_was_writing_alone(tmp_path, num_files):
    tests = Path(__file__).parents[2]
    code = WRITER.format(tests=str(tests), path=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(num_files)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    written = [int(line) for line in lines]
    folder = open_folder(tmp_path)
    for first in written:
        assert read(folder, *range(first, first + 8)) == (8, None)
    # What it wrote beyond the last line that was read is whole too, or not there.
    assert all(
        folder.read([k], [np.zeros(BLOCK_BYTES, np.uint8)]) == (1, None) for k in folder.keys
    )
