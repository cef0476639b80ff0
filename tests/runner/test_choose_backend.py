"""Which backend runs: cuda where there is a GPU, and what the backends refuse by name."""

import sys

import pytest
from backends.cuda.test_device import USABLE

from duetto.backends.cuda import device
from duetto.backends.cuda.device import GpuFacts, gpu_of
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.runner.choose_backend import choose_backend


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(device, "probe_gpu", lambda: USABLE)


def without_gpu(monkeypatch, **facts):
    monkeypatch.setattr(device, "probe_gpu", lambda: GpuFacts(**facts))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_is_there_is_used(with_gpu, name):
    chosen = choose_backend(EngineArgs(backend=name))
    assert (chosen.name, chosen.gpu, chosen.notes) == ("cuda", gpu_of(USABLE), [])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_gpu_is_not_looked_for_where_the_host_was_asked_for(monkeypatch, name):
    def never():
        raise AssertionError("the GPU was probed")

    monkeypatch.setattr(device, "probe_gpu", never)
    chosen = choose_backend(EngineArgs(backend=name))
    assert (chosen.name, chosen.gpu) == (name, None)


def test_without_a_gpu_auto_is_the_host_and_says_nothing(monkeypatch):
    without_gpu(monkeypatch)
    chosen = choose_backend(EngineArgs())
    assert chosen.name in ("cpu", "reference") and chosen.gpu is None
    assert not [note for note in chosen.notes if "GPU" in note]


def test_a_gpu_that_cannot_be_used_is_told_where_nobody_asked_for_it(monkeypatch):
    without_gpu(monkeypatch, driver="13.0", devices=USABLE.devices, triton="3.6.0")
    chosen = choose_backend(EngineArgs())
    assert chosen.gpu is None
    assert chosen.notes[0] == (
        "the GPU is not used: torch is not installed: pip install 'duetto[cuda]'"
    )
    with pytest.raises(ConfigError, match="--backend cuda: torch is not installed"):
        choose_backend(EngineArgs(backend="cuda"))


def test_the_interpreter_is_used_where_it_was_asked_for_by_name(monkeypatch):
    without_gpu(monkeypatch, torch="2.13.0+cpu", triton="3.6.0", is_interpreted=True)
    assert choose_backend(EngineArgs()).gpu is None
    assert choose_backend(EngineArgs(backend="cuda")).gpu.is_interpreter


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"threads": 4}, "--threads 4 and the cuda backend: a GPU computes"),
        ({"packed_cache": "/tmp/x"}, "--packed-cache /tmp/x and the cuda backend: weights go"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_what_a_gpu_has_no_use_for_is_refused(with_gpu, name, flags, message):
    with pytest.raises(ConfigError, match=f"^{message}.*--backend cpu"):
        choose_backend(EngineArgs(backend=name, **flags))


def test_weights_need_not_be_kept_for_the_next_start_on_a_gpu(with_gpu):
    assert choose_backend(EngineArgs(packed_cache="off")).name == "cuda"


@pytest.mark.parametrize(
    "flags",
    [{"gpu_memory_utilization": 0.5}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}],
)
@pytest.mark.parametrize(
    ("name", "why"),
    [("auto", "there is no NVIDIA driver"), ("reference", "this is --backend reference")],
)
def test_what_only_a_gpu_has_is_refused_elsewhere(monkeypatch, name, why, flags):
    without_gpu(monkeypatch)
    ((option, value),) = flags.items()
    flag = option.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^--{flag} {value}: is for --backend cuda, but {why}"):
        choose_backend(EngineArgs(backend=name, **flags))


@pytest.mark.parametrize("part", [0, -0.1, 1.01, "much", True])
def test_the_part_of_memory_is_a_part(part):
    with pytest.raises(
        ConfigError, match="--gpu-memory-utilization: must be above 0 and at most 1"
    ):
        EngineArgs(gpu_memory_utilization=part)


def test_choosing_loads_no_torch(monkeypatch):
    without_gpu(monkeypatch)
    choose_backend(EngineArgs())
    assert "torch" not in sys.modules and "triton" not in sys.modules
