"""A file of KV blocks: a header that says what they are, then their bytes, page by page.

    magic, version, length and checksum of the header, header (JSON), zeros up to a page
    block 0, block 1, ...

The header has the keys of the blocks, a checksum of each, and the fingerprint of whatever makes KV
another. Whatever is wrong with a file is a BadBlockFile, in words. Knows no tier and no policy.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from duetto.backends.blocks import Bytes
from duetto.backends.cpu.native import native, why_unavailable

VERSION = 1
_MAGIC = b"duettokv"
_HEAD = struct.Struct("<8sIIQ")  # magic, version, length and checksum of the header
_PAGE = 4096
_MAX_HEADER_BYTES = 1 << 20


class BadBlockFile(ValueError):
    """It cannot be used; the message says why, after "it"."""


class Header(NamedTuple):
    """What a file holds."""

    fingerprint: str
    tenant: str  # a digest
    block_bytes: int
    keys: tuple[bytes, ...]
    checksums: tuple[int, ...]  # of the blocks
    start: int  # where the first block lies


def file_bytes(num_blocks: int, block_bytes: int) -> int:
    """What a file takes, at most."""
    header = _HEAD.size + 300 + 100 * num_blocks
    return -(-header // _PAGE) * _PAGE + num_blocks * block_bytes


def write(
    file: IO[bytes], fingerprint: str, tenant: str, keys: Sequence[bytes], blocks: Bytes
) -> None:
    """The rows of `blocks` are the blocks. Raises OSError as the disk does."""
    fields = {
        "fingerprint": fingerprint,
        "tenant": tenant,
        "block_bytes": blocks.shape[1],
        "keys": [key.hex() for key in keys],
        "checksum": _CHECKSUM,
        "checksums": [_checksum(block) for block in blocks],
    }
    text = json.dumps(fields).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text
    head += bytes(-len(head) % _PAGE)
    if hasattr(os, "posix_fallocate"):  # a full disk shows at once
        os.posix_fallocate(file.fileno(), 0, len(head) + blocks.nbytes)
    file.write(head)
    file.write(blocks.data)
    file.flush()


def read_header(descriptor: int) -> Header:
    """Raises BadBlockFile, or OSError as the disk does."""
    head = os.pread(descriptor, _PAGE, 0)
    if len(head) < _HEAD.size:
        raise BadBlockFile("is too short")
    magic, version, length, checksum = _HEAD.unpack_from(head)
    if magic != _MAGIC:
        raise BadBlockFile("holds no KV")
    if version != VERSION:
        raise BadBlockFile(f"is of version {version}, not {VERSION}")
    if length > _MAX_HEADER_BYTES:
        raise BadBlockFile("is damaged: its header has no end")
    end = _HEAD.size + length
    text = head[_HEAD.size : end]
    if len(text) < length:
        text += os.pread(descriptor, length - len(text), len(head))
    if zlib.crc32(text) != checksum:
        raise BadBlockFile("is damaged: its header is another than was written")
    header = _parsed(text, -(-end // _PAGE) * _PAGE)
    wanted = header.start + len(header.keys) * header.block_bytes
    if (size := os.fstat(descriptor).st_size) != wanted:
        raise BadBlockFile(f"is damaged: it has {size} bytes, not {wanted}")
    return header


def read_block(descriptor: int, header: Header, index: int, out: Bytes) -> None:
    """Into `out`, which then holds anything if this raises BadBlockFile or OSError."""
    done, start = 0, header.start + index * header.block_bytes
    while done < header.block_bytes:
        count = os.preadv(descriptor, [out[done:].data], start + done)
        if not count:
            raise BadBlockFile("is damaged: it ends too early")
        done += count
    if _checksum(out) != header.checksums[index]:
        raise BadBlockFile("is damaged: a block is another than was written")


def _parsed(text: bytes, start: int) -> Header:
    try:
        fields: dict[str, Any] = json.loads(text)
        if fields["checksum"] != _CHECKSUM:
            raise BadBlockFile(f"has checksums of kind {fields['checksum']!r:.20}")
        keys = tuple([bytes.fromhex(key) for key in fields["keys"]])
        checksums = tuple([int(each) for each in fields["checksums"]])
        names = str(fields["fingerprint"]), str(fields["tenant"])
        header = Header(*names, int(fields["block_bytes"]), keys, checksums, start)
    except BadBlockFile:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadBlockFile(f"is damaged: its header makes no sense ({error!r:.80})") from None
    if not keys or len(keys) != len(checksums) or header.block_bytes < 1:
        raise BadBlockFile("is damaged: its header makes no sense")
    return header


def _crc32(block: Bytes) -> int:
    return zlib.crc32(block.data)


def _xxh64(block: Bytes) -> int:
    return native.checksum(block)


# XXH64 takes a tenth of the time, and the interpreter's lock is free meanwhile.
_HAS_NATIVE = why_unavailable() is None
_CHECKSUM = "xxh64" if _HAS_NATIVE else "crc32"
_checksum: Callable[[Bytes], int] = _xxh64 if _HAS_NATIVE else _crc32
