"""What a device can do at most, and which part of that its kernels reach. Knows no model.

Peaks are the vendor's dense ones. `Efficiencies` say what is reached of them: one number for each
kind of operation and resource, never for one size or one model, so that they carry over.
"""

import re
from dataclasses import dataclass, field, fields, replace
from os import environ
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from duetto.core.errors import ConfigError

Kind = Literal[
    "linear", "attention", "norm", "rope", "activation", "add", "embed", "copy", "collective"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
HOST = "host"  # the name of what `duetto calibrate` measured
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
    rows: int
    context: int  # tokens in the cache
    time_s: float  # of all its calls in a step
    fraction: float  # of the roof that binds it: datasheet time over measured time


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """One device (a GPU, or this host), and the links to others of its kind."""

    name: str
    peaks: dict[str, float]  # FLOP/s by arithmetic precision, dense: {"bfloat16": 312e12, ...}
    memory_bandwidth: float  # bytes/s
    memory_bytes: int
    link_bandwidth: float = 0.0  # bytes/s that one device can send; 0: no others
    link_latency_s: float = 0.0  # of one hop
    efficiencies: Efficiencies = IDEAL
    efficiencies_of: dict[str, Efficiencies] = field(default_factory=dict)  # by arithmetic, if own
    kernels: tuple[KernelPoint, ...] = ()  # what was measured, for people
    host_speed: float = 1.0  # of one thread, next to that of the host of the efficiencies
    num_devices: int | None = None  # that there are; None: as many as asked for
    date: str = ""  # when the numbers were looked up or measured, YYYY-MM-DD
    source: str = ""

    def __post_init__(self) -> None:
        if not self.peaks:
            raise ValueError('peaks must hold FLOP/s by precision: {"float32": 1e12}')
        for precision, peak in self.peaks.items():
            _check_range(f"peaks.{precision}", peak, *_SPEED, " FLOP/s")
        _check_range("memory_bandwidth", self.memory_bandwidth, *_BANDWIDTH, " bytes/s")
        _check_range("memory_bytes", self.memory_bytes, *_MEMORY)
        _check_range("link_latency_s", self.link_latency_s, *_SECONDS)
        if self.link_bandwidth:
            _check_range("link_bandwidth", self.link_bandwidth, *_BANDWIDTH, " bytes/s")
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

    def notes_on_host(self, arithmetic: str, graphs: bool) -> tuple[str, ...]:
        """Whose host it is that steps are priced with, where its time counts."""
        if graphs or self.reached(arithmetic) != GPU_EFFICIENCIES:
            return ()
        return (
            "the host's part of a step is that of vLLM of 2023; --graphs leaves it out, as engines "
            "of today nearly do",
        )

    def ideal(self) -> "HardwareSpec":
        """The same with datasheet numbers alone."""
        return replace(self, efficiencies=IDEAL, efficiencies_of={})


# Fitted by benchmarks/planner_a100.py on half of Vidur's measurements of single operations and half
# of Splitwise's of whole steps, on A100-80G; docs/benchmarks/planner-a100.md has the errors of the
# other half. Attention is at the least that is known of its kernels, as these rows cannot tell. The
# host is an AMD EPYC 7V12 that launches each kernel from Python, as vLLM did in 2023. Without it
# (Deployment.graphs), docs/benchmarks/planner-published.md has other devices and later engines.
GPU_EFFICIENCIES = Efficiencies(
    linear=KernelEfficiency(compute=0.725, memory=0.82, half_rows=71.1, call_s=6.19e-06),
    attention=KernelEfficiency(compute=0.5, memory=0.6, call_s=3e-05),
    norm=KernelEfficiency(memory=0.341, call_s=1.7e-06),
    rope=KernelEfficiency(memory=0.422, call_s=1.05e-06),
    activation=KernelEfficiency(memory=0.497, call_s=1.99e-06),
    add=KernelEfficiency(memory=0.885, call_s=9.51e-07),
    embed=KernelEfficiency(memory=0.145, call_s=2.19e-06),
    copy=KernelEfficiency(memory=0.885, call_s=9.51e-07),
    collective=KernelEfficiency(memory=0.349, call_s=3e-05),
    launch_s=3.48e-05,
    chunk_launch_s=1.85e-05,
    step_s=0.00796,
    logit_row_s=0.000375,
)
# Machines of these GPUs have a Sapphire Rapids or a Genoa instead. From memory, not checked: from a
# Zen 2 at 3.3 GHz to a Zen 3 at 3.5 GHz, whose single-thread scores Sapphire Rapids has, is 1.26 by
# AMD's 19 % per clock; to a Genoa it is about 1.45 by PassMark.
_HOST_OF_2023 = 1.4


def _gpu(**values: Any) -> HardwareSpec:
    return HardwareSpec(efficiencies=GPU_EFFICIENCIES, date="2026-11-21", **values)


# How to read the table. Peaks are dense: sheets that say "with sparsity" are halved. Bandwidths are
# the maker's, in units of 1e9. Memory is what the driver shows as the total, which is less than the
# sheet's gigabytes where ECC takes a part. A link's bandwidth is what one device sends: half of
# what sheets call NVLink or Infinity Fabric bandwidth, which is both directions together.
#
# What was checked on the date of `_gpu`: peaks, memory bandwidth and links, against pages that
# quote the maker's sheet (`source` names both; the sheets themselves could not be opened); memory,
# against what nvidia-smi or rocm-smi prints in public logs. From memory, not checked: latencies.
_NVLINK_S = 1.5e-6
_PCIE_S = 5e-6
_PCIE_4 = 32e9  # x16, one direction; sheets say 64 GB/s for both
_MIB = 2**20
_HOPPER_PEAKS = {  # of the SXM5 module; H200 differs in its memory only
    "float32": 66.9e12,
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "float8": 1978.9e12,
    "int8": 1978.9e12,
}
HARDWARE: dict[str, HardwareSpec] = {
    spec.name: spec
    for spec in (
        _gpu(
            name="a100-80g",
            peaks={"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
            memory_bandwidth=2.039e12,
            memory_bytes=81920 * _MIB,
            link_bandwidth=300e9,  # 12 NVLink 3, 600 GB/s both ways
            link_latency_s=_NVLINK_S,
            source="NVIDIA A100 80GB SXM4 data sheet (2021), as quoted by "
            "glennklockwood.com/garden/processors/A100",
        ),
        _gpu(
            name="h100",
            host_speed=_HOST_OF_2023,
            peaks=_HOPPER_PEAKS,
            memory_bandwidth=3.35e12,
            memory_bytes=81559 * _MIB,
            link_bandwidth=450e9,  # 18 NVLink 4, 900 GB/s both ways
            link_latency_s=_NVLINK_S,
            source="NVIDIA H100 SXM5, Hopper architecture whitepaper (2022), as quoted by "
            "glennklockwood.com/garden/processors/h100",
        ),
        _gpu(
            name="h200",
            host_speed=_HOST_OF_2023,
            peaks=_HOPPER_PEAKS,
            memory_bandwidth=4.8e12,
            memory_bytes=143771 * _MIB,
            link_bandwidth=450e9,  # as H100
            link_latency_s=_NVLINK_S,
            source="NVIDIA H200 SXM data sheet (2023), as quoted by aiwiki.ai/wiki/nvidia_h200; "
            "peaks are the H100's, whose die it has",
        ),
        _gpu(
            name="l4",
            peaks={
                "float32": 30.3e12,
                "bfloat16": 121e12,  # half of 242
                "float16": 121e12,
                "float8": 242.5e12,  # half of 485
                "int8": 242.5e12,
            },
            memory_bandwidth=300e9,
            memory_bytes=23034 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            source="NVIDIA L4 data sheet (2023), as quoted by "
            "grokipedia.com/page/NVIDIA_L4_vs_L40S",
        ),
        _gpu(
            name="l40s",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 91.6e12,
                "bfloat16": 362.05e12,
                "float16": 362.05e12,
                "float8": 733e12,
                "int8": 733e12,
            },
            memory_bandwidth=864e9,
            memory_bytes=46068 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            source="NVIDIA L40S data sheet (2023), as quoted by "
            "mullet.se/product.html?product_id=355414",
        ),
        _gpu(
            name="rtx4090",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 82.6e12,
                "bfloat16": 165.2e12,
                "float16": 165.2e12,  # with fp32 accumulation, as float8
                "float8": 330.3e12,
                "int8": 660.6e12,
            },
            memory_bandwidth=1.008e12,
            memory_bytes=24564 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            source="NVIDIA Ada GPU architecture whitepaper (2022), appendix A, as quoted by "
            "waredb.com/processor/nvidia-geforce-rtx-4090",
        ),
        _gpu(
            name="mi300x",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 163.4e12,
                "bfloat16": 1307.4e12,
                "float16": 1307.4e12,
                "float8": 2614.9e12,
                "int8": 2614.9e12,
            },
            memory_bandwidth=5.3e12,
            memory_bytes=196592 * _MIB,
            link_bandwidth=448e9,  # 7 Infinity Fabric links, 896 GB/s both ways
            link_latency_s=2e-6,
            source="AMD Instinct MI300X data sheet (2023), as quoted by "
            "yobitel.com/knowledge-base/amd-mi300x (peaks are dense, though that page says sparse: "
            "304 units x 2.1 GHz x 2048 at 16 bits); float32 and int8 by units x clock only",
        ),
    )
}
_ALIASES = {
    "a100": "a100-80g",
    "a100-80gb": "a100-80g",
    "a100-sxm": "a100-80g",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "rtx-4090": "rtx4090",
    "4090": "rtx4090",
}


