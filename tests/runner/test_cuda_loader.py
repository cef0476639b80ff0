"""What the GPU backend needs of a device, known where there is none, and without torch."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from backends.cuda.test_device import USABLE

from duetto.backends.cuda import device
from duetto.backends.cuda.device import gpu_of
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.program.activations import LargestStep
from duetto.program.ops import Attention
from duetto.program.program import Program
from duetto.runner.cuda_loader import CudaLoader
from duetto.runner.load import load_model, plan_model

GIB, MIB = 2**30, 2**20


def program_of(name: str) -> Program:
    return build_program(find_config(name), None)


def loader(program: Program, dtype="bfloat16", **flags) -> CudaLoader:
    return CudaLoader(program, dtype, EngineArgs(backend="cuda", **flags), gpu_of(USABLE))


@pytest.mark.parametrize(
    ("quantization", "bytes_per_number"),
    [("none", 2.0), ("int8", 1 + 4 / 128), ("fp8", 1.0), ("int4", 0.5 + 4 / 64)],
)
def test_weights_take_what_their_format_says(quantization, bytes_per_number):
    program = program_of("llama-3-8b")
    embedded = 128256 * 4096
    projected = program.num_parameters - embedded
    found = loader(program, quantization=quantization).weight_bytes
    want = 2 * embedded + bytes_per_number * projected
    if quantization == "int4":  # the projection to the logits is int8
        want += (1 + 4 / 128 - bytes_per_number) * embedded
    assert found == pytest.approx(want, rel=2e-3)


def test_what_steps_need_grows_with_what_a_step_may_hold():
    program = program_of("llama-3-8b")
    usual = loader(program).held_bytes(32, "bfloat16")
    assert 256 * MIB < usual < 1 * GIB
    for more in ({"max_num_batched_tokens": 4096}, {"max_num_seqs": 256}):
        assert loader(program, **more).held_bytes(32, "bfloat16") > usual
    drafted = loader(program, speculative_config='{"method": "ngram", "num_speculative_tokens": 4}')
    assert drafted.held_bytes(32, "bfloat16") > usual
    assert loader(program).step_bytes(LargestStep(512, 64, 8192, 10**6), "bfloat16") == 0


def test_an_fp8_token_of_kv_has_a_scale_per_head():
    made = loader(program_of("llama-3-8b"))
    assert made.kv_block_bytes(16, "fp8") == 16 * 32 * 2 * 8 * (128 + 4)
    assert made.kv_block_bytes(16, "bfloat16") == 16 * 32 * 2 * 8 * 128 * 2


def test_bits_belong_to_a_device_and_a_compiler():
    made = loader(program_of("tiny"), "float16")
    assert made.computed_by == "cuda/sm_90/nvidia-h100-80gb-hbm3/triton-3.6.0"
    assert made.auto_kv_dtype == "float16"


def test_memory_is_the_devices():
    memory = loader(program_of("tiny"), gpu_memory_utilization=0.5).memory
    assert memory == ("NVIDIA H100 80GB HBM3", 80 * GIB, 39 * GIB)
    interpreted = replace(USABLE, is_interpreted=True)
    args = EngineArgs(backend="cuda")
    assert CudaLoader(program_of("tiny"), "float32", args, gpu_of(interpreted)).memory is None


def test_a_head_that_no_kernel_takes_is_refused_by_its_size():
    program = program_of("llama-3-8b")
    ops = tuple(replace(op, head_dim=72) if isinstance(op, Attention) else op for op in program.ops)
    with pytest.raises(ConfigError, match="heads of 72 numbers have no kernel; accepted: 16, 32"):
        loader(replace(program, ops=ops))


def test_a_plan_is_made_without_torch(monkeypatch):
    monkeypatch.setattr(device, "probe_gpu", lambda: USABLE)
    config = replace(find_config("llama-3-8b"), dtype="bfloat16")
    plan = plan_model(config, build_program(config, None), EngineArgs(backend="cuda"))
    assert plan.loader.name == "cuda" and plan.kv.num_blocks * 32 > 400_000
    assert "torch" not in sys.modules


def test_a_torch_that_is_not_there_is_named_before_weights_are_read(monkeypatch, tiny_model):
    monkeypatch.setattr(device, "probe_gpu", lambda: USABLE)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"--backend cuda: .*torch.*duetto\[cuda\]"):
        load_model(Path(tiny_model), EngineArgs(backend="cuda"))
