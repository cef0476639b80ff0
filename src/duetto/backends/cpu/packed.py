"""A model's weights as the kernels read them, packed into one arena of huge pages.

The arena is filled from parts of weights, each read and packed by one of several threads, so that
memory peaks at little more than the arena; or from the cache, whose files hold the same bytes.
Knows no checkpoint and no operation.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray
from duetto.backends.blocks import Bytes
from duetto.backends.cpu.cache import CacheUnusable, PackedCache
from duetto.backends.cpu.cut_columns import cut_format, cut_lines, cut_scales
from duetto.backends.cpu.formats import Format
from duetto.backends.cpu.native import native
from duetto.core.errors import ConfigError
from duetto.program.cut import WHOLE, WeightPart
from duetto.program.program import Program
from duetto.program.rewrites.shard import possible_degrees, shard

if TYPE_CHECKING:
    from duetto._native import Pool, Weight

# A weight's name, the first of some of its rows, and the rows.
PackedRows = tuple[str, int, NDArray[Any]]

TILE_ROWS = 64  # outputs that are packed together (csrc/kernels.h)
MIN_CACHED_BYTES = 64 << 20  # less is packed again in no time
_ALIGNMENT = 64


class WeightRows(Protocol):
    """Some rows of one weight, yet to be read: as many as TILE_ROWS or a multiple of it, except at
    the weight's end. Of a rank's part of a weight: of its rows, all columns."""

    @property
    def name(self) -> str: ...
    @property
    def first_row(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

    def read(self, scratch: Bytes) -> NDArray[Any]:
        """The rows, which may lie in `scratch`, num_bytes or longer."""
        ...


class NotFinite(Exception):
    """Some rows of a weight hold a NaN or an infinity."""

    def __init__(self, rows: PackedRows) -> None:
        super().__init__(rows[0])
        self.rows = rows


class NotCut(Exception):
    """A rank's part of a weight cannot be held: none is left for it, or some of its columns are
    quantized together with others, which another rank has."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why


