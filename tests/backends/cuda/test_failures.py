"""Which errors of torch and Triton end a step, and which the engine."""

import pytest

from duetto.backends.cuda.failures import is_lost, on_device
from duetto.core.errors import DeviceLost


class OutOfMemoryError(RuntimeError):
    """As torch's is named."""


class AcceleratorError(RuntimeError):
    """As torch's is named."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: an illegal memory access was encountered\nand more"),
        AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_a_device_after_which_nothing_can_be_computed_is_lost(error):
    assert is_lost(error)
    first = str(error).splitlines()[0]
    with pytest.raises(DeviceLost) as lost, on_device("NVIDIA H100"):
        raise error
    assert "NVIDIA H100 is lost" in str(lost.value) and str(lost.value).endswith(first)
    assert lost.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        ValueError("a step of 0 tokens"),
        AssertionError("a slot outside 0 ... 7"),
    ],
)
def test_other_errors_are_the_steps_own(error):
    assert not is_lost(error)
    with pytest.raises(type(error)) as raised, on_device("NVIDIA H100"):
        raise error
    assert raised.value is error
