"""Weights that are drawn on the device, for who measures: no checkpoint is read."""

import torch

from duetto.backends.cuda.formats import (
    GpuFormat,
    GpuQuantization,
    choose_gpu_formats,
    num_groups,
)
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.weights import CudaWeights, allocate_weights
from duetto.program.dtype import Dtype
from duetto.program.program import Program

_LARGEST = {"int8": 127, "int4": 8}


def random_weights(
    program: Program, dtype: Dtype, quantization: GpuQuantization | None, device: torch.device
) -> CudaWeights:
    """In the formats that a checkpoint's would have: matrices about 1 / sqrt(inputs) large,
    vectors of ones."""
    formats = choose_gpu_formats(program, dtype, quantization)
    weights = allocate_weights(program, formats, device)
    for matrix in weights.matrices.values():
        fill_randomly(matrix)
    for vector in weights.vectors.values():
        vector.fill_(1.0)
    return weights


def random_matrix(
    format: GpuFormat, num_outputs: int, num_inputs: int, device: torch.device
) -> Matrix:
    kind, columns, scales = format.kind, num_inputs, None
    if format.group:
        groups = num_groups(format, num_inputs)
        scales = torch.empty(groups, num_outputs, device=device).t()
        columns = groups * format.group // 2 if kind == "int4" else num_inputs
    elif kind == "fp8":
        scales = torch.empty(num_outputs, device=device)
    dtypes = {"int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    dtype = dtypes.get(kind) or getattr(torch, kind)
    data = torch.empty(num_outputs, columns, dtype=dtype, device=device)
    matrix = Matrix(format, (num_outputs, num_inputs), data, scales)
    fill_randomly(matrix)
    return matrix


def fill_randomly(matrix: Matrix) -> None:
    kind, size = matrix.format.kind, matrix.shape[1] ** -0.5
    if kind == "int8":
        matrix.data.random_(-127, 128)
    elif kind == "int4":
        matrix.data.random_(0, 256)
    elif kind == "fp8":
        numbers = torch.empty(matrix.data.shape, dtype=torch.float16, device=matrix.data.device)
        matrix.data.copy_(numbers.normal_())
    else:
        matrix.data.normal_(0.0, size)
    if matrix.scales is not None:
        matrix.scales.uniform_(0.0, 2 * size / _LARGEST.get(kind, 2))
