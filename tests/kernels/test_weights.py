"""Weights from a checkpoint into the arena: every number, every byte, and what is refused."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from kernels.device import DEVICE
from oracle.cases import CASES_BY_NAME
from oracle.fixture_io import write_checkpoint
from safetensors.numpy import load_file, save_file
from torch import Tensor

from duetto.backends.cuda import weights as weights_module
from duetto.backends.cuda.formats import choose_gpu_formats, device_weight_bytes
from duetto.backends.cuda.quantize import put_rows
from duetto.backends.cuda.weights import CudaWeights, allocate_weights, load_on_device
from duetto.checkpoints.checkpoint import Checkpoint, Weights, load_weights
from duetto.core.errors import CheckpointError, ConfigError
from duetto.models.programs import load_program
from duetto.program.program import Program

NAMES = ("llama-biases", "gemma2", "qwen3-biases-window", "phi3")
KINDS = [(None, "bfloat16"), (None, "float32"), (None, "float16"), ("int8", "float16")]
KINDS += [("int4", "bfloat16"), ("fp8", "float32")]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_PART_BYTES", 2000)


@cache
def written(name: str) -> tuple[TemporaryDirectory[str], Program]:
    directory = TemporaryDirectory()
    write_checkpoint(CASES_BY_NAME[name], Path(directory.name))
    return directory, load_program(Path(directory.name))[1]


def load(name: str, dtype: Any, quantization: Any = None, **options: Any) -> CudaWeights:
    directory, program = written(name)
    formats = choose_gpu_formats(program, dtype, quantization)
    with Checkpoint(Path(directory.name), program) as checkpoint:
        return load_on_device(checkpoint, program, dtype, formats, DEVICE, **options)


def at_once(name: str, dtype: Any) -> Weights:
    directory, program = written(name)
    return load_weights(Path(directory.name), program, dtype)


def tensor_of(array: np.ndarray) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_what_is_loaded_is_what_the_checkpoint_holds(
    name: str, quantization: Any, dtype: Any
) -> None:
    program, arrays = written(name)[1], at_once(name, dtype)
    formats = choose_gpu_formats(program, dtype, quantization)
    loaded, wanted = load(name, dtype, quantization), allocate_weights(program, formats, DEVICE)
    assert loaded.matrices.keys() == formats.keys()
    assert loaded.vectors.keys() == arrays.keys() - formats.keys()
    for key, matrix in loaded.matrices.items():
        put_rows(tensor_of(arrays[key]), wanted.matrices[key], 0)
        assert matrix[:2] == (formats[key], arrays[key].shape)
        assert torch.equal(bits(matrix.data), bits(wanted.matrices[key].data))
        if matrix.scales is not None:
            assert torch.equal(matrix.scales, wanted.matrices[key].scales)
        if quantization is None:
            assert torch.equal(matrix.data, tensor_of(arrays[key]))
    for key, vector in loaded.vectors.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, tensor_of(arrays[key]).float())


@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_the_bytes_are_those_that_were_said_before(quantization: Any, dtype: Any) -> None:
    program = written("llama-biases")[1]
    formats = choose_gpu_formats(program, dtype, quantization)
    weights = allocate_weights(program, formats, DEVICE)
    tensors = [*weights.vectors.values(), *(m.data for m in weights.matrices.values())]
    tensors += [m.scales for m in weights.matrices.values() if m.scales is not None]
    taken = device_weight_bytes(program, formats)
    assert {t.untyped_storage().nbytes() for t in tensors} == {taken}
    begin = tensors[0].untyped_storage().data_ptr()
    places = sorted((t.data_ptr() - begin, t.nbytes) for t in tensors)
    for (start, size), (following, _) in zip(places, [*places[1:], (taken, 0)], strict=True):
        assert start % 256 == 0
        assert start + size <= following < start + size + 256  # no two overlap, and no gaps
    assert weights.num_bytes == sum(size for _, size in places)


def test_progress_is_in_bytes_of_the_checkpoint() -> None:
    calls: list[tuple[int, int]] = []
    load("phi3", "bfloat16", on_progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in at_once("phi3", "bfloat16").values())
    assert len(calls) > 20
    assert calls == sorted(set(calls))
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_number_that_is_none_is_told_with_its_place(
    tmp_path: Path, tensor: str, bad: float, quantization: Any
) -> None:
    write_checkpoint(CASES_BY_NAME["llama-biases"], tmp_path)
    _, program = load_program(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor].reshape(len(tensors[tensor]), -1)[-1, 0] = bad
            save_file(tensors, file)
    formats = choose_gpu_formats(program, "float32", quantization)
    with (
        Checkpoint(tmp_path, program) as checkpoint,
        pytest.raises(CheckpointError, match=rf"{tensor} holds {bad} at \["),
    ):
        load_on_device(checkpoint, program, "float32", formats, DEVICE)


def test_a_device_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "device_weight_bytes", lambda *_: 1 << 60)
    with pytest.raises(ConfigError, match=rf"{DEVICE} refuses 1099511627776 MiB for the weights"):
        load("phi3", "bfloat16")


def test_a_file_that_ends_while_it_is_read_is_told(tmp_path: Path) -> None:
    write_checkpoint(CASES_BY_NAME["llama-biases"], tmp_path)
    _, program = load_program(tmp_path)
    formats = choose_gpu_formats(program, "float32")
    with Checkpoint(tmp_path, program) as checkpoint:
        for file in tmp_path.glob("*.safetensors"):
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="was cut short"):
            load_on_device(checkpoint, program, "float32", formats, DEVICE)
