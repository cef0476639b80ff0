"""Muon: momentum whose matrices are made orthogonal before each step.

For the matrices inside layers; embeddings, head and norms are AdamW's. The method is Jordan et al.,
"Muon: An optimizer for hidden layers in neural networks" (2024). torch has one that computes in
bf16, which a CPU without bf16 instructions does many times slower than this one in fp32.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the paper: they pull singular values to 0.7 to 1.2
NUM_ITERATIONS = 5
TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for parameters that are all matrices.

    A step of rate `lr` moves the root mean square of a matrix's outputs by about `lr`: updates are
    scaled by sqrt(max(1, rows / columns)). Decay is decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    alike[rows, columns].append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _step_alike(
        self, parameters: list[nn.Parameter], lr: float, momentum: float, decay: float
    ) -> None:
        """One step of parameters of one shape, orthogonalized together."""
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(gradient, 1 - momentum)
            directions.append(torch.lerp(gradient, average, momentum))  # Nesterov: one step ahead
        rows, columns = parameters[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(
            parameters, orthogonalize(torch.stack(directions)), strict=True
        ):
            parameter.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices of [count, rows, columns], roughly (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + TINY)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x
