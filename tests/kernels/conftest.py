"""Runs the kernels' tests where their tensors are told to be: DUETTO_TEST_DEVICE, by default a CPU.

On a GPU, whatever a test makes is made there: tests say nothing about a device. After
DUETTO_TEST_UNTIL, in seconds since 1970, what is left is skipped: a lent GPU goes back. On a CPU,
Triton's interpreter takes loop bounds out of arrays of one number, of which numpy warns.
"""

import os
from time import time

import pytest
import torch
from kernels.interpreter import mend_interpreter

DEVICE = os.environ.get("DUETTO_TEST_DEVICE", "cpu")
UNTIL = float(os.environ.get("DUETTO_TEST_UNTIL", "inf"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0")
    # An activation of a large negative number: its exponential is inf, and it the right 0.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp")
    if DEVICE == "cpu":
        mend_interpreter()


def pytest_runtest_setup() -> None:
    if time() > UNTIL:
        pytest.skip("the time is over")


@pytest.fixture(autouse=DEVICE != "cpu")
def _on_the_device(monkeypatch: pytest.MonkeyPatch):
    to_numpy, from_numpy, generator = torch.Tensor.numpy, torch.from_numpy, torch.Generator
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x, **how: to_numpy(x.cpu(), **how))
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(DEVICE))
    monkeypatch.setattr(torch, "Generator", lambda device=DEVICE: generator(device))
    with torch.device(DEVICE):
        yield
