"""What this machine offers, and what of Duetto is installed and ready on it. Measures nothing."""

import platform
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from duetto.backends.cpu.native import why_unavailable
from duetto.core.cpus import usable_cpus
from duetto.core.errors import ConfigError
from duetto.models.find import find_program
from duetto.runner.host_memory import available_memory_bytes
from duetto.runner.loaders import CpuLoader
from duetto.runner.parts_loader import Degrees, why_no_parts

RUNTIME = ("numpy", "ml_dtypes", "tokenizers", "safetensors", "starlette", "uvicorn", "msgspec")
OPTIONAL = ("torch", "triton", "transformers")


def describe_installation() -> dict[str, Any]:
    """Facts about this machine and this installation."""
    versions = {name: _version(name) for name in (*RUNTIME, *OPTIONAL)}
    native, refusal, gpu = _cpu_features(), _refusal(), describe_gpu()
    backends = ["reference"] if why_unavailable() else ["cpu", "reference"]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus_usable": usable_cpus(),
        "memory_available_bytes": available_memory_bytes(),
        "native_module": native is not None,
        "cpu_features": native or [],
        "instruction_sets": _instruction_sets(),
        "gpu": gpu,
        "backends": ["cuda", *backends] if gpu["usable"] else backends,
        "cpu_backend_lacks": why_unavailable(),
        "parts_lack": why_no_parts(Degrees(num_ranks=2, num_stages=2)),
        "packages": versions,
        "installed_bytes": _installed_bytes(),
        "refusal": refusal,
        "ready": native is not None and not refusal and all(versions[name] for name in RUNTIME),
    }


def describe_gpu() -> dict[str, Any]:
    """The GPU, whether it can be used, and why not. Imports torch beside a driver only."""
    device = import_module("duetto.backends.cuda.device")
    facts = device.probe_gpu()
    why_not = device.why_unusable(facts)
    found = facts.devices[0]._asdict() if facts.devices else {}
    told = ("driver", "torch_cuda", "free_bytes", "is_interpreted")
    return {
        **found,
        **{name: getattr(facts, name) for name in told},
        "num_devices": len(facts.devices),
        "usable": why_not is None,
        "why_not": why_not,
    }


def _refusal() -> str | None:
    """Why `duetto serve` would not start on the cpu backend, whatever the model: DUETTO_ISA, say,
    names what is not there. Asked of what a start asks, about a tiny model of which nothing is
    loaded."""
    if why_unavailable():
        return None  # it would, on the reference
    try:
        CpuLoader(find_program("tiny"), "bfloat16", None, (), threads=None, cache_dir=None)
    except ConfigError as error:
        return str(error)
    return None


def _cpu_features() -> list[str] | None:
    """None if the native module is not there or cannot be loaded: everything else still runs."""
    if why_unavailable():
        return None
    native = import_module("duetto._native")
    return list(native.cpu_features())


def _instruction_sets() -> dict[str, Any]:
    """Of this build: the one that is used, if any is, and what each other lacks here."""
    if why_unavailable():
        return {"used": None, "missing": {}}
    native = import_module("duetto._native")
    missing = {name: native.missing_features(name) for name in native.built_isas()}
    try:
        return {"used": native.choose_isa(), "missing": missing}
    except ValueError:  # DUETTO_ISA names one that is not there; see _refusal
        return {"used": None, "missing": missing}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _installed_bytes() -> int:
    """Size on disk of Duetto's run-time dependencies, found by walking their requirements."""
    sizes, todo = {}, ["duetto"]
    found = {_normal(d.metadata["Name"]): d for d in distributions()}
    while todo:
        name = _normal(todo.pop())
        if name in sizes or name not in found:
            continue
        files = found[name].files or []
        paths = [Path(str(f.locate())) for f in files]
        sizes[name] = sum(p.stat().st_size for p in paths if p.is_file())
        todo += [r for r in map(_required_name, found[name].requires or []) if r is not None]
    return sum(sizes.values())


def _required_name(requirement: str) -> str | None:
    """The name in a requirement, unless it belongs to an extra."""
    name, _, marker = requirement.partition(";")
    if "extra ==" in marker:
        return None
    match = re.match(r"[A-Za-z0-9._-]+", name.strip())
    return match[0] if match else None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
