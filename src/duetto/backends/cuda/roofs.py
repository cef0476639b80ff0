"""What a device gives at most, measured: memory that is read, memory that is copied, and products.

Random numbers, since zeros are multiplied faster. Knows no kernel of ours: all is the library's.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from duetto.backends.cuda.stopwatch import Stopwatch

BYTES = 1 << 30  # of each of the two that are copied, and of what is read: no cache holds it
SIDE = 8192  # of the product
FLOAT32_SIDE = 4096


@dataclass(frozen=True, slots=True)
class DeviceRoofs:
    """Bytes and operations in a second."""

    read_bandwidth: float
    copy_bandwidth: float  # bytes read and bytes written
    peaks: dict[str, float]  # by the precision of what is multiplied


def measure_roofs(watch: Stopwatch, shrink: int = 1, runs: int = 20) -> DeviceRoofs:
    """Takes two or three seconds. `shrink` divides sizes, for machines that are no GPU."""
    size = BYTES // (shrink * shrink)
    numbers = torch.randn(size // 4, device=watch.device, dtype=torch.float32)
    other = torch.empty_like(numbers)
    halves = numbers.view(torch.bfloat16)  # some are NaN: that changes no time
    read_s = min(watch.median(x.max, runs) for x in (numbers, halves))
    copy_s = watch.median(partial(other.copy_, numbers), runs)
    del numbers, other, halves
    return DeviceRoofs(
        read_bandwidth=size / read_s,
        copy_bandwidth=2 * size / copy_s,
        peaks=_products(watch, shrink, max(3, runs // 4)),
    )


def _products(watch: Stopwatch, shrink: int, runs: int) -> dict[str, float]:
    """fp32 is exact fp32: torch multiplies it so unless it is told otherwise."""
    found: dict[str, float] = {}
    for name, dtype, side in (
        ("float32", torch.float32, FLOAT32_SIDE // shrink),
        ("bfloat16", torch.bfloat16, SIDE // shrink),
        ("float16", torch.float16, SIDE // shrink),
    ):
        a = torch.randn(side, side, device=watch.device, dtype=dtype)
        b = torch.randn(side, side, device=watch.device, dtype=dtype)
        found[name] = 2 * side**3 / watch.median(partial(torch.matmul, a, b), runs)
    if watch.is_gpu:
        found |= _narrow_products(watch, runs)
    return found


def _narrow_products(watch: Stopwatch, runs: int) -> dict[str, float]:
    """In int8, and in fp8 where the device has it, as far as the library has such products."""
    a = torch.randint(-127, 128, (SIDE, SIDE), device=watch.device, dtype=torch.int8)
    b = torch.randint(-127, 128, (SIDE, SIDE), device=watch.device, dtype=torch.int8).t()
    found: dict[str, float] = {}
    with suppress(RuntimeError):
        found["int8"] = 2 * SIDE**3 / watch.median(partial(torch._int_mm, a, b), runs)
    if torch.cuda.get_device_capability(watch.device) >= (8, 9):
        scale = torch.ones((), device=watch.device)
        x = torch.randn(SIDE, SIDE, device=watch.device).to(torch.float8_e4m3fn)
        y = torch.randn(SIDE, SIDE, device=watch.device).to(torch.float8_e4m3fn).t()

        def multiply() -> torch.Tensor:
            return torch._scaled_mm(x, y, scale, scale, out_dtype=torch.bfloat16)

        with suppress(RuntimeError):
            found["float8"] = 2 * SIDE**3 / watch.median(multiply, runs)
    return found
