"""A device that is lost is told from a step that failed."""

import pytest
import torch

from duetto.backends.cuda.loss import telling_of_loss
from duetto.core.errors import DeviceLost

DEVICE = torch.device("cuda", 3)


@pytest.mark.parametrize(
    "cause", ["CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: x"]
)
def test_an_error_of_the_driver_names_the_device(cause):
    with pytest.raises(DeviceLost, match="cuda:3") as raised, telling_of_loss(DEVICE):
        raise RuntimeError(f"{cause}\nCompile with TORCH_USE_CUDA_DSA")
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes"), ValueError()]
)
def test_other_errors_are_the_step_s(error):
    with pytest.raises(type(error)) as raised, telling_of_loss(DEVICE):
        raise error
    assert raised.value is error
