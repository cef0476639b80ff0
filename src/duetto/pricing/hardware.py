"""What a device can do at most, and which part of that its kernels reach. Knows no model.

Peaks are the vendor's dense ones. `Efficiencies` say what is reached of them: one number for each
kind of operation and resource, never for one size or one model, so that they carry over.
"""

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from math import log
from typing import Any, get_args

from duetto.program.op import Kind as Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_DEVICES = 4096
# Beyond what any device has, by far: a unit that was mistaken, or a file that was damaged.
_SPEED = (1e6, 1e19)  # FLOP/s
_BANDWIDTH = (1e6, 1e15)  # bytes/s
_MEMORY = (2**20, 2**50)  # bytes
_SECONDS = (0.0, 60.0)  # of a call, a hop, a step


def _check_range(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least:g} to {most:g}{unit}, not {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEfficiency:
    """What the kernels of one kind reach. A call takes the longer of its arithmetic and its
    traffic, each at its fraction of the peak, and `call_s` besides."""

    compute: float = 1.0  # of the arithmetic peak, in (0, 1], of a large call
    memory: float = 1.0  # of the memory's (a collective: the link's) bandwidth, in (0, 1]
    half_rows: float = 0.0  # rows at which half of `compute` is reached: arrays that are not filled
    call_s: float = 0.0  # of the device, for each call
    row_s: float = 0.0  # of the device, for each row, where rows are walked one by one

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1")
        if not 0 <= self.half_rows < float("inf"):
            raise ValueError("half_rows must be 0 or more")
        for name in ("call_s", "row_s"):
            _check_range(name, getattr(self, name), *_SECONDS)


_IDEAL_KERNEL = KernelEfficiency()


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """All kinds' kernels, and what the host adds to a step.

    The host launches operations ahead of the device, so a step takes the longer of the device's
    sum and the host's launches; the other host times come on top.
    """

    linear: KernelEfficiency = _IDEAL_KERNEL
    attention: KernelEfficiency = _IDEAL_KERNEL
    norm: KernelEfficiency = _IDEAL_KERNEL
    rope: KernelEfficiency = _IDEAL_KERNEL
    activation: KernelEfficiency = _IDEAL_KERNEL
    add: KernelEfficiency = _IDEAL_KERNEL
    embed: KernelEfficiency = _IDEAL_KERNEL
    copy: KernelEfficiency = _IDEAL_KERNEL  # KV into the cache, rows out of a matrix
    collective: KernelEfficiency = _IDEAL_KERNEL
    launch_s: float = 0.0  # of the host, for each operation
    chunk_launch_s: float = 0.0  # ... and more where a request computes several tokens
    step_s: float = 0.0  # of the host, for each step
    logit_row_s: float = 0.0  # of the host, for each row that is sampled from

    def __post_init__(self) -> None:
        for name in ("launch_s", "chunk_launch_s", "step_s", "logit_row_s"):
            _check_range(name, getattr(self, name), *_SECONDS)

    def of(self, kind: Kind) -> KernelEfficiency:
        found: KernelEfficiency = getattr(self, kind)
        return found


IDEAL = Efficiencies()  # datasheet numbers alone


def rounded(efficiencies: Efficiencies) -> Efficiencies:
    """To three digits, which is more than any fit is worth."""

    def shorter(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.3g}")
        return replace(
            value, **{entry.name: shorter(getattr(value, entry.name)) for entry in fields(value)}
        )

    found: Efficiencies = shorter(efficiencies)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPoint:
    """One kind of operation at one size, as it was measured."""

    kind: Kind
    arithmetic: str
    requests: int = 1  # alike
    rows: int  # tokens of all of them
    context: int  # tokens of each in the cache
    time_s: float  # of all its calls in a step
    fraction: float  # of the roof that binds it: datasheet time over measured time


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedWeights:
    """What is reached where caches keep a model's weights from one step to the next; what the host
    itself works on stays there too, so its time is another."""

    most_bytes: int  # of weights
    efficiencies: Efficiencies
    efficiencies_of: dict[str, Efficiencies] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """One device (a GPU, or this host), and the links to others of its kind."""

    name: str
    peaks: dict[str, float]  # FLOP/s by arithmetic precision, dense: {"bfloat16": 312e12, ...}
    memory_bandwidth: float  # bytes/s
    memory_bytes: int
    link_bandwidth: float = 0.0  # bytes/s that one device can send; 0: no others
    link_latency_s: float = 0.0  # of one hop
    # bytes/s that copies to the RAM of its host reach, and its host's disk; 0: not known
    host_bandwidth: float = 0.0
    disk_read_bandwidth: float = 0.0
    disk_write_bandwidth: float = 0.0
    efficiencies: Efficiencies = IDEAL
    efficiencies_of: dict[str, Efficiencies] = field(default_factory=dict)  # by arithmetic, if own
    # bytes that each step reads again, ascending, and bytes/s: where caches hold some, the more
    read_bandwidths: tuple[tuple[int, float], ...] = ()
    cached: CachedWeights | None = None
    weight_bytes: dict[str, float] = field(default_factory=dict)  # of a number, if kept otherwise
    kernels: tuple[KernelPoint, ...] = ()  # what was measured, for people
    host_speed: float = 1.0  # of one thread, next to that of the host of the efficiencies
    num_devices: int | None = None  # that there are; None: as many as asked for
    date: str = ""  # when the numbers were looked up or measured, YYYY-MM-DD
    source: str = ""
    busy: tuple[str, ...] = ()  # what else the machine did while it was measured, for people

    def __post_init__(self) -> None:
        if not self.peaks:
            raise ValueError('peaks must hold FLOP/s by precision: {"float32": 1e12}')
        for precision, peak in self.peaks.items():
            _check_range(f"peaks.{precision}", peak, *_SPEED, " FLOP/s")
        _check_range("memory_bandwidth", self.memory_bandwidth, *_BANDWIDTH, " bytes/s")
        _check_range("memory_bytes", self.memory_bytes, *_MEMORY)
        _check_range("link_latency_s", self.link_latency_s, *_SECONDS)
        for size, bandwidth in self.read_bandwidths:
            _check_range(f"read_bandwidths of {size} bytes", bandwidth, *_BANDWIDTH, " bytes/s")
        sizes = [size for size, _ in self.read_bandwidths]
        if sizes != sorted(set(sizes)) or min(sizes, default=1) < 1:
            raise ValueError(f"read_bandwidths: sizes must be above 0 and ascend, not {sizes}")
        for name, num_bytes in self.weight_bytes.items():
            _check_range(f"weight_bytes.{name}", num_bytes, 0.1, 8.0, " bytes")
        for name in (
            *("link_bandwidth", "host_bandwidth"),
            *("disk_read_bandwidth", "disk_write_bandwidth"),
        ):
            if bandwidth := getattr(self, name):
                _check_range(name, bandwidth, *_BANDWIDTH, " bytes/s")
        if not 0 < self.host_speed < float("inf"):
            raise ValueError("host_speed must be above 0")
        if self.num_devices is not None:
            _check_range("num_devices", self.num_devices, 1, MAX_DEVICES)

    def balance(self, precision: str) -> float:
        """FLOPs for each byte at which arithmetic and memory take equally long."""
        return self.peaks[precision] / self.memory_bandwidth

    def peak_of(self, kind: Kind, arithmetic: str) -> float:
        """FLOP/s that this kind of operation may have: matrix units are for matrix products."""
        if kind in ("linear", "attention"):
            return self.peaks[arithmetic]
        return self.peaks.get("float32", self.peaks[arithmetic])

    def reached(self, arithmetic: str) -> Efficiencies:
        """What is reached where matrix products are in this precision."""
        return self.efficiencies_of.get(arithmetic, self.efficiencies)

    def for_weights(self, num_bytes: float) -> "HardwareSpec":
        """This device as it is for a model of whose weights each step reads so many bytes."""
        found = replace(
            self, memory_bandwidth=self._read_bandwidth(num_bytes), read_bandwidths=(), cached=None
        )
        if self.cached is None or num_bytes > self.cached.most_bytes:
            return found
        return replace(
            found,
            efficiencies=self.cached.efficiencies,
            efficiencies_of=self.cached.efficiencies_of,
        )

    def _read_bandwidth(self, num_bytes: float) -> float:
        """As measured of the nearest sizes, and between them by the logarithm of the size."""
        sizes = [log(size) for size, _ in self.read_bandwidths]
        if not sizes or num_bytes <= 0:
            return self.memory_bandwidth
        size = min(max(log(num_bytes), sizes[0]), sizes[-1])
        above = bisect_left(sizes, size)
        high = self.read_bandwidths[above][1]
        if sizes[above] == size:
            return high
        part = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
        return self.read_bandwidths[above - 1][1] * (1 - part) + high * part

    def ideal(self) -> "HardwareSpec":
        """The same with datasheet numbers alone."""
        return replace(self, efficiencies=IDEAL, efficiencies_of={}, cached=None)
