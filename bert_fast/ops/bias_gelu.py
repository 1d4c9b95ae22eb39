"""bias_gelu: y = activation(x + bias), by default the exact GELU u * Phi(u).

GELU: Hendrycks & Gimpel, arXiv 1606.08415. BERT uses the erf form, not its tanh approximation.

    gelu(u) = u/2 (1 + erf(u / sqrt 2)),   gelu'(u) = Phi(u) + u phi(u)
    dx = dy * activation'(x + bias),  dbias = sum_T dx

Saved: the inputs; the activation is recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import cpu_kernels, cuda_kernel, triton_kernel
from .registry import Chooser, Op, Sample


def activate(u: Tensor, activation: str) -> Tensor:
    """The activation named as in `checks.ACTIVATIONS`."""
    if activation == "gelu":
        return F.gelu(u)
    if activation == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    return F.relu(u) if activation == "relu" else F.silu(u)


def reference(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(x if bias is None else x + bias, activation)


def check(x, bias, activation) -> None:
    checks.rank("bias_gelu", "x", x, 2)
    checks.shape("bias_gelu", "bias", bias, (x.shape[1],))
    checks.activation("bias_gelu", activation)


def fake(x, bias, activation, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape),)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 2).to(device, dtype)

    for activation in checks.ACTIVATIONS:
        yield Sample(activation, (draw(33, 80), draw(80), activation))
    yield Sample("no_bias", (draw(5, 64), None, "gelu"))
    yield Sample("odd_width", (draw(7, 37), draw(37), "gelu"))
    yield Sample("empty", (draw(0, 64), draw(64), "gelu"))
    yield Sample("strided", (draw(64, 6).t(), draw(64), "gelu"))
    # The tails, where erf saturates and the tanh form differs most from the erf form.
    tails = torch.linspace(-12, 12, 512).reshape(8, 64).to(device, dtype)
    yield Sample("tails", (tails, None, "gelu"))
    # Far out a polynomial in place of erf would grow without bounds.
    yield Sample("far", (tails * 3.0 - 28.0, None, "gelu"))
    yield Sample("negative", (tails.abs() * -0.4, None, "gelu"))  # small results, a small budget


def cost(x, bias, activation) -> tuple[int, int]:
    return 20 * x.numel(), 2 * x.numel() * x.element_size()


OP = Op(
    name="bias_gelu",
    arguments="Tensor x, Tensor? bias, str activation",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(*cpu_kernels("bias_gelu"), cuda_kernel("bias_gelu"), triton_kernel("bias_gelu")),
    samples=samples,
    cost=cost,
    differentiable=("x", "bias"),
)


def bias_gelu(
    x: Tensor, bias: Tensor | None, activation: str = "gelu", backend: str | Chooser = "auto"
) -> Tensor:
    """activation(x + bias); the default is BERT's exact GELU (arXiv 1606.08415).

    Args:
        x: [T, F], fp32, bf16 or fp16 (fp64 through the reference).
        bias: [F] or None.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, F] in x's dtype.
    Raises: ValueError for a wrong shape, activation, device or backend; TypeError for dtypes.
    """
    return OP(x, bias, activation, backend=backend)
