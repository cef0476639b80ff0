"""Small models on the GPU backend, in the interpreter or on a GPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from kernels.device import DEVICE
from numpy.typing import NDArray

from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.graphs import Recorder
from duetto.backends.cuda.limits import StepLimits
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.weights import CudaWeights
from duetto.program.program import Program


def plain_weights(program: Program, weights: Mapping[str, NDArray[Any]], dtype: str) -> CudaWeights:
    """Matrices in `dtype`, vectors in fp32."""
    matrices, vectors = {}, {}
    for name, weight in weights.items():
        tensor = torch.from_numpy(np.asarray(weight, np.float32)).to(DEVICE)
        if tensor.dim() == 1:
            vectors[name] = tensor
        else:
            kept = tensor.to(getattr(torch, dtype)).contiguous()
            matrices[name] = Matrix(GpuFormat(dtype), tuple(weight.shape), kept)
    return CudaWeights(matrices, vectors)


def backend_of(
    program: Program,
    weights: Mapping[str, NDArray[Any]],
    dtype: str = "float32",
    *,
    recorder: Recorder | None = None,
    num_tokens: int = 512,
    num_rows: int = 8,
) -> CudaBackend:
    limits = StepLimits(num_tokens, num_rows, num_rows, program.max_model_len, num_rows)
    held = plain_weights(program, weights, dtype)
    return CudaBackend(program, held, dtype, limits, DEVICE, recorder=recorder)