class NotCoded(Exception):
    """Some weights have more exponents than bf12 has room for: they must be kept as bf16."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(*sorted(names))
        self.names = names


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Where one weight lies in the arena, and as what. Without a format: a vector of fp32."""

    shape: tuple[int, ...]
    format: Format | None
    start: int
    data_bytes: int
    scale_bytes: int
    part: WeightPart = WHOLE  # of the weight as it is read
    whole_format: Format | None = None  # where its columns are cut: what rows are quantized as

    @property
    def end(self) -> int:
        return self.start + self.data_bytes + self.scale_bytes

    def data(self, arena: Bytes) -> Bytes:
        return arena[self.start : self.start + self.data_bytes]

    def scales(self, arena: Bytes) -> Bytes | None:
        start = self.start + self.data_bytes
        return arena[start : start + self.scale_bytes] if self.scale_bytes else None


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Where every weight lies: a function of the program and the formats alone."""

    places: Mapping[str, WeightPlace]
    num_bytes: int

    def key(self, pool: "Pool", *contents: str) -> str:
        """Names the arena's bytes, if `contents` names the numbers that are packed into it."""
        places = [(name, p.shape, p.format, p.start, p.part) for name, p in self.places.items()]
        formats = {place.format for place in self.places.values() if place.format is not None}
        packing = sorted(_packing_of(each, pool) for each in formats)
        return sha256(repr((packing, contents, places)).encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The weights of a program. Both keep the arena alive."""

    matrices: Mapping[str, "Weight"]
    vectors: Mapping[str, FloatArray]
    num_bytes: int


def _packing_of(chosen: Format, pool: "Pool") -> int:
    """Tells one way of packing from another, by what it makes of a few numbers: a version number
    that nobody has to remember to raise."""
    n, k = TILE_ROWS + 1, 200  # two tiles, and a group that is shorter than the others
    numbers = np.sin(np.arange(n * k, dtype=np.float32) ** 2).reshape(n, k)
    data_bytes, scale_bytes = native.packed_bytes(chosen.kind, chosen.group, n, k)
    packed = _allocate(data_bytes + scale_bytes)
    data, scales = packed[:data_bytes], packed[data_bytes:] if scale_bytes else None
    native.pack(chosen.kind, chosen.group, [numbers], data, scales, pool)
    return native.checksum(packed)


def lay_out(program: Program, formats: Mapping[str, Format]) -> ArenaLayout:
    """One weight after the other, in the program's order, each on a cache line of its own.

    `formats` are those of whole weights; of a rank's program its parts have a place. Raises NotCut
    for a part that cannot be held so.
    """
    places, end = {}, 0
    for name, spec in program.weights.items():
        part, chosen = program.parts.get(name, WHOLE), formats.get(name)
        shape, whole_format = part.shape(spec.shape), None
        if 0 in shape:
            raise NotCut(name, "nothing of it is left for a rank")
        if chosen is not None and chosen.group and part.columns is not None:
            whole_format, chosen = chosen, cut_format(chosen, part.columns, spec.shape[1])
            if chosen is None:
                raise NotCut(name, "its columns are quantized together by 8 or more")
        if chosen is None:
            (length,) = shape
            data_bytes, scale_bytes = -(-4 * length // _ALIGNMENT) * _ALIGNMENT, 0
        else:
            data_bytes, scale_bytes = native.packed_bytes(chosen.kind, chosen.group, *shape)
        places[name] = WeightPlace(shape, chosen, end, data_bytes, scale_bytes, part, whole_format)
        end += data_bytes + scale_bytes
    return ArenaLayout(places, end)


def degrees_that_fit(program: Program, formats: Mapping[str, Format]) -> list[int]:
    """The tensor-parallel degrees at which every rank's part can be held."""

    def fits(ranks: int) -> bool:
        try:
            for rank in range(ranks):
                lay_out(shard(program, ranks, rank), formats)
        except NotCut:
            return False
        return True

    return [ranks for ranks in possible_degrees(program) if fits(ranks)]


def load_packed(
    layout: ArenaLayout,
    weights: Callable[[], Iterable[WeightRows]],
    pool: "Pool",
    cache: PackedCache | None,
    key: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[PackedWeights, list[str]]:
    """The weights of `layout`, and what is to be said about the cache.

    `weights` is called if they must be packed, by as many threads as `pool` has; it gives all rows
    of the layout's weights once. What is packed is then kept in the cache. `on_progress(done,
    total)` is in bytes of the arena. Raises NotFinite for a NaN or an infinity, with the first part
    that has one; NotCoded, with all their names, for weights that cannot be kept in bf12.
    """
    notes: list[str] = []
    arena = _allocate(layout.num_bytes)
    if cache is not None:
        try:
            if cache.read(key, arena):
                if on_progress is not None:
                    on_progress(layout.num_bytes, layout.num_bytes)
                return _view(layout, arena), notes
        except CacheUnusable as error:
            notes.append(f"packed weights: {error}; they are packed again")
            arena[:] = 0  # padding must be zeros
    _pack_all(layout, arena, weights(), pool.num_threads, on_progress)
    if cache is not None:
        try:
            cache.write(key, arena)
        except CacheUnusable as error:
            notes.append(f"packed weights: {error}; the next start packs them again")
    return _view(layout, arena), notes


def _allocate(num_bytes: int) -> Bytes:
    try:
        return native.Arena(num_bytes).array
    except MemoryError:
        raise ConfigError(
            f"the system refuses {num_bytes} bytes for the weights; --quantization int8 or int4 "
            f"takes less"
        ) from None


class _OfThread(threading.local):
    """What a thread that packs has for itself."""

    def __init__(self) -> None:
        self.pool = native.Pool(1)
        self.scratch: Bytes = np.empty(0, np.uint8)

    def room(self, num_bytes: int) -> Bytes:
        if len(self.scratch) < num_bytes:
            self.scratch = np.empty(num_bytes, np.uint8)
        return self.scratch


def _pack_all(
    layout: ArenaLayout,
    arena: Bytes,
    weights: Iterable[WeightRows],
    num_threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Each part is read and packed by one thread, while it is in that thread's cache."""
    own, not_coded = _OfThread(), set[str]()

    def pack(part: WeightRows) -> int:
        place, numbers = layout.places[part.name], part.read(own.room(part.num_bytes))
        rows = part.name, part.first_row, numbers
        if place.format is None:
            return _copy_vector(place, arena, rows)
        try:
            return _pack_rows(place, place.format, arena, rows, own.pool)
        except OverflowError:
            not_coded.add(part.name)
            return place.end

    with ThreadPoolExecutor(num_threads) as threads:
        for end in threads.map(pack, weights):  # in order, errors too
            if on_progress is not None:
                on_progress(end, layout.num_bytes)
    if not_coded:
        raise NotCoded(frozenset(not_coded))


def _copy_vector(place: WeightPlace, arena: Bytes, rows: PackedRows) -> int:
    name, first_row, numbers = rows
    vector = place.data(arena).view(np.float32)[first_row : first_row + len(numbers)]
    vector[:] = numbers
    if not np.isfinite(vector).all():
        raise NotFinite((name, first_row, numbers.copy()))
    return place.end


def _pack_rows(
    place: WeightPlace, chosen: Format, arena: Bytes, rows: PackedRows, pool: "Pool"
) -> int:
    """Pack some rows; returns the place in the arena up to which numbers now are."""
    name, first_row, numbers = rows
    k = place.shape[1]
    # Tiles stand one after the other, in the data as in the scales.
    sizes = native.packed_bytes(chosen.kind, chosen.group, len(numbers), k)
    tile_sizes = native.packed_bytes(chosen.kind, chosen.group, TILE_ROWS, k)
    data_start, scale_start = (first_row // TILE_ROWS * size for size in tile_sizes)
    data_end = data_start + sizes[0]
    data, scales = place.data(arena)[data_start:data_end], place.scales(arena)
    if scales is not None:
        scales = scales[scale_start : scale_start + sizes[1]]
    bits = numbers.view(np.uint16) if numbers.dtype.name == "bfloat16" else numbers
    if place.whole_format is None:
        is_finite = _pack_columns(place, chosen, bits, data, scales, pool)
    else:
        is_finite = _pack_and_cut(place, place.whole_format, chosen, bits, data, scales, pool)
    if not is_finite:
        raise NotFinite((name, first_row, numbers.copy()))  # scratch is used again
    is_whole = first_row + len(numbers) == place.shape[0]
    return place.end if is_whole else place.start + data_end


def _pack_columns(
    place: WeightPlace,
    chosen: Format,
    bits: NDArray[Any],
    data: Bytes,
    scales: Bytes | None,
    pool: "Pool",
) -> bool:
    """Those that the place has. False if one is a NaN or an infinity."""
    if place.part.columns is not None:
        own = [bits[:, span.start : span.end] for span in place.part.columns]
        bits = own[0] if len(own) == 1 else np.concatenate(own, axis=1)
    return native.pack(chosen.kind, chosen.group, [bits], data, scales, pool) is None


def _pack_and_cut(
    place: WeightPlace,
    whole: Format,
    chosen: Format,
    bits: NDArray[Any],
    data: Bytes,
    scales: Bytes | None,
    pool: "Pool",
) -> bool:
    """All columns are quantized, and those that the place has are kept."""
    assert scales is not None
    assert place.part.columns is not None
    data_bytes, scale_bytes = native.packed_bytes(whole.kind, whole.group, *bits.shape)
    packed = native.Arena(data_bytes + scale_bytes).array
    lines, groups = packed[:data_bytes], packed[data_bytes:]
    if native.pack(whole.kind, whole.group, [bits], lines, groups, pool) is not None:
        return False
    cut_lines(chosen.kind, place.part.columns, lines, data)
    cut_scales(whole, chosen, place.part.columns, groups, scales)
    return True


def _view(layout: ArenaLayout, arena: Bytes) -> PackedWeights:
    matrices: dict[str, Weight] = {}
    vectors: dict[str, FloatArray] = {}
    for name, place in layout.places.items():
        data = place.data(arena)
        if place.format is None:
            vectors[name] = data.view(np.float32)[: place.shape[0]]
        else:
            chosen, (n, k) = place.format, place.shape
            matrices[name] = native.Weight(
                chosen.kind, chosen.group, n, k, data, place.scales(arena)
            )
    return PackedWeights(matrices, vectors, layout.num_bytes)
