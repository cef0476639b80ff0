"""A kernel as it is compiled for one set of types and sizes: what the table of kernels lists.

Each file of this folder that has kernels has a function `variants() -> Iterator[KernelVariant]`:
those that models of usual shapes launch, with their tiles. `tools/kernel_table.py` compiles them
without a GPU. Knows neither torch nor Triton.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    name: str  # unique in its file: types and sizes, as "bf16, 16 tokens, K 4096"
    kernel: Any  # what @triton.jit gave
    # Of each argument that is known at a launch only: "*bf16", "*i32", "i32", "fp32", ...
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]  # of the launch: num_warps, num_stages, enable_fp_fusion
    # Whole numbers that launches give as multiples of 16, of which Triton makes use. Pointers are
    # taken as aligned to 16 bytes, as torch's are.
    multiples_of_16: tuple[str, ...] = ()
    least_capability: int = 80  # 89 for what needs fp8
    capabilities: tuple[int, ...] = ()  # of those that it is chosen on; (): all
