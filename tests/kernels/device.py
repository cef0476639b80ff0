"""What the kernels are tested on: a GPU, or else this host, in Triton's interpreter."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
