"""Which GPU there is, why it cannot be used, and how much of its memory may be taken.

The driver is asked directly, so that a machine without a GPU never imports torch: this is the one
file of this room that can be imported without it. What was probed are plain facts, and what they
mean is said by functions of them. Knows no program and no kernel.
"""

import ctypes
import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from duetto.core.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
INSTALL = "pip install 'duetto[cuda]'"
INTERPRETER = "Triton's interpreter"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_LEAST_FREE_BYTES = 2**30  # with less, no model of any use starts
_GIB = 2**30


class DriverDevice(NamedTuple):
    """A GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What was probed. Of the devices, torch takes the first that it may see."""

    driver: str | None = None  # the newest CUDA that it runs, as 13.0; None: there is no driver
    driver_error: int = 0  # what it said when it was started: a CUDA error
    devices: tuple[DriverDevice, ...] = ()
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    torch: str | None = None  # its version; None: not installed
    torch_cuda: str | None = None  # the CUDA that it was built with; only asked beside a GPU
    torch_error: str | None = None  # what it said when it was to use the GPU
    triton: str | None = None
    free_bytes: int | None = None  # of the first device; only asked if torch can use it
    is_interpreted: bool = False  # TRITON_INTERPRET=1: kernels run on the CPU, to be tested


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that can be used."""

    device: str  # as torch names it
    name: str
    capability: tuple[int, int]
    memory_bytes: int  # all that there is
    free_bytes: int
    multiprocessors: int
    driver: str
    torch: str
    triton: str

    @property
    def is_interpreter(self) -> bool:
        return self.device == "cpu"

    @property
    def computed_by(self) -> str:
        """Whatever decides the last bits: they hold on one type of GPU, under one compiler."""
        if self.is_interpreter:
            return f"cuda/interpreter/triton-{self.triton}"
        kind = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        major, minor = self.capability
        return f"cuda/sm_{major}{minor}/{kind}/triton-{self.triton}"


def find_gpu() -> Gpu:
    """The GPU to be used. Raises ConfigError, in one line, if there is none that could be."""
    facts = probe_gpu()
    if (why := why_unusable(facts)) is not None:
        raise ConfigError(f"--backend cuda: {why}")
    return gpu_of(facts)


def why_not_of_itself(facts: GpuFacts) -> str | None:
    """Why no GPU is used where none was asked for by name."""
    if facts.is_interpreted:
        return "TRITON_INTERPRET is set: kernels would be interpreted, which is for tests"
    return why_unusable(facts)


def gpu_of(facts: GpuFacts) -> Gpu:
    """Of facts with which it is usable."""
    torch, triton = facts.torch or "", facts.triton or ""
    if facts.is_interpreted:
        return Gpu("cpu", INTERPRETER, (0, 0), 0, 0, 1, "none", torch, triton)
    name, capability, memory_bytes, multiprocessors = facts.devices[0]
    free, driver = facts.free_bytes or 0, facts.driver or ""
    sizes = memory_bytes, free, multiprocessors
    return Gpu("cuda:0", name, capability, *sizes, driver, torch, triton)


def why_unusable(facts: GpuFacts) -> str | None:
    """What is missing, and what would help; None if a GPU can be used."""
    if not facts.is_interpreted and (why := _why_no_device(facts)) is not None:
        return why
    for package, found in (("torch", facts.torch), ("triton", facts.triton)):
        if found is None:
            return f"{package} is not installed: {INSTALL}"
    return None if facts.is_interpreted else _why_refused(facts)


def _why_no_device(facts: GpuFacts) -> str | None:
    if facts.driver is None:
        return (
            "there is no NVIDIA driver (libcuda.so.1): install one, or give the container its GPU "
            "(docker run --gpus all); --backend cpu needs none"
        )
    if facts.driver_error not in (0, _NO_DEVICE):
        return (
            f"the NVIDIA driver does not start (CUDA error {facts.driver_error}): see what "
            f"nvidia-smi says; a restart of the machine often helps after an update of the driver"
        )
    if not facts.devices:
        hidden = facts.visible is not None
        told = (
            f"CUDA_VISIBLE_DEVICES is {facts.visible!r}: unset it" if hidden else "see nvidia-smi"
        )
        return f"the NVIDIA driver shows no GPU; {told}, or take --backend cpu"
    device = facts.devices[0]
    if device.capability < LEAST_CAPABILITY:
        major, minor = device.capability
        return (
            f"{device.name} has compute capability {major}.{minor}: it has no matrix instruction "
            f"for bf16; 8.0 (A100, RTX 30) and newer do"
        )
    return None


def _why_refused(facts: GpuFacts) -> str | None:
    """Of torch and a device that are both there."""
    if facts.torch_cuda is None:
        return (
            f"torch {facts.torch} was built without CUDA: install a build with it "
            f"(https://pytorch.org/get-started/locally)"
        )
    driver = facts.driver or ""
    if _major(driver) < _major(facts.torch_cuda):
        return (
            f"the NVIDIA driver is too old: it runs CUDA {driver}, and torch {facts.torch} was "
            f"built for {facts.torch_cuda}; update the driver, or install a torch for CUDA "
            f"{_major(driver)}"
        )
    device = facts.devices[0]
    if facts.torch_error is not None:
        return f"torch {facts.torch} cannot use {device.name}: {facts.torch_error}"
    if facts.free_bytes is not None and facts.free_bytes < _LEAST_FREE_BYTES:
        return (
            f"{device.name} is in use: {_gib(facts.free_bytes)} of its {_gib(device.memory_bytes)} "
            f"are free; nvidia-smi shows who has the rest, and CUDA_VISIBLE_DEVICES takes another"
        )
    return None


def usable_memory_bytes(gpu: Gpu, utilization: float) -> int:
    """What may be taken: a part of all memory, less what is taken already, by whomever. Raises
    ConfigError, with the numbers, if that is nothing."""
    taken = gpu.memory_bytes - gpu.free_bytes
    usable = int(gpu.memory_bytes * utilization) - taken
    if usable > 0:
        return usable
    raise ConfigError(
        f"--gpu-memory-utilization {utilization:g}: of the {_gib(gpu.memory_bytes)} of {gpu.name}, "
        f"{_gib(taken)} are taken already; end who has them (nvidia-smi shows it), or take another "
        f"GPU with CUDA_VISIBLE_DEVICES"
    )


def probe_gpu() -> GpuFacts:
    """Imports torch only if it is installed, and the driver has a GPU for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    driver, error, devices = _ask_driver()
    torch_cuda = torch_error = free_bytes = None
    if devices and not is_interpreted and find_spec("torch") is not None:
        torch_cuda, torch_error, free_bytes = _ask_torch()
    return GpuFacts(
        driver=driver,
        driver_error=error,
        devices=devices,
        visible=visible,
        torch=_version("torch"),
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        triton=_version("triton") or _version("pytorch-triton"),
        free_bytes=free_bytes,
        is_interpreted=is_interpreted,
    )


