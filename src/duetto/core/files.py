"""Opening what others have put on the disk: plain files only, without waiting, and of whom. And
whether there is a place for a file that is to be written."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pwd import getpwuid

from duetto.core.errors import ConfigError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Progress = Callable[[int, int], None]  # called with what is done, and all there is to do


def user_cache() -> Path | None:
    """`duetto` in the user's cache directory (XDG); None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or ""
    if Path(home).is_absolute():  # the specification has relative ones ignored
        return Path(home, "duetto")
    try:
        return Path.home() / ".cache" / "duetto"
    except RuntimeError:
        return None


class UnfitFile(OSError):
    """What is there is no file that may be read; the message says what it is instead."""


def open_file(file: Path, *, is_private: bool = False) -> int:
    """A descriptor of `file`, to be read. Never waits, as opening a named pipe would.

    The file must be the user's own, root's, or of the owner of the directory that it is in: whoever
    gave the directory gave its files, but in a directory for everyone each file is somebody's.
    `is_private`: the user's own or root's only. Links are followed: hubs keep files as links.

    Raises UnfitFile for what is no such file, and FileNotFoundError and OSError as os.open does.
    """
    _check(file, file.stat(), is_private)  # before it is opened: a device may act on that
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check(file, os.fstat(descriptor), is_private)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(file: Path, max_bytes: int, *, is_private: bool = False) -> bytes:
    """All of it. Raises UnfitFile also for a file of more than `max_bytes`."""
    with open(open_file(file, is_private=is_private), "rb") as opened:
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnfitFile(f"is larger than {max_bytes >> 20} MiB")
    return data


def check_folder(flag: str, file: Path) -> None:
    """Raises ConfigError where a file cannot be written for want of its folder; asked before the
    work, not after it."""
    if not file.parent.is_dir():
        raise ConfigError(f"{flag} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ConfigError(f"{flag} {file}: is a folder; accepted: a file's name")


def _check(file: Path, status: os.stat_result, is_private: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFile(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, no file")
    owners = {os.geteuid(), 0}
    if status.st_uid in owners:
        return
    accepted = "you or root"
    if not is_private:
        owners.add(file.parent.stat().st_uid)
        accepted = "you, root or the owner of the directory"
    if status.st_uid not in owners:
        raise UnfitFile(f"belongs to {_name(status.st_uid)}, not to {accepted}; a copy is yours")


def _name(user: int) -> str:
    with suppress(KeyError):
        return f"user {getpwuid(user).pw_name}"
    return f"user {user}"
