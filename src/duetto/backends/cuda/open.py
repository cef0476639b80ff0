"""A program on a device: its weights brought there, products that were checked, graphs recorded.

Where the parts of this room are joined, for who has a checkpoint. Knows no kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.graphs import CudaRecorder
from duetto.backends.cuda.library import Products, check_products, scratch_numbers
from duetto.backends.cuda.limits import StepLimits
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.weights import CudaWeights, StoredWeights, load_on_device
from duetto.core.errors import ConfigError
from duetto.program.dtype import Dtype
from duetto.program.ops import Activation, GatedAct, Linear
from duetto.program.program import Program
from duetto.program.rewrites.runs import GPU_RUNS, GatedLinear, fuse_runs
from duetto.program.shape import SELECTED


class OpenedBackend(NamedTuple):
    backend: CudaBackend
    notes: list[str]  # for people: what was found of the library


def open_backend(
    checkpoint: StoredWeights,
    program: Program,
    dtype: Dtype,
    formats: Mapping[str, GpuFormat],
    limits: StepLimits,
    device_name: str,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    records: bool = True,
) -> OpenedBackend:
    """`records` steps of next tokens, as graphs.

    Raises ConfigError for what has no kernel, and where the device refuses memory."""
    device = torch.device(device_name)
    weights = load_on_device(checkpoint, program, dtype, formats, device, on_progress)
    return backend_of(program, weights, dtype, limits, device, records=records)


def backend_of(
    program: Program,
    weights: CudaWeights,
    dtype: Dtype,
    limits: StepLimits,
    device: torch.device,
    *,
    records: bool = True,
) -> OpenedBackend:
    """As open_backend, over weights that are on the device."""
    if device.type != "cuda":  # the interpreter: the library there is another one
        return OpenedBackend(CudaBackend(program, weights, dtype, limits, device), [])
    try:
        products, notes = _checked_products(program, weights, dtype, limits, device)
        recorder = CudaRecorder() if records else None
        backend = CudaBackend(
            program, weights, dtype, limits, device, recorder=recorder, multiply=products
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--backend cuda: {device} refuses memory for what steps need: "
            f"{str(error).splitlines()[0]}; lower --max-num-batched-tokens or --max-num-seqs, or "
            f"end who else uses it"
        ) from None
    return OpenedBackend(backend, notes)


def _checked_products(
    program: Program,
    weights: CudaWeights,
    dtype: Dtype,
    limits: StepLimits,
    device: torch.device,
) -> tuple[Products, list[str]]:
    """The library's products where they have our bits; what the checking took is given back."""
    pairs = list(_products_of(program, weights))
    kept = getattr(torch, dtype)
    facts = check_products(pairs, kept)
    torch.cuda.empty_cache()
    scratch = torch.empty(scratch_numbers(pairs, limits.num_tokens), dtype=kept, device=device)
    told = "; ".join(facts.in_words())
    return Products(facts, scratch), [told] if told else []


def _products_of(
    program: Program, weights: CudaWeights
) -> Iterator[tuple[Matrix, Activation | None]]:
    """Of all rows: those of the logits are few."""
    for op in fuse_runs(program, GPU_RUNS).ops:
        if isinstance(op, GatedLinear):
            linear, act = op.parts
            assert isinstance(linear, Linear) and isinstance(act, GatedAct)
            yield weights.matrices[linear.weight], act.act
        elif isinstance(op, Linear) and op.rows != SELECTED:
            yield weights.matrices[op.weight], None
