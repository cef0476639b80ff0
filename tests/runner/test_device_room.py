"""What a model may take of a GPU's memory: predicted, told, and refused with numbers."""

from dataclasses import replace

import pytest
from backends.cuda.test_device import USABLE
from fake_device import FakeDevice

from duetto.backends.cuda import device
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.program.kv_size import bytes_per_block
from duetto.runner import load as load_module
from duetto.runner.loaders import DeviceMemory, ReferenceLoader

GIB = 2**30
HELD = GIB // 2


class OnDevice(ReferenceLoader):
    """A loader of which only the sizes count: 16 bits a weight, half a GiB for steps."""

    name = "cuda"

    def __init__(self, program, dtype, args, gpu) -> None:
        super().__init__(program, "float32")
        self.auto_kv_dtype = dtype
        self.weight_bytes = 2 * program.num_parameters
        usable = device.usable_memory_bytes(gpu, args.gpu_memory_utilization or 0.9)
        self.memory = DeviceMemory(gpu.name, gpu.memory_bytes, usable)

    def held_bytes(self, block_size, kv_dtype):
        return HELD

    def step_bytes(self, step, kv_dtype):
        return 0


@pytest.fixture
def plan(monkeypatch):
    """Of an 8B on an H100, of which a GiB is taken already."""
    monkeypatch.setattr(load_module, "CudaLoader", OnDevice)
    monkeypatch.setattr(load_module, "available_memory_bytes", lambda: 2**20)  # never asked

    def planned(free=79 * GIB, **flags):
        monkeypatch.setattr(device, "probe_gpu", lambda: replace(USABLE, free_bytes=free))
        config = replace(find_config("llama-3-8b"), dtype="bfloat16")
        args = EngineArgs(backend="cuda", **flags)
        program = build_program(config, args.asked_len)
        return load_module.plan_model(config, program, args)

    return planned


def test_kv_takes_what_is_left_of_the_devices_memory(plan):
    made = plan()
    left = int(80 * GIB * 0.9) - GIB - made.loader.weight_bytes - HELD
    block = bytes_per_block(made.program, 32, "bfloat16")
    assert made.kv.num_blocks == left // block
    assert made.available_bytes == int(80 * GIB * 0.9) - GIB
    assert made.kv.max_model_len == 8192
    assert plan(gpu_memory_utilization=0.5).kv.num_blocks == (left - int(80 * GIB * 0.4)) // block


def test_where_memory_went_is_told(plan):
    (note,) = plan().notes
    assert note.startswith("NVIDIA H100 80GB HBM3: of 80.00 GiB, 71.00 GiB may be used")
    assert "weights 14.96 GiB" in note and "what steps need 0.50 GiB" in note


def test_a_model_that_does_not_fit_names_the_device_and_its_numbers(plan):
    message = r"--max-model-len 8192: .* \(NVIDIA H100 80GB HBM3: 15\.00 GiB may be used, weights"
    with pytest.raises(ConfigError, match=message):
        plan(free=23 * GIB)


def test_a_context_is_shortened_to_what_fits(plan):
    made = plan(free=23 * GIB + 800 * 2**20)
    assert made.kv.max_model_len == made.kv.num_blocks * 32 < 8192
    assert any("max_model_len is" in note for note in made.kv.notes)


def test_a_gpu_that_others_fill_is_refused(plan):
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 0\.9: .* 74\.0 GiB are taken"):
        plan(free=6 * GIB)


def test_kv_of_a_given_size_must_fit(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "probe_gpu", lambda: USABLE)
    config = find_config("tiny")
    program = build_program(config, None)
    monkeypatch.setattr(load_module, "load_program", lambda *_: (config, program))
    monkeypatch.setattr(load_module, "find_embedding_model", lambda *_, **__: (None, ()))
    args = EngineArgs(backend="cuda", kv_cache_memory_bytes=100 * GIB)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes: 100\.00 GiB are more than"):
        load_module.load_model(tmp_path, args)


class OutOfMemoryError(RuntimeError):
    """As torch's is named."""


def test_memory_that_the_device_refuses_is_one_line(plan):
    made = plan()

    class Full(FakeDevice):
        def allocate_kv(self, *given):
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(ConfigError, match=r"^--kv-cache-memory-bytes: NVIDIA H100 .* refuses \d+"):
        load_module._start(Full(None), made, {}, None, None, None)


def test_a_small_models_cache_has_no_more_blocks_than_can_be_kept(plan, monkeypatch):
    config = find_config("tiny")
    program = build_program(config, None)
    monkeypatch.setattr(device, "probe_gpu", lambda: USABLE)
    made = load_module.plan_model(config, program, EngineArgs(backend="cuda"))
    assert made.kv.num_blocks == 2**20
