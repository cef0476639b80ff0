"""How each backend takes a model: what it needs for it, and how its weights get there.

One class per backend, alike in what they offer: the sizes that are known before a weight is read,
then `load`. Knows no KV plan and no batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from duetto.backends.backend import Backend
from duetto.backends.cpu.backend import CpuBackend, kv_block_bytes
from duetto.backends.cpu.cache import MAX_FILES, PackedCache
from duetto.backends.cpu.formats import Quantization, choose_formats, without_loss
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import (
    MIN_CACHED_BYTES,
    TILE_ROWS,
    ArenaLayout,
    NotCoded,
    NotCut,
    NotFinite,
    PackedWeights,
    WeightRows,
    degrees_that_fit,
    lay_out,
    load_packed,
)
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.memory import scratch_bytes
from duetto.checkpoints.checkpoint import Checkpoint, load_weights
from duetto.core.errors import ConfigError
from duetto.core.files import Progress, user_cache
from duetto.program.activations import LargestStep, activation_bytes
from duetto.program.cut import WHOLE
from duetto.program.dtype import DTYPE_BYTES, Dtype, KVDtype, auto_kv_dtype
from duetto.program.kv_size import bytes_per_block
from duetto.program.program import Program

if TYPE_CHECKING:  # the module may not have been built
    from duetto._native import Member, Pool

_MAX_THREADS = 1024


class DeviceMemory(NamedTuple):
    """Of a device that has its own."""

    device: str  # its name
    memory_bytes: int
    usable_bytes: int  # of it, by us


class Loader(Protocol):
    """What a backend asks for one program, then the backend itself."""

    name: str
    computed_by: str  # the backend, and whatever of it decides the last bits
    auto_kv_dtype: KVDtype
    weight_bytes: int  # that stay in memory
    memory: DeviceMemory | None  # where weights and KV lie; None: in this machine's
    num_batches: int  # that are under way at one time, each over KV of its own
    notes: list[str]  # for people; complete once loaded

    def kv_block_bytes(self, block_size: int, dtype: KVDtype) -> int: ...

    def held_bytes(self, block_size: int, kv_dtype: KVDtype) -> int:
        """What is taken at the start and kept, beside weights and KV."""
        ...

    def step_bytes(self, step: LargestStep, kv_dtype: KVDtype) -> int:
        """What a step needs beside weights and KV, and beside what is held."""
        ...

    def load(
        self,
        program: Program,
        model_dir: Path,
        on_progress: Progress | None,
        beside: "Loader | None" = None,
    ) -> Backend:
        """`beside` has loaded a model that takes turns with this one: they share their threads, as
        two pools that wait on the same processors would disturb each other."""
        ...


class ReferenceLoader:
    """Weights are rounded to `dtype`, then held and computed with in fp32."""

    name = "reference"
    num_batches = 1
    computed_by = "reference"
    auto_kv_dtype: KVDtype = "float32"  # made to be exact, not small

    def __init__(self, program: Program, dtype: Dtype) -> None:
        self._program, self._dtype = program, dtype
        self.weight_bytes = _num_held(program) * DTYPE_BYTES["float32"]
        self.memory: DeviceMemory | None = None
        self.notes: list[str] = []

    def kv_block_bytes(self, block_size: int, dtype: KVDtype) -> int:
        return bytes_per_block(self._program, block_size, dtype)

    def held_bytes(self, block_size: int, kv_dtype: KVDtype) -> int:  # noqa: ARG002
        return 0

    def step_bytes(self, step: LargestStep, kv_dtype: KVDtype) -> int:
        return _buffer_bytes(self._program, step) + scratch_bytes(self._program, kv_dtype, step)

    def load(
        self,
        program: Program,
        model_dir: Path,
        on_progress: Progress | None,
        beside: Loader | None = None,  # noqa: ARG002  it has no threads
    ) -> Backend:
        weights = load_weights(model_dir, program, self._dtype, on_progress)
        return ReferenceBackend(program, weights)


class CpuLoader:
    """Weights are packed, quantized if asked for, and then kept for the next start."""

    name = "cpu"
    num_batches = 1

    def __init__(
        self,
        program: Program,
        dtype: Dtype,
        quantization: Quantization | None,
        skip: Sequence[str],
        *,
        threads: int | None,
        cache_dir: Path | None,
        on_status: Callable[[str], None] | None = None,
        whole: Program | None = None,
        member: "Member | None" = None,
    ) -> None:
        """`whole`: what `program` is one rank's or stage's part of; it says how each weight is
        held. `member`: where a rank meets the others, if it is to be loaded."""
        self._program, self._dtype, self._whole = program, dtype, whole
        self._member = member
        self._isa = choose_isa()
        self._threads = _num_threads(threads)
        self._pool: Pool | None = None  # once loaded
        self._quantization, self._cache_dir = quantization, cache_dir
        self._on_status = on_status
        formats = choose_formats(whole or program, dtype, quantization, skip)
        self._formats = {name: each for name, each in formats.items() if name in program.weights}
        self._layout = self._lay_out()
        self.computed_by = f"cpu/{self._isa}"
        self.auto_kv_dtype: KVDtype = auto_kv_dtype(dtype)
        self.weight_bytes = self._layout.num_bytes
        self.memory: DeviceMemory | None = None
        self.notes: list[str] = []
        if self._threads > (processors := native.available_threads()):
            self.notes.append(
                f"{self._threads} threads share {processors} processors, and wait for each other; "
                f"--threads {processors} is faster"
            )
        if self._isa == "baseline":
            lacks = " ".join(native.missing_features("avx2"))
            why = f"avx2 needs {lacks}" if lacks else "DUETTO_ISA asks for them"
            self.notes.append(f"the baseline kernels run, which are slow: {why}")
        if dtype == "float16" and quantization is None:
            self.notes.append(
                "float16 weights are kept as float32, the same numbers in twice the memory; "
                "--dtype bfloat16 rounds them to half of it"
            )

    def _lay_out(self, plain: Collection[str] = ()) -> ArenaLayout:
        """Baseline kernels have no byte shuffle, without which bf12 is slow."""
        formats = self._formats if self._isa == "baseline" else without_loss(self._formats, plain)
        try:
            return lay_out(self._program, formats)
        except NotCut as error:
            assert self._whole is not None
            degrees = ", ".join(map(str, degrees_that_fit(self._whole, formats)))
            raise ConfigError(
                f"--tp: {error.name} cannot be cut so: {error.why}; accepted: --tp {degrees}"
            ) from None

    def kv_block_bytes(self, block_size: int, dtype: KVDtype) -> int:
        return kv_block_bytes(self._program, block_size, dtype, self._isa)

    def held_bytes(self, block_size: int, kv_dtype: KVDtype) -> int:  # noqa: ARG002
        return 0

    def step_bytes(self, step: LargestStep, kv_dtype: KVDtype) -> int:  # noqa: ARG002
        """Kernels read the arena in place; what a thread keeps is a few tiles."""
        return _buffer_bytes(self._program, step)

    def load(
        self,
        program: Program,
        model_dir: Path,
        on_progress: Progress | None,
        beside: Loader | None = None,
    ) -> CpuBackend:
        shared = beside._pool if isinstance(beside, CpuLoader) else None
        pool = self._pool = shared or self._start_threads()
        cache = self._cache()
        with Checkpoint(model_dir, program, self._whole) as checkpoint:

            def weights() -> Iterator[WeightRows]:
                self._tell_that_it_takes_long()
                return checkpoint.parts(self._dtype, TILE_ROWS)

            def pack() -> tuple[PackedWeights, list[str]]:
                key = ""
                if cache is not None:
                    key = self._layout.key(pool, checkpoint.fingerprint(), self._dtype)
                return load_packed(self._layout, weights, pool, cache, key, on_progress)

            try:
                try:
                    packed, notes = pack()
                except NotCoded as error:
                    self._keep_plain(error.names)
                    packed, notes = pack()
            except NotFinite as error:
                checkpoint.check_finite(*error.rows)  # raises, with the place
                raise
        self.notes += notes
        is_stage, member = self._whole is not None, self._member
        return CpuBackend(program, packed, pool, self._isa, is_stage=is_stage, member=member)

    def _keep_plain(self, names: frozenset[str]) -> None:
        self._layout = self._lay_out(names)
        more = self._layout.num_bytes - self.weight_bytes
        self.weight_bytes = self._layout.num_bytes
        self.notes.append(
            f"weights of too many different exponents for 12 bits a number are kept in 16, which "
            f"takes {more / 2**20:.1f} MiB more than planned: {len(names)}, such as {min(names)}"
        )

    def _start_threads(self) -> "Pool":
        try:
            return native.Pool(self._threads)
        except RuntimeError as error:
            raise ConfigError(
                f"--threads: the system refuses to start {self._threads} ({error}); ask for fewer"
            ) from None

    def _tell_that_it_takes_long(self) -> None:
        if self._on_status is not None and self._layout.num_bytes >= MIN_CACHED_BYTES:
            how = f"quantizing to {self._quantization}" if self._quantization else "packing"
            kept = f", to be kept in {self._cache_dir} for the next start" if self._cache() else ""
            self._on_status(f"{how}: {self._layout.num_bytes / 2**20:.0f} MiB{kept}")

    def _cache(self) -> PackedCache | None:
        """Only what takes time is kept: unquantized weights are packed at the speed at which a file
        could be read back."""
        if self._quantization is None or self._layout.num_bytes < MIN_CACHED_BYTES:
            return None
        if self._cache_dir is None:
            return None
        threads = self._threads or native.available_threads()
        ranks = 1 if self._member is None else self._member.ranks  # each has a file of its own
        return PackedCache(self._cache_dir, threads, MAX_FILES * ranks)


def _num_held(program: Program) -> int:
    """Numbers: of a rank, its parts of weights."""
    if not program.parts:
        return program.num_parameters
    weights = program.weights.items()
    return sum(prod(program.parts.get(name, WHOLE).shape(spec.shape)) for name, spec in weights)


def _buffer_bytes(program: Program, step: LargestStep) -> int:
    return activation_bytes(program, step.num_tokens, step.num_logit_rows)


def default_cache_dir() -> Path | None:
    """Where packed weights are kept."""
    cache = user_cache()
    return None if cache is None else cache / "packed"


def _num_threads(threads: int | None) -> int:
    """0 is all that this process may use."""
    if threads is not None:
        if threads > _MAX_THREADS:
            raise ConfigError(f"--threads: must be from 1 to {_MAX_THREADS}, not {threads}")
        return threads
    text = environ.get("DUETTO_NUM_THREADS", "")
    if text and not (text.isdecimal() and 1 <= int(text) <= _MAX_THREADS):
        raise ConfigError(f"DUETTO_NUM_THREADS: must be from 1 to {_MAX_THREADS}, not {text!r}")
    return int(text or 0)