def _ask_driver() -> tuple[str | None, int, tuple[DriverDevice, ...]]:
    """Its version, the error of its start, and its devices."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, 0, ()
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if (error := int(cuda.cuInit(0))) != 0:
        return version, error, ()
    cuda.cuDeviceGetCount(ctypes.byref(number))
    return version, 0, tuple(_describe(cuda, i) for i in range(number.value))


def _describe(cuda: ctypes.CDLL, index: int) -> DriverDevice:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    # CU_DEVICE_ATTRIBUTE_ of: COMPUTE_CAPABILITY_MAJOR, _MINOR, MULTIPROCESSOR_COUNT
    capability = attribute(75), attribute(76)
    return DriverDevice(name.value.decode(), capability, memory.value, attribute(16))


def _ask_torch() -> tuple[str | None, str | None, int | None]:
    """The CUDA that it was built with, what goes wrong if it is to use the device, and the bytes
    that are free there once it does."""
    try:
        torch = import_module("torch")
    except Exception as error:  # a library that it needs is missing, say
        return "", _first_line(error), None
    if (cuda := torch.version.cuda) is None:
        return None, None, None
    try:
        free, _ = torch.cuda.mem_get_info(0)
    except Exception as error:  # of whatever kind: it is told
        return cuda, _first_line(error), None
    return cuda, None, int(free)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _major(text: str) -> int:
    return int(text.partition(".")[0] or 0)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
