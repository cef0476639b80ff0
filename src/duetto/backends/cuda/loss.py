"""Tells a device that is lost from a step that failed. Knows no step.

After an error of the driver nothing computes any more in this process: CUDA's errors stay, all but
a lack of memory, which is refused before anything is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from duetto.core.errors import DeviceLost

# How what torch and Triton say for the driver begins: both raise RuntimeError, or one of its kinds.
_BEGINNINGS = ("CUDA error", "Triton Error [CUDA]")


@contextmanager
def telling_of_loss(device: torch.device) -> Iterator[None]:
    """Raises DeviceLost, with the device's name, in place of an error of the driver."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        if not cause.startswith(_BEGINNINGS):
            raise
        raise DeviceLost(_name(device), cause) from error


def _name(device: torch.device) -> str:
    """What it is called; its number, if it no longer says."""
    try:
        name: str = torch.cuda.get_device_name(device)
    except Exception:  # whatever a driver without a device says
        return str(device)
    return f"{name} ({device})"
