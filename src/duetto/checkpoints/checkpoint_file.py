"""The files of a checkpoint: each is opened here, or named as what it is instead.

Knows no format; which files there are to be is the reader's business.
"""

import os
from pathlib import Path

from duetto.core.errors import CheckpointError
from duetto.core.files import UnfitFile, open_file, read_file

MAX_TEXT_BYTES = 256 * 2**20  # of a JSON file or a template; Gemma's tokenizer.json is 33 MiB
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_UNFINISHED = "*.incomplete"  # how the hub's client names what it has not got all of


def is_there(file: Path) -> bool:
    """Whether the directory has something of this name, if only a link to nothing."""
    return os.path.lexists(file)


def open_part(file: Path) -> int:
    """A descriptor of one file of a checkpoint. Raises CheckpointError, saying what it is."""
    try:
        descriptor = open_file(file)
    except OSError as error:
        raise CheckpointError(file, _why(file, error)) from None
    try:
        refuse_pointer(file, os.pread(descriptor, len(_LFS_POINTER), 0))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_part(file: Path) -> bytes:
    """All of a small file of a checkpoint. Raises CheckpointError, saying what it is."""
    try:
        data = read_file(file, MAX_TEXT_BYTES)
    except OSError as error:
        raise CheckpointError(file, _why(file, error)) from None
    refuse_pointer(file, data)
    return data


def read_text_part(file: Path) -> str:
    """As read_part, of a text in UTF-8."""
    try:
        return read_part(file).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"cannot be read: {error}") from error


def is_pointer(file: Path) -> bool:
    """Whether git-LFS has not fetched the file. False for what cannot be opened."""
    try:
        descriptor = open_file(file)
    except OSError:
        return False
    try:
        return os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER
    finally:
        os.close(descriptor)


def refuse_pointer(file: Path, data: bytes) -> None:
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(
            file, "is a git-LFS pointer, not the file that it points to; run: git lfs pull"
        )


def unfinished(model_dir: Path) -> str:
    """Says that an interrupted download has left something, or nothing ("")."""
    places = [model_dir, model_dir / ".cache" / "huggingface" / "download"]
    if model_dir.parent.name == "snapshots":  # in the hub's cache, files are links to blobs
        places.append(model_dir.parent.parent / "blobs")
    left = [file for place in places for file in place.glob(_UNFINISHED)]
    if not left:
        return ""
    num_bytes = sum(file.lstat().st_size for file in left)
    return (
        f"; a download was interrupted and left {len(left)} unfinished, "
        f"{num_bytes / 2**20:.0f} MiB: run it again"
    )


def _why(file: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        if file.is_symlink():
            target = file.readlink()
            return (
                f"is a link to {target}, which is not there: a download was interrupted, or its "
                f"files were removed; download it again"
            )
        return f"is missing{unfinished(file.parent)}"
    if isinstance(error, UnfitFile):
        return str(error)
    return f"cannot be read: {error.strerror or error}"
