"""What a failure on the device means: that one step failed, or that the device is gone.

After most of CUDA's errors a process can compute nothing more. Knows no torch: what it raises is
told by its words.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from duetto.core.errors import DeviceLost

# What torch and Triton say before an error of CUDA.
_OF_CUDA = ("CUDA error:", "Triton Error [CUDA]:", "CUDA driver error:", "cuBLAS", "CUBLAS")
# Of CUDA's errors, those that concern a call, and leave the device as it was.
_OF_A_CALL = (
    "out of memory",
    "out of resource",
    "too many resources requested",
    "invalid argument",
    "invalid configuration argument",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INVALID_VALUE",
)


def is_lost(error: BaseException) -> bool:
    """Whether nothing can be computed on the device after it."""
    words = str(error)
    if type(error).__name__ == "OutOfMemoryError" or not any(each in words for each in _OF_CUDA):
        return False
    return not any(each in words for each in _OF_A_CALL)


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Raises DeviceLost, with the device's name, for an error after which it is gone; others as
    they are."""
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        raise DeviceLost(name, str(error).splitlines()[0]) from error
