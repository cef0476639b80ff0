"""What the kernels are tested on: a GPU, or else this host, in Triton's interpreter."""

import os

import torch

DEVICE = torch.device(os.environ.get("DUETTO_TEST_DEVICE", "cpu"))