def calibration_file() -> Path:
    """Where `duetto calibrate` keeps what it measured of this host."""
    home = environ.get("XDG_CACHE_HOME") or ""
    cache = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    return cache / "duetto" / "hardware.json"


def find_hardware(name: str) -> HardwareSpec:
    """`h100`, `h100:8` (a machine with eight), `host` (as calibrated; one device, unless more such
    machines are asked for, like host:2) or a JSON file's path.

    Raises ConfigError: for a name that is not known with those that are, for a file with the key.
    """
    base, colon, count = name.rpartition(":")
    if colon and re.fullmatch(r"[0-9]+", count):
        if not 1 <= float(count) <= MAX_DEVICES:
            raise ConfigError(
                f"--hardware {name:.40}: there must be from 1 to {MAX_DEVICES} devices"
            )
        return replace(find_hardware(base), num_devices=int(count))
    key = name.lower()
    key = _ALIASES.get(key, key)
    if key in HARDWARE:
        return HARDWARE[key]
    if key == HOST or name.endswith(".json"):
        spec = _read_host() if key == HOST else read_hardware(Path(name))
        is_alone = spec.name == HOST and spec.num_devices is None
        return replace(spec, num_devices=1) if is_alone else spec
    raise ConfigError(
        f"--hardware {name}: not known; accepted: {', '.join(HARDWARE)}, host (after `duetto "
        "calibrate`), or the path of a .json file with at least name, peaks (FLOP/s by "
        "precision), memory_bandwidth (bytes/s) and memory_bytes"
    )


