"""Hardware by what people call it: a GPU's name, this host, or a file."""

import re
from dataclasses import fields, replace
from pathlib import Path

import msgspec

from duetto.core.errors import ConfigError
from duetto.core.files import user_cache
from duetto.core.near import near_misses
from duetto.pricing.gpus import ALIASES, GPU_EFFICIENCIES, HARDWARE
from duetto.pricing.hardware import (
    KINDS,
    MAX_DEVICES,
    CachedWeights,
    Efficiencies,
    HardwareSpec,
    KernelEfficiency,
)

HOST = "host"  # the name of what `duetto calibrate` measured ...
GPU = "gpu"  # ... of this machine's GPU
_FILES = {HOST: "hardware.json", GPU: "gpu.json"}
_WORDS = {
    HOST: ("this machine", "duetto calibrate"),
    GPU: ("this machine's GPU", "duetto calibrate --backend cuda"),
}


def calibration_file(of: str = HOST) -> Path | None:
    """Where `duetto calibrate` keeps what it measured of this host, or of its GPU; None: nowhere
    (user_cache)."""
    cache = user_cache()
    return None if cache is None else cache / _FILES[of]


def find_hardware(name: str) -> HardwareSpec:
    """`h100`, `h100:8` (a machine with eight), `host` or `gpu` (as calibrated; one device, unless
    more such are asked for, like host:2) or a JSON file's path.

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
    key = ALIASES.get(key, key)
    if key in HARDWARE:
        return HARDWARE[key]
    if key in _FILES or name.endswith(".json"):
        spec = _read_calibration(key) if key in _FILES else read_hardware(Path(name))
        is_alone = spec.name in _FILES and spec.num_devices is None
        return replace(spec, num_devices=1) if is_alone else spec
    raise ConfigError(
        f"--hardware {name}: not known{near_misses(name, (*HARDWARE, *ALIASES, *_FILES))}; "
        f"accepted: {', '.join(HARDWARE)}, host or gpu (after `duetto "
        "calibrate`), or the path of a .json file with at least name, peaks (FLOP/s by "
        "precision), memory_bandwidth (bytes/s) and memory_bytes"
    )


def _read_calibration(of: str) -> HardwareSpec:
    file = calibration_file(of)
    what, again = _WORDS[of]
    if file is None or not file.is_file():
        why = "this user has no home" if file is None else f"{file} is not there"
        raise ConfigError(f"--hardware {of}: {what} has not been measured ({why}); run: {again}")
    try:
        return read_hardware(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; the calibration is damaged: run {again} again") from error


def named_gpu(name: str) -> HardwareSpec | None:
    """By what its driver calls it, as "NVIDIA H100 80GB HBM3". None for one that is not known, and
    for those that have a known one's name but not its memory."""
    words = name.lower().replace(" ", "").replace("geforce", "")
    known = {key.partition("-")[0]: spec for key, spec in HARDWARE.items()}
    if any(word in words for word in ("pcie", "nvl", "40gb")):
        return None
    return next((known[key] for key in sorted(known, key=len, reverse=True) if key in words), None)


def read_hardware(file: Path) -> HardwareSpec:
    """A HardwareSpec as JSON. Efficiencies that are left out are those of the fitted GPUs.

    Raises ConfigError, naming the file and the key.
    """
    try:
        values = msgspec.json.decode(file.read_bytes())
        _refuse_unknown(values, HardwareSpec, "")
        for key in ("memory_bytes", "num_devices"):  # 8e10 is a whole number to whoever writes it
            if isinstance(values.get(key), float) and values[key].is_integer():
                values[key] = int(values[key])
        spec = msgspec.convert(values, HardwareSpec)
        cached = values.get("cached") or {}
        _refuse_unknown(cached, CachedWeights, "cached.")
        for prefix, own in (("", values), ("cached.", cached)):
            _check_efficiencies(own.get("efficiencies", {}), f"{prefix}efficiencies.")
            for name, efficiencies in own.get("efficiencies_of", {}).items():
                _check_efficiencies(efficiencies, f"{prefix}efficiencies_of.{name}.")
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
