"""A model's weights on the device: in one arena, read in parts through pinned memory.

A few threads read parts of the checkpoint, each into a buffer of its own; the device copies and
quantizes part by part, on a stream of its own. Each part's extremes are kept there too, and looked
at once, at the end: a number that is not finite is none of a model's. Knows no operation.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duetto.backends.cuda.formats import (
    GpuFormat,
    aligned,
    device_weight_bytes,
    matrix_bytes,
    num_groups,
)
from duetto.backends.cuda.quantize import put_rows
from duetto.backends.cuda.tensors import Matrix
from duetto.core.errors import ConfigError
from duetto.program.dtype import Dtype
from duetto.program.program import Program

_PART_BYTES = (
    16 << 20
)  # so few that a launch per part is nothing; int4 takes 16 times as much beside
_NUM_READERS = 4
_NUM_BUFFERS = 8


class StoredRows(Protocol):
    """Some rows of a weight, yet to be read: checkpoints/checkpoint.CheckpointRows."""

    @property
    def name(self) -> str: ...
    @property
    def first_row(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def num_bytes(self) -> int: ...

    def read(self, scratch: NDArray[np.uint8]) -> NDArray[Any]:
        """The rows, at the beginning of `scratch`."""
        ...


class StoredWeights(Protocol):
    """What weights are read from: checkpoints/checkpoint.Checkpoint."""

    def parts(
        self, dtype: Dtype, multiple: int = 1, part_bytes: int = ...
    ) -> Iterator[StoredRows]: ...

    def check_finite(self, name: str, first_row: int, rows: NDArray[Any]) -> None:
        """Raises an error that names the first number of some rows that is not finite."""
        ...


@dataclass(frozen=True, slots=True)
class CudaWeights:
    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Tensor]  # in fp32: norm weights and biases

    @property
    def num_bytes(self) -> int:
        """Of their numbers; in an arena each is aligned (formats.device_weight_bytes)."""
        matrices = [t for m in self.matrices.values() for t in (m.data, m.scales) if t is not None]
        return sum(tensor.nbytes for tensor in (*matrices, *self.vectors.values()))


def allocate_weights(
    program: Program, formats: Mapping[str, GpuFormat], device: torch.device
) -> CudaWeights:
    """Places for all weights, of any contents. Raises ConfigError if the device has no room."""
    num_bytes = device_weight_bytes(program, formats)
    try:
        arena = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"{device} refuses {num_bytes / 2**20:.0f} MiB for the weights; --quantization int8, "
            f"fp8 or int4 needs less"
        ) from error
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Tensor] = {}
    start = 0

    def take(size: int) -> Tensor:
        nonlocal start
        taken = arena[start : start + size]
        start += aligned(size)
        return taken

    for name, spec in program.weights.items():
        if name in formats:
            matrices[name] = _matrix(formats[name], spec.shape, take)
        else:
            vectors[name] = take(4 * int(np.prod(spec.shape))).view(torch.float32).view(spec.shape)
    return CudaWeights(matrices, vectors)


_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}


def _matrix(format: GpuFormat, shape: tuple[int, ...], take: Callable[[int], Tensor]) -> Matrix:
    num_outputs, num_inputs = shape
    data_bytes, scale_bytes = matrix_bytes(format, num_outputs, num_inputs)
    data = take(data_bytes).view(_TORCH_DTYPES[format.kind]).view(num_outputs, -1)
    scales: Tensor | None = None
    if scale_bytes:
        scales = take(scale_bytes).view(torch.float32)
        if format.group:  # group by group, so that a program reads those of its outputs together
            scales = scales.view(num_groups(format, num_inputs), num_outputs).t()
    return Matrix(format, (num_outputs, num_inputs), data, scales)


class _PinnedBuffer:
    """What one part is read into, and the event behind its copy to the device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_gpu)
        self._bytes = self._memory.numpy()
        self._copied = torch.cuda.Event() if is_gpu else None

    def fill(self, part: StoredRows) -> Tensor:
        """The part's rows, when what was here before has been copied."""
        if self._copied is not None:
            self._copied.synchronize()
        part.read(self._bytes)
        rows = self._memory[: part.num_bytes].view(_TORCH_DTYPES[part.dtype])
        return rows.view(part.shape)

    def note_copies(self) -> None:
        """All copies out of it are on the stream."""
        if self._copied is not None:
            self._copied.record()


def load_on_device(
    checkpoint: StoredWeights,
    program: Program,
    dtype: Dtype,
    formats: Mapping[str, GpuFormat],
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> CudaWeights:
    """The program's weights, rounded to `dtype`, then kept as `formats` say; what is not in them is
    a vector. `on_progress(done, total)` is in bytes of the checkpoint, as `dtype` has them.

    Raises ConfigError if the device has no room, and what the checkpoint raises, naming the place,
    for a number that is not finite.
    """
    weights = allocate_weights(program, formats, device)
    parts = list(checkpoint.parts(dtype, part_bytes=_PART_BYTES))
    total, done = sum(part.num_bytes for part in parts), 0
    extremes = torch.empty(len(parts), 2, dtype=torch.float32, device=device)
    with _stream_of_its_own(device):
        for i, (part, rows, buffer) in enumerate(_read(parts, device)):
            extreme = torch.aminmax(_put(part, rows, weights))
            for place, number in zip(extremes[i], extreme, strict=True):
                place.copy_(number)
            buffer.note_copies()
            done += part.num_bytes
            if on_progress is not None:
                on_progress(done, total)
    for i in (~torch.isfinite(extremes).all(1)).nonzero()[:, 0].tolist():
        part = parts[i]
        checkpoint.check_finite(
            part.name, part.first_row, part.read(np.empty(part.num_bytes, np.uint8))
        )
    return weights


def _read(
    parts: Sequence[StoredRows], device: torch.device
) -> Iterator[tuple[StoredRows, Tensor, _PinnedBuffer]]:
    """Each part with its rows, and the buffer that they are in until the next one is asked for."""
    num_bytes = max(part.num_bytes for part in parts)
    unused = [_PinnedBuffer(num_bytes, device) for _ in parts[:_NUM_BUFFERS]]
    reading: deque[tuple[StoredRows, Future[Tensor], _PinnedBuffer]] = deque()
    with ThreadPoolExecutor(_NUM_READERS, "weights") as readers:
        for part in parts:
            if not unused:
                done, rows, buffer = reading.popleft()
                yield done, rows.result(), buffer
                unused.append(buffer)
            buffer = unused.pop()
            reading.append((part, readers.submit(buffer.fill, part), buffer))
        for done, rows, buffer in reading:
            yield done, rows.result(), buffer


def _put(part: StoredRows, rows: Tensor, weights: CudaWeights) -> Tensor:
    """Keep a part's rows; returns them as they are on the device, not quantized."""
    matrix = weights.matrices.get(part.name)
    own = slice(part.first_row, part.first_row + len(rows))
    if matrix is None:
        vector = weights.vectors[part.name]
        return vector[own].copy_(rows.to(vector.device, non_blocking=True))
    if matrix.scales is None:
        put_rows(rows, matrix, part.first_row)
        return matrix.data[own]
    moved = rows.to(matrix.data.device, non_blocking=True)
    put_rows(moved, matrix, part.first_row)
    return moved


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """What is computed inside has been computed behind it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
    torch.cuda.empty_cache()  # what quantization took for itself
