"""Whole models from a checkpoint, quantized: as the reference with the numbers that are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels.device import DEVICE
from oracle.cases import CASES_BY_NAME
from oracle.fixture_io import write_checkpoint

from duetto.backends.backend import Backend, StepArrays
from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.formats import choose_gpu_formats
from duetto.backends.cuda.kernels.linear import widened_matrix
from duetto.backends.cuda.limits import StepLimits
from duetto.backends.cuda.weights import load_on_device
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.models.programs import load_program


def logits(backend: Backend, num_tokens: int, steps: tuple[int, ...]) -> np.ndarray:
    """Of all tokens of one request, which is computed in some steps."""
    kv, found, start = backend.allocate_kv(8, 8, "float32"), [], 0
    ids = np.random.default_rng(1).integers(0, 199, num_tokens)
    for count in steps:
        places = np.arange(start, start + count)
        arrays = (ids[places], places, places, [0, count], [start + count], [range(8)])
        step = StepArrays(*(np.array(a, np.int32) for a in (*arrays, range(count))))
        found.append(backend.run(step, kv))
        start += count
    assert start == num_tokens
    return np.concatenate(found)


# Gemma 2 has tied embeddings, Qwen 2 biases.
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("gemma2", "int8"), ("gemma2", "fp8"), ("qwen2-window", "int4"), ("gemma2", "int4")],
)
def test_a_quantized_model(tmp_path: Path, name: str, quantization: Any) -> None:
    write_checkpoint(CASES_BY_NAME[name], tmp_path)
    _, program = load_program(tmp_path)
    formats = choose_gpu_formats(program, "float32", quantization)
    with Checkpoint(tmp_path, program) as checkpoint:
        weights = load_on_device(checkpoint, program, "float32", formats, DEVICE)
    assert {m.format for m in weights.matrices.values()} == set(formats.values())
    limits = StepLimits(64, 4, 64, program.max_model_len, 4)
    backend = CudaBackend(program, weights, "float32", limits, DEVICE)
    kept = {key: widened_matrix(m).cpu().numpy() for key, m in weights.matrices.items()}
    kept |= {key: vector.cpu().numpy() for key, vector in weights.vectors.items()}
    whole = logits(backend, 14, (14,))
    wanted = logits(ReferenceBackend(program, kept), 14, (14,))
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=5e-5)  # sums in fp32, of up to 10
    np.testing.assert_array_equal(logits(backend, 14, (9, 1, 4)), whole)
