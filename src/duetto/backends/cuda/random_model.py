"""A backend over weights that are drawn on the device, with KV and clocks: what is measured."""

from duetto.backends.cuda.arena import CudaArena
from duetto.backends.cuda.backend import CudaBackend
from duetto.backends.cuda.formats import GpuQuantization
from duetto.backends.cuda.launch_times import LaunchTimes
from duetto.backends.cuda.limits import StepLimits
from duetto.backends.cuda.open import backend_of
from duetto.backends.cuda.random_weights import random_weights
from duetto.backends.cuda.stopwatch import watch_on
from duetto.program.dtype import Dtype, KVDtype
from duetto.program.program import Program


def random_model(
    program: Program,
    *,
    quantization: GpuQuantization | None,
    dtype: Dtype,
    kv_dtype: KVDtype,
    device: str,
    num_tokens: int,
    num_runs: int,
    num_blocks: int,
    block_size: int,
    runs: int = 5,
    records: bool = False,
) -> tuple[CudaBackend, CudaArena, LaunchTimes]:
    """For steps of at most these sizes. `records`: steps of next tokens are graphs, where there is
    a GPU."""
    watch = watch_on(device)
    weights = random_weights(program, dtype, quantization, watch.device)
    longest = num_blocks * block_size
    limits = StepLimits(num_tokens, num_runs, num_runs, longest, num_runs)
    opened = backend_of(program, weights, dtype, limits, watch.device, records=records)
    backend = opened.backend
    kv = backend.allocate_kv(num_blocks, block_size, kv_dtype)
    return backend, kv, LaunchTimes(program, backend, kv, watch, runs)
