"""What a deployment takes of each device's memory, and what is left for KV.

Bytes of the device with the least room for KV, as every stage has the same blocks. Sizes KV with
program/kv_size.py, as the engine does; allocates nothing and reads no weights.
"""

from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.pricing.cost_model import Deployment
from duetto.pricing.hardware import HardwareSpec
from duetto.program.activations import activation_bytes
from duetto.program.program import Program
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """One device's memory, or this host's, by use. `num_blocks` is 0 if not even the rest fits."""

    memory_bytes: int  # all of it
    usable_bytes: int  # the part that may be used; the rest is for drivers and fragments
    weight_bytes: int
    activation_bytes: int
    block_bytes: int  # of this device's layers and heads
    block_size: int
    num_blocks: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def fits(self) -> bool:
        """Whether there is room for KV, and for all of it beside the rest."""
        return self.num_blocks > 0 and self.left_bytes >= 0

    @property
    def left_bytes(self) -> int:
        """Of what is usable; below 0 if weights, activations and KV together are too large."""
        return self.usable_bytes - self.weight_bytes - self.activation_bytes - self.kv_bytes

    def num_requests(self, length: int) -> int:
        """How many requests of `length` tokens, answer included, have room at one time."""
        return num_requests(self.num_blocks, self.block_size, length)


def num_requests(num_blocks: int, block_size: int, length: int) -> int:
    """The last token of a request is never computed, so it needs no KV."""
    return num_blocks // max(1, -(-(length - 1) // block_size))


def size_in_words(num_bytes: int) -> str:
    """For people: 1.50 GiB, 12.0 MiB."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if abs(gib) >= 1 else f"{gib * 1024:.1f} MiB"


def fit_device(
    program: Program,
    hardware: HardwareSpec,
    deployment: Deployment,
    *,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    utilization: float,
) -> MemoryFit:
    """How a deployment fits; raises ConfigError for degrees that do not divide the model."""
    if not 0 < utilization <= 1:
        raise ConfigError("--gpu-memory-utilization: must be above 0 and at most 1")
    tp, precision = deployment.tensor_parallel, deployment.precision
    num_rows = min(max_num_seqs, max_num_batched_tokens)  # each request computes a token at least
    # Ranks share the wide buffers; the residual stream, which each has whole, is small beside them.
    activations = (
        activation_bytes(program, max_num_batched_tokens, num_rows, precision.activation_bytes)
        // tp
    )
    usable = int(hardware.memory_bytes * utilization)
    found = []
    for stage in stages(shard(program, tp), deployment.pipeline_parallel):
        weights = int(stage.num_parameters * precision.weight_bytes / tp)
        kv_numbers = sum(layer.numbers_per_token for layer in stage.kv)
        block_bytes = int(kv_numbers * precision.kv_bytes * block_size)
        found.append(
            MemoryFit(
                memory_bytes=hardware.memory_bytes,
                usable_bytes=usable,
                weight_bytes=weights,
                activation_bytes=activations,
                block_bytes=block_bytes,
                block_size=block_size,
                num_blocks=max(0, (usable - weights - activations) // block_bytes),
            )
        )
    return min(found, key=lambda stage: (stage.num_blocks, -stage.weight_bytes))
