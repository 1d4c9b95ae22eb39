"""LAMB: Adam's direction per weight, scaled per tensor to the size of the tensor.

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2                     (both bias-corrected below)
    r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr * (|w| / |r|) * r            (ratio 1 where either norm is 0)

You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv
1904.00962, algorithm 2 with the identity for phi. It keeps the rate of large batches stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Vectors (biases, norms) take Adam's step unscaled, as BERT's do.

    Args:
        params: tensors or parameter groups.
        lr, betas, eps, weight_decay: as in the formula.
    Raises: ValueError for a value out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected 0 <= beta < 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives what `closure`, which computes the loss anew, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**step)).div_(root)
        ratio: float | Tensor = 1.0
        if group["weight_decay"]:
            update.add_(weight, alpha=group["weight_decay"])
        if weight.dim() > 1:
            size, length = weight.norm(), update.norm()
            ratio = torch.where((size > 0) & (length > 0), size / length, 1.0)
        weight.sub_(update * (group["lr"] * ratio))