def _read_host() -> HardwareSpec:
    file = calibration_file()
    if not file.is_file():
        raise ConfigError(
            f"--hardware host: this machine has not been measured ({file} is not there); "
            "run: duetto calibrate"
        )
    try:
        return read_hardware(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; the calibration is damaged: run duetto calibrate again") from (
            error
        )


def read_hardware(file: Path) -> HardwareSpec:
    """A HardwareSpec as JSON. Efficiencies that are left out are those of the fitted GPUs.

    Raises ConfigError, naming the file and the key.
    """
    try:
        values = msgspec.json.decode(file.read_bytes())
        _refuse_unknown(values, HardwareSpec, "")
        if "efficiencies" in values:
            _check_efficiencies(values["efficiencies"], "efficiencies.")
        for key in ("memory_bytes", "num_devices"):  # 8e10 is a whole number to whoever writes it
            if isinstance(values.get(key), float) and values[key].is_integer():
                values[key] = int(values[key])
        spec = msgspec.convert(values, HardwareSpec)
        for name, efficiencies in values.get("efficiencies_of", {}).items():
            _check_efficiencies(efficiencies, f"efficiencies_of.{name}.")
    except FileNotFoundError:
        raise ConfigError(f"{file}: is missing") from None
    except (OSError, ValueError) as error:  # msgspec's are ValueErrors
        raise ConfigError(f"{file}: {error}") from error
    return spec if "efficiencies" in values else replace(spec, efficiencies=GPU_EFFICIENCIES)


def write_hardware(spec: HardwareSpec, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")


def _check_efficiencies(values: object, prefix: str) -> None:
    for kind in _refuse_unknown(values, Efficiencies, prefix):
        if kind in KINDS:
            _refuse_unknown(values[kind], KernelEfficiency, f"{prefix}{kind}.")  # type: ignore[index]


def _refuse_unknown(values: object, known: type, prefix: str) -> tuple[str, ...]:
    """The keys of an object, if each is known."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'}: must be an object")
    names = [entry.name for entry in fields(known)]
    for key in values:
        if key not in names:
            raise ValueError(f"{prefix}{key}: is not known; accepted: {', '.join(names)}")
    return tuple(values)
