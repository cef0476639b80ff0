"""Weights from safetensors files, single or sharded. Pickles are never opened.

Every header is checked against the program before a tensor is read, so what is wrong with a
checkpoint is said at once. Tensors are read, not mapped, one at a time: what the process holds is
what it was given. Knows tensors by the names that a Program gives, and no model.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  makes "bfloat16" a dtype that numpy knows by name
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from duetto.checkpoints.checkpoint_file import open_part
from duetto.checkpoints.weight_files import EMBEDDING, INDEX, weight_files
from duetto.core.errors import CheckpointError
from duetto.program.cut import WHOLE
from duetto.program.dtype import Dtype
from duetto.program.program import Program, WeightSpec

Weights = dict[str, NDArray[Any]]

LM_HEAD = "lm_head.weight"

STORED_AS: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_OF = {stored: dtype for dtype, stored in STORED_AS.items()}
_EXPONENT_BITS: dict[Dtype, int] = {
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
}
_SAMPLE_BYTES = 4096
_PART_BYTES = 2 << 20  # of a weight that is read in parts: they stay in a cache until they are used


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one tensor of the checkpoint is, and what its header says."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # of its bytes in the file
    num_bytes: int


class Checkpoint:
    """A model's safetensors files, open, with headers that fit the program.

    Raises CheckpointError, naming the file and the tensor, for whatever cannot be loaded as it
    should. A context: the files are closed at its end.
    """

    def __init__(self, model_dir: Path, program: Program, whole: Program | None = None) -> None:
        """`whole`: what `program` is a part of; only the part's weights are read."""
        self._program = program
        self._tensors = _find_tensors(model_dir)
        for spec in program.weights.values():
            _check(model_dir, self._tensors, spec)
        self._copied_head = _check_nothing_is_left(self._tensors, whole or program)
        files = sorted({tensor.file for tensor in self._tensors.values()})
        self._files = {file: open_part(file) for file in files}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def weights(self, dtype: Dtype) -> Iterator[tuple[str, NDArray[Any]]]:
        """The program's weights in its order, each a contiguous array of `dtype`, one at a time.

        Refuses what shows in the numbers only: a NaN or an infinity, and a second copy of tied
        embeddings that is not a copy.
        """
        self._check_copied_head()
        for name, spec in self._program.weights.items():
            weight = np.empty(spec.shape, dtype)
            self.read_rows(name, 0, weight)
            self.check_finite(name, 0, weight)
            yield name, weight

    def parts(
        self, dtype: Dtype, multiple: int = 1, part_bytes: int = _PART_BYTES
    ) -> Iterator["CheckpointRows"]:
        """As weights(), in parts of some rows that are yet to be read, in any order and by any
        thread, by who looks at every number anyway: they are not known to be finite.

        A part has about part_bytes, and as many rows as a `multiple`, except at a weight's end. Of
        a rank's program they are those that the rank has, in its order, with all columns.
        """
        self._check_copied_head()
        for name, spec in self._program.weights.items():
            row_bytes = prod(spec.shape[1:]) * np.dtype(dtype).itemsize
            most = max(1, part_bytes // (row_bytes * multiple)) * multiple
            num_rows = self._program.parts.get(name, WHOLE).shape(spec.shape)[0]
            for start in range(0, num_rows, most):
                shape = (min(most, num_rows - start), *spec.shape[1:])
                yield CheckpointRows(name, start, shape, dtype, self)

    def check_finite(self, name: str, first_row: int, rows: NDArray[Any]) -> None:
        """Raise CheckpointError, with the tensor and the place, for a NaN or an infinity in rows
        of one of `parts`."""
        for start, own in self._spans(name, first_row, rows):
            for source, row, part in _by_source(self._program.weights[name], start, own):
                _check_finite(self._tensors[source], row, part)

    def read_part(self, name: str, first_row: int, out: NDArray[Any]) -> None:
        """As read_rows, counted in the rows that the program has of the weight."""
        for start, own in self._spans(name, first_row, out):
            self.read_rows(name, start, own)

    def _spans(
        self, name: str, first_row: int, rows: NDArray[Any]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Which rows of the weight these are of those that the program has, run by run."""
        part, whole = self._program.parts.get(name, WHOLE), self._program.weights[name].shape[0]
        begin = 0
        for span in part.rows_of(whole, first_row, len(rows)):
            yield span.start, rows[begin : begin + span.width]
            begin += span.width

    def fingerprint(self, *, is_dated: bool = True) -> str:
        """Tells this checkpoint from every other, without reading it whole.

        A SHA-256 over, in the order of their names: each file's name, size, time of its last
        change (in nanoseconds) and header; and each tensor's name, dtype, shape, place and 4 KiB
        of its bytes at its beginning, its middle and its end. A copy on another machine has the
        same one only without the times (`is_dated`).
        """
        digest = sha256()
        for file, descriptor in self._files.items():
            status = os.fstat(descriptor)
            time = f" {status.st_mtime_ns}" if is_dated else ""
            digest.update(f"{file.name} {status.st_size}{time}\n".encode())
            digest.update(_header_bytes(descriptor))
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.start}\n".encode())
            last = max(0, tensor.num_bytes - _SAMPLE_BYTES)
            for offset in (0, last // 2, last):
                size = min(_SAMPLE_BYTES, tensor.num_bytes)
                digest.update(os.pread(self._files[tensor.file], size, tensor.start + offset))
        return digest.hexdigest()

    def read_rows(self, name: str, first_row: int, out: NDArray[Any]) -> None:
        """Fill `out`, which is contiguous, with some rows of a weight, converted to its dtype.

        Looks at no number.
        """
        for source, source_row, part in _by_source(self._program.weights[name], first_row, out):
            tensor = self._tensors[source]
            stored = part
            if _DTYPE_OF[tensor.dtype] != part.dtype.name:
                stored = np.empty(part.shape, _DTYPE_OF[tensor.dtype])
            offset = source_row * (tensor.num_bytes // tensor.shape[0])
            self._read(tensor, offset, stored)
            if stored is not part:
                with np.errstate(over="ignore"):  # becomes infinite, and is told as such
                    part[...] = stored

    def _read(self, tensor: _Tensor, offset: int, out: NDArray[Any]) -> None:
        """Fill `out`, which is contiguous, with the tensor's bytes from `offset` on."""
        view, place = memoryview(out.reshape(-1).view(np.uint8).data), tensor.start + offset
        while view:
            count = os.preadv(self._files[tensor.file], [view], place)
            if count == 0:
                raise CheckpointError(tensor.file, "was cut short while it was read")
            view, place = view[count:], place + count

    def _check_copied_head(self) -> None:
        if self._copied_head is not None:
            self._check_equal(self._copied_head, self._tensors[EMBEDDING])

    def _check_equal(self, tensor: _Tensor, other: _Tensor) -> None:
        same = (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        if same:
            a, b = (np.empty(t.num_bytes, np.uint8) for t in (tensor, other))
            self._read(tensor, 0, a)
            self._read(other, 0, b)
            same = np.array_equal(a, b)
        if not same:
            raise CheckpointError(
                tensor.file,
                f"tensor {LM_HEAD} differs from {EMBEDDING}, but config.json says "
                f"tie_word_embeddings: true",
            )


@dataclass(frozen=True, slots=True)
class CheckpointRows:
    """Some rows of a weight, yet to be read from a checkpoint that is open."""

    name: str
    first_row: int
    shape: tuple[int, ...]
    dtype: Dtype
    checkpoint: Checkpoint

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, scratch: NDArray[np.uint8]) -> NDArray[Any]:
        """The rows, at the beginning of `scratch`, which is contiguous and num_bytes or longer."""
        rows = scratch[: self.num_bytes].view(self.dtype).reshape(self.shape)
        self.checkpoint.read_part(self.name, self.first_row, rows)
        return rows


def load_weights(
    model_dir: Path,
    program: Program,
    dtype: Dtype,
    on_progress: Callable[[int, int], None] | None = None,
    whole: Program | None = None,
) -> Weights:
    """The program's weights by name, each a contiguous array of `dtype` in its WeightSpec's shape.

    `on_progress(done, total)` is called after each weight, in bytes. Raises CheckpointError,
    naming the file and the tensor, for whatever cannot be loaded as it should.
    """
    itemsize = np.dtype(dtype).itemsize
    total = sum(prod(spec.shape) * itemsize for spec in program.weights.values())
    weights: Weights = {}
    done = 0
    with Checkpoint(model_dir, program, whole) as checkpoint:
        for name, weight in checkpoint.weights(dtype):
            weights[name] = weight
            done += weight.nbytes
            if on_progress is not None:
                on_progress(done, total)
    return weights


def _find_tensors(model_dir: Path) -> dict[str, _Tensor]:
    """Which tensor is where. Names are with the prefix `model.`."""
    tensors: dict[str, _Tensor] = {}
    for file, indexed in weight_files(model_dir):
        header, start = _read_header(file)
        wanted = header.keys() if indexed is None else indexed
        if absent := wanted - header.keys():
            raise CheckpointError(file, f"lacks tensor {min(absent)}, which {INDEX} says it holds")
        for name in sorted(wanted):
            if other := tensors.get(_canonical(name)):
                raise CheckpointError(
                    file, f"tensors {other.stored_name} and {name} are one and the same here"
                )
            entry = header[name]
            begin, end = entry["data_offsets"]
            tensors[_canonical(name)] = _Tensor(
                file, name, tuple(entry["shape"]), entry["dtype"], start + begin, end - begin
            )
    return tensors


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What the file says of each tensor, and where their bytes begin.

    The safetensors library has then checked all of it against the file: sizes, order, overlaps.
    """
    descriptor = open_part(file)
    try:
        with safe_open(file, framework="numpy"):
            header = _header_bytes(descriptor)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            file, f"is truncated or no safetensors file ({error}); download it again"
        ) from error
    finally:
        os.close(descriptor)
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return entries, len(header)


def _header_bytes(descriptor: int) -> bytes:
    """The length of the header (u64, little-endian) and the header."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    return os.pread(descriptor, 8 + length, 0)


def _canonical(name: str) -> str:
    """A base model saved without its head has no prefix `model.`."""
    return name if name == LM_HEAD or name.startswith("model.") else f"model.{name}"


def _check(model_dir: Path, tensors: Mapping[str, _Tensor], spec: WeightSpec) -> None:
    """The sources of one weight are all there, in a known dtype and in the right shape."""
    for source, rows in zip(spec.sources, spec.source_rows, strict=True):
        tensor = tensors.get(source)
        if tensor is None:
            raise CheckpointError(model_dir, f"no safetensors file here holds tensor {source}")
        if tensor.dtype not in STORED_AS.values():
            raise CheckpointError(
                tensor.file,
                f"tensor {source} is stored as {tensor.dtype}; "
                f"accepted: {', '.join(STORED_AS.values())}",
            )
        wanted = (rows, *spec.shape[1:])
        if tensor.shape != wanted:
            raise CheckpointError(
                tensor.file,
                f"tensor {source} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(wanted)}",
            )


def _check_nothing_is_left(tensors: Mapping[str, _Tensor], program: Program) -> _Tensor | None:
    """A tensor that no operation uses means that this is another model than config.json says.

    Returns the second copy of tied embeddings, which some exporters write: it is to be compared.
    """
    used = {source for spec in program.weights.values() for source in spec.sources}
    for name, tensor in sorted(tensors.items()):
        if name in used or name.endswith("rotary_emb.inv_freq"):  # written by old exporters
            continue
        if name != LM_HEAD:
            raise CheckpointError(
                tensor.file, f"tensor {tensor.stored_name} is not part of the model in config.json"
            )
    if LM_HEAD in used or program.is_headless:
        return None
    return tensors.get(LM_HEAD)


def _by_source(
    spec: WeightSpec, first_row: int, rows: NDArray[Any]
) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """The tensors that some rows of a weight come from: name, first row in it, and those rows."""
    begin, end = 0, first_row + len(rows)
    for source, num_rows in zip(spec.sources, spec.source_rows, strict=True):
        start, stop = max(begin, first_row), min(begin + num_rows, end)
        if start < stop:
            yield source, start - begin, rows[start - first_row : stop - first_row]
        begin += num_rows


def _check_finite(tensor: _Tensor, first_row: int, weight: NDArray[Any]) -> None:
    """Numbers whose exponent is all ones are NaN or infinite.

    As integers, positive ones are the largest of all signed, negative ones of all unsigned: two
    maxima at the speed of memory, where numpy's isfinite would convert each bfloat16.
    """
    name: Dtype = weight.dtype.name  # type: ignore[assignment]
    exponent, size = _EXPONENT_BITS[name], weight.dtype.itemsize
    bits, sign = weight.reshape(-1), 1 << (8 * size - 1)
    largest = bits.view(f"i{size}").max(initial=0)
    most_negative = bits.view(f"u{size}").max(initial=0)
    if largest >= exponent or most_negative >= exponent + sign:
        row, *rest = np.argwhere(~np.isfinite(weight.astype(np.float32)))[0].tolist()
        raise CheckpointError(
            tensor.file,
            f"tensor {tensor.stored_name} holds {weight[row, *rest]} at "
            f"{[first_row + row, *rest]} as {name}: its numbers must be finite",
        )
