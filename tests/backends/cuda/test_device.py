"""What was probed of a GPU, in words: each reason why it cannot be used says what would help."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from duetto.backends.cuda import device as device_module
from duetto.backends.cuda.device import (
    INTERPRETER,
    DriverDevice,
    GpuFacts,
    find_gpu,
    gpu_of,
    usable_memory_bytes,
    why_unusable,
)
from duetto.core.errors import ConfigError

GIB = 2**30
H100 = DriverDevice("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 132)
USABLE = GpuFacts(
    driver="13.0",
    devices=(H100,),
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    triton="3.6.0",
    free_bytes=79 * GIB,
)
T4 = DriverDevice("Tesla T4", (7, 5), 15 * GIB, 40)


def test_a_gpu_with_all_that_it_needs_is_usable():
    assert why_unusable(USABLE) is None
    gpu = gpu_of(USABLE)
    assert (gpu.device, gpu.name, gpu.capability) == ("cuda:0", H100.name, (9, 0))
    assert (gpu.memory_bytes, gpu.free_bytes, gpu.multiprocessors) == (80 * GIB, 79 * GIB, 132)
    assert gpu.computed_by == "cuda/sm_90/nvidia-h100-80gb-hbm3/triton-3.6.0"


@pytest.mark.parametrize(
    ("changes", "reason", "help"),
    [
        ({"driver": None, "devices": ()}, "there is no NVIDIA driver", "--gpus all"),
        ({"driver_error": 803, "devices": ()}, "does not start (CUDA error 803)", "nvidia-smi"),
        ({"driver_error": 100, "devices": ()}, "shows no GPU", "see nvidia-smi"),
        ({"devices": (), "visible": ""}, "CUDA_VISIBLE_DEVICES is ''", "unset it"),
        ({"devices": (T4,)}, "Tesla T4 has compute capability 7.5", "8.0"),
        ({"torch": None}, "torch is not installed", "duetto[cuda]"),
        ({"triton": None}, "triton is not installed", "duetto[cuda]"),
        ({"torch_cuda": None}, "built without CUDA", "https://pytorch.org"),
        ({"driver": "12.8"}, "driver is too old: it runs CUDA 12.8", "torch for CUDA 12"),
        ({"torch_error": "no kernel image"}, "cannot use NVIDIA H100", "no kernel image"),
        ({"free_bytes": GIB // 2}, "in use: 0.5 GiB of its 80.0 GiB are free", "nvidia-smi"),
    ],
)
def test_whatever_is_missing_is_named_with_what_would_help(changes, reason, help):
    why = why_unusable(replace(USABLE, **changes))
    assert why is not None and reason in why and help in why
    assert "\n" not in why


@pytest.mark.parametrize("driver", ["13.0", "13.3", "14.1"])
def test_a_driver_may_be_newer_than_torch_asks(driver):
    assert why_unusable(replace(USABLE, driver=driver)) is None


def test_a_minor_version_of_cuda_does_not_make_a_driver_too_old():
    """https://docs.nvidia.com/deploy/cuda-compatibility: within a major version, any driver."""
    assert why_unusable(replace(USABLE, driver="12.4", torch_cuda="12.8")) is None


def test_the_interpreter_needs_torch_and_triton_only():
    facts = GpuFacts(torch="2.13.0+cpu", triton="3.6.0", is_interpreted=True)
    assert why_unusable(facts) is None
    gpu = gpu_of(facts)
    assert gpu.is_interpreter and gpu.name == INTERPRETER
    assert gpu.computed_by == "cuda/interpreter/triton-3.6.0"
    assert "torch is not installed" in why_unusable(replace(facts, torch=None))


def test_usable_memory_is_a_part_of_all_less_what_is_taken():
    gpu = gpu_of(replace(USABLE, free_bytes=70 * GIB))
    assert usable_memory_bytes(gpu, 0.9) == 62 * GIB
    assert usable_memory_bytes(gpu, 1.0) == 70 * GIB
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 0\.1: .* 10\.0 GiB are taken"):
        usable_memory_bytes(gpu, 0.1)


def test_no_gpu_is_a_config_error_of_one_line(monkeypatch):
    monkeypatch.setattr(device_module, "probe_gpu", lambda: GpuFacts())
    with pytest.raises(ConfigError, match="--backend cuda: there is no NVIDIA driver") as error:
        find_gpu()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(device_module, "probe_gpu", lambda: USABLE)
    assert find_gpu() == gpu_of(USABLE)


def test_probing_without_a_driver_loads_no_torch():
    """The driver is looked for where there is none, whatever this machine has."""
    check = (
        "import ctypes, sys, duetto.backends.cuda.device as device\n"
        "def missing(name): raise OSError(name)\n"
        "ctypes.CDLL = missing\n"
        "facts = device.probe_gpu()\n"
        "assert facts.driver is None and facts.devices == (), facts\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


class FakeDriver:
    """libcuda with one device, through ctypes' pointers."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def cuDriverGetVersion(self, out) -> None:
        out._obj.value = 13010

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, out) -> None:
        out._obj.value = 1

    def cuDeviceGet(self, out, index: int) -> None:
        out._obj.value = index

    def cuDeviceGetName(self, out, length: int, device) -> None:
        out.value = b"NVIDIA A100"

    def cuDeviceTotalMem_v2(self, out, device) -> None:
        out._obj.value = 40 * GIB

    def cuDeviceGetAttribute(self, out, number: int, device) -> None:
        out._obj.value = {75: 8, 76: 0, 16: 108}[number]


def test_the_driver_is_asked_for_its_devices(monkeypatch):
    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)
    facts = device_module.probe_gpu()
    assert facts.driver == "13.1" and facts.driver_error == 0
    assert facts.devices == (DriverDevice("NVIDIA A100", (8, 0), 40 * GIB, 108),)


def test_a_driver_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: FakeDriver(error=803))
    facts = device_module.probe_gpu()
    assert (facts.driver, facts.driver_error, facts.devices) == ("13.1", 803, ())


class FakeCuda:
    def __init__(self, error: str | None) -> None:
        self.error = error

    def mem_get_info(self, device: int) -> tuple[int, int]:
        if self.error is not None:
            raise RuntimeError(f"{self.error}\nand more lines")
        return 70 * GIB, 80 * GIB


@pytest.mark.parametrize(
    ("built", "error", "found"),
    [
        ("13.0", None, ("13.0", None, 70 * GIB)),
        ("13.0", "CUDA error: out of memory", ("13.0", "CUDA error: out of memory", None)),
        (None, None, (None, None, None)),
    ],
)
def test_torch_is_asked_beside_a_device(monkeypatch, built, error, found):
    torch = SimpleNamespace(version=SimpleNamespace(cuda=built), cuda=FakeCuda(error))
    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(device_module, "find_spec", lambda name: object())
    monkeypatch.setattr(device_module, "import_module", lambda name: torch)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    facts = device_module.probe_gpu()
    assert (facts.torch_cuda, facts.torch_error, facts.free_bytes) == found
