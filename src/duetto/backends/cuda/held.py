"""What a GPU backend holds between steps beside weights and KV. How much that is, sizes.py says."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from duetto.backends.cuda.kernels.merge import Partials, allocate_partials
from duetto.backends.cuda.kernels.rope_write import Rotation
from duetto.backends.cuda.limits import StepLimits
from duetto.backends.cuda.sizes import BufferSize, buffer_sizes, most_partials, parts_of
from duetto.program.ops import Rope, RopeSpec
from duetto.program.program import Program


def allocate_buffers(
    program: Program, limits: StepLimits, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Tensor]:
    def empty(size: BufferSize) -> Tensor:
        rows = limits.num_logit_rows if size.is_selected else limits.num_tokens
        kept = torch.float32 if size.is_float else dtype
        return torch.empty(rows, size.width, dtype=kept, device=device)

    return {name: empty(size) for name, size in buffer_sizes(program).items()}


def make_rotations(program: Program, device: torch.device) -> Mapping[RopeSpec, Rotation]:
    """Sines and cosines of every position, with the roundings that RopeSpec names."""
    specs = dict.fromkeys(op.spec for op in parts_of(program) if isinstance(op, Rope))
    return {spec: _rotation(spec, program.max_model_len, device) for spec in specs}


def _rotation(spec: RopeSpec, num_positions: int, device: torch.device) -> Rotation:
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * np.array(spec.inv_freq, np.float32)).astype(np.float64)
    cos, sin = (
        torch.from_numpy((of(angles) * spec.scale).astype(np.float32)) for of in (np.cos, np.sin)
    )
    return Rotation(cos.to(device), sin.to(device))


def make_partials(program: Program, limits: StepLimits, device: torch.device) -> Partials:
    """For the layers whose heads take the most."""
    num_heads, head_dim = most_partials(program)
    return allocate_partials(
        limits.num_few_tokens, num_heads, head_dim, limits.max_model_len, device
    )
