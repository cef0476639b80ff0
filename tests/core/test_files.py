"""Only plain files are opened, never waited for, and only of whom the directory belongs to."""

import os
import socket
from pathlib import Path

import pytest

from duetto.core.errors import ConfigError
from duetto.core.files import UnfitFile, open_file, read_file, user_cache
from duetto.evals.reuse_verdicts import read_verdicts, verdict_file
from duetto.pricing.find_hardware import calibration_file, find_hardware

STRANGER = 54_321  # a user who is nobody here
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def refusal(file: Path, *, is_private: bool = False) -> str:
    with pytest.raises(UnfitFile) as caught:
        os.close(open_file(file, is_private=is_private))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"abc")
    link.symlink_to(file)
    for each in (file, link):
        assert read_file(each, 3) == read_file(each, 3, is_private=True) == b"abc"
    with pytest.raises(UnfitFile, match="larger than"):
        read_file(file, 2)


def test_what_is_no_file_is_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {"pipe": "named pipe", "directory": "directory", "socket": "socket"}
    for name, kind in (kinds | {"link": "named pipe"}).items():
        assert f"is a {kind}, no file" in refusal(tmp_path / name)
    assert "is a device, no file" in refusal(Path("/dev/zero"))


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("dangling", "other"):
        with pytest.raises(FileNotFoundError):
            open_file(tmp_path / name)


@is_root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    os.chown(file, STRANGER, -1)
    assert f"belongs to user {STRANGER}" in refusal(file)
    link = tmp_path / "mine"
    link.symlink_to(file)
    assert f"belongs to user {STRANGER}" in refusal(link)
    # Who gives a directory gives its files.
    os.chown(tmp_path, STRANGER, -1)
    assert read_file(file, 1) == b"a"
    assert f"belongs to user {STRANGER}" in refusal(file, is_private=True)


def test_what_is_private_is_not_shared_by_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a")
    if os.geteuid() == 0:
        os.chown(tmp_path / "file", STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert "not to you or root" in refusal(tmp_path / "file", is_private=True)


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a server starts all the same, which asks what was measured of its model and host."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache() is calibration_file() is verdict_file("key") is None
    assert read_verdicts("key") is None
    with pytest.raises(ConfigError, match="has no home"):
        find_hardware("host")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache() == Path("/cache/duetto")
