"""The cache of packed weights: what it gives back, and what can be wrong with a file or a disk."""

import errno
import os
import resource
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from duetto.backends.cpu import cache
from duetto.backends.cpu.cache import MAX_FILES, Bytes, CacheUnusable, PackedCache

SIZE = 3 * cache._CHUNK_BYTES + 12_345


def arena(seed: int, size: int = SIZE) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def packed(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "deep" / "packed")


def unusable(packed: PackedCache, key: str = "k", size: int = SIZE) -> str:
    with pytest.raises(CacheUnusable) as caught:
        packed.read(key, np.empty(size, np.uint8))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 64, cache._CHUNK_BYTES, SIZE])
def test_what_was_written_comes_back(packed: PackedCache, size: int) -> None:
    want, got = arena(0, size), np.zeros(size, np.uint8)
    assert not packed.read("k", got)
    assert not got.any()
    packed.write("k", want)
    assert packed.read("k", got)
    np.testing.assert_array_equal(got, want)
    assert not packed.read("another", got)
    assert [file.name for file in packed.directory.iterdir()] == ["k.packed"]


@pytest.mark.parametrize("place", [0, 9, 20, 30, 4096, 4097 + cache._CHUNK_BYTES, -1])
def test_one_byte_that_changed_anywhere_is_seen(packed: PackedCache, place: int) -> None:
    packed.write("k", arena(0))
    content = bytearray(packed.file("k").read_bytes())
    content[place] ^= 1
    packed.file("k").write_bytes(content)
    assert "is damaged" in unusable(packed)


@pytest.mark.parametrize("size", [0, 1, 23, 40, 4096, 5000, cache._CHUNK_BYTES, -1])
def test_a_truncated_file_is_seen(packed: PackedCache, size: int) -> None:
    packed.write("k", arena(0))
    packed.file("k").write_bytes(packed.file("k").read_bytes()[:size])
    assert "is damaged" in unusable(packed)


def test_pages_that_never_reached_the_disk_are_seen(packed: PackedCache) -> None:
    packed.write("k", arena(0))
    content = bytearray(packed.file("k").read_bytes())
    content[8192:12288] = bytes(4096)
    packed.file("k").write_bytes(content)
    assert "checksums" in unusable(packed)


def test_a_foreign_file_is_seen(packed: PackedCache) -> None:
    packed.write("k", arena(0))
    packed.file("k").rename(packed.file("other"))
    assert "holds other weights" in unusable(packed, "other")
    assert "holds other weights" in unusable(packed, "other", SIZE - 1)
    packed.file("k").write_text("<html>not found</html>" * 10)
    assert "not a file of packed weights" in unusable(packed)
    packed.file("k").unlink()
    packed.file("k").mkdir()
    assert "damaged" in unusable(packed) or "cannot be read" in unusable(packed)


def test_a_pipe_is_not_waited_for(packed: PackedCache) -> None:
    packed.directory.mkdir(parents=True)
    os.mkfifo(packed.file("k"))
    assert "is a named pipe" in unusable(packed)
    packed.write("k", arena(0))  # takes its place
    assert packed.read("k", np.empty(SIZE, np.uint8))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_read(packed: PackedCache) -> None:
    packed.write("k", arena(0))
    os.chown(packed.directory, 54_321, -1)
    os.chown(packed.file("k"), 54_321, -1)
    assert "belongs to user 54321, not to you" in unusable(packed)


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"key": "k"}', b"7", b"\xff"])
def test_a_header_of_another_version_is_seen(packed: PackedCache, text: bytes) -> None:
    packed.write("k", arena(0))
    head = cache._HEAD.pack(cache._MAGIC, len(text), cache._checksum(text))
    packed.file("k").write_bytes(head + text + bytes(5000))
    assert "is damaged" in unusable(packed)


def test_a_file_that_may_not_be_read(packed: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    packed.write("k", arena(0))

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "cannot be read: Permission denied" in unusable(packed)


def test_a_disk_that_may_only_be_read_still_gives(
    packed: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.write("k", arena(0))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert packed.read("k", np.empty(SIZE, np.uint8))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this, as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("allocates", [True, False])
def test_a_full_disk_leaves_nothing_and_is_told(
    packed: PackedCache, monkeypatch: pytest.MonkeyPatch, allocates: bool
) -> None:
    if not allocates:  # as on systems that cannot, where writing finds out
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with largest_file(SIZE // 2), pytest.raises(CacheUnusable, match="takes no copy"):
        packed.write("k", arena(0))
    assert list(packed.directory.iterdir()) == []
    assert not packed.read("k", np.empty(SIZE, np.uint8))


def test_a_disk_that_fails_at_the_end_keeps_the_file_that_was_there(
    packed: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.write("k", arena(0))

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CacheUnusable, match="takes no copy of them: No space left on device"):
        packed.write("k", arena(1))
    got = np.empty(SIZE, np.uint8)
    assert packed.read("k", got)
    np.testing.assert_array_equal(got, arena(0))
    assert len(list(packed.directory.iterdir())) == 1


def test_a_disk_that_is_nearly_full_is_left_alone(
    packed: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache, "disk_usage", lambda _: usage(10**12, 0, 4 * SIZE - 4))
    with pytest.raises(CacheUnusable, match="12 MiB are more than a quarter of the 48 MiB"):
        packed.write("k", arena(0))
    monkeypatch.setattr(cache, "disk_usage", lambda _: usage(10**12, 0, 4 * SIZE))
    packed.write("k", arena(0))


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheUnusable, match="takes no copy"):
            PackedCache(place).write("k", arena(0))


def test_concurrent_writers_and_readers_never_see_a_half(packed: PackedCache) -> None:
    contents = [arena(seed, SIZE // 2) for seed in range(3)]
    packed.write("k", contents[0])

    def write(index: int) -> None:
        packed.write("k", contents[index % 3])

    def read(_: int) -> bool:
        got = np.empty(SIZE // 2, np.uint8)
        return packed.read("k", got) and any(np.array_equal(got, c) for c in contents)

    with ThreadPoolExecutor(6) as threads:
        writing = [threads.submit(write, index) for index in range(12)]
        reading = [threads.submit(read, index) for index in range(12)]
        assert all(done.result() for done in reading)
        for done in writing:
            done.result()
    assert [file.name for file in packed.directory.iterdir()] == ["k.packed"]


def test_only_the_files_that_were_used_last_are_kept(packed: PackedCache) -> None:
    content = arena(0, 64)
    for index in range(MAX_FILES):
        packed.write(f"k{index}", content)
        os.utime(packed.file(f"k{index}"), (index, index))
    assert packed.read("k0", np.empty(64, np.uint8))  # makes it the last used
    packed.write("new", content)
    packed.write("newer", content)
    kept = {file.stem for file in packed.directory.iterdir()}
    assert kept == {"k0", "new", "newer", f"k{MAX_FILES - 1}"}


def test_what_a_dead_writer_left_is_removed_and_a_living_ones_is_not(packed: PackedCache) -> None:
    packed.directory.mkdir(parents=True)
    dead, living = (packed.directory / f"{cache._UNFINISHED}{name}" for name in ("a", "b"))
    dead.touch()
    living.touch()
    os.utime(dead, (0, time.time() - 2 * cache._STALE_S))
    packed.write("k", arena(0, 64))
    assert not dead.exists()
    assert living.exists()
