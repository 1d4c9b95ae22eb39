"""linear_gelu: y = activation(x W^T + b), the first half of the feed-forward network.

The exact-erf GELU in the GEMM's epilogue (cuBLASLt fuses only the tanh form). With
u = x W^T + b and du = dy * activation'(u):

    dx = du W,  dW = du^T x,  db = sum_T du

Saved: the inputs and u.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, onednn
from .backends import triton_kernel
from .bias_gelu import OP as BIAS_GELU
from .bias_gelu import activate
from .linear import check as check_linear
from .linear import cost, gradients
from .linear import samples as linear_samples
from .modes import recorded
from .packed_linear import Forward, multiply, packed_kernels
from .products import affine
from .registry import Chooser, Kernel, Op, Sample


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def check(x, weight, bias, activation) -> None:
    check_linear(x, weight, bias, "linear_gelu")
    checks.activation("linear_gelu", activation)


def fake(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y)


def _backward(dy, x, weight, bias, activation, u, *, needs) -> Sequence[Tensor | None]:
    """Shared by the kernels whose GEMM is ATen's: du by bias_gelu's kernel, then the GEMMs."""
    kernel = BIAS_GELU.choose((u, None, activation))
    (du, _) = BIAS_GELU.backward(kernel, dy, [u, None, activation], [True, False])
    return gradients(du, x, weight, needs)


def _with_epilogue(multiply: Callable[..., Tensor]) -> Forward:
    """A forward of a GEMM that takes the activation (or "none") as its last argument."""

    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
        if not save:
            return multiply(x, weight, bias, activation), x.new_empty(0)
        u = multiply(x, weight, bias, "none")
        return _activated(u, None, activation), u

    return forward


def _packed(isa: int) -> Forward:
    return _with_epilogue(partial(multiply, isa=isa))


def _aten() -> Kernel:
    """ATen's GEMM, then bias and activation in one fused elementwise pass."""

    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
        if save:
            u = affine(x, weight, bias)
            return _activated(u, None, activation), u
        return _activated(affine(x, weight, None), bias, activation), x.new_empty(0)

    return Kernel("aten", forward, _backward, lambda *args: [])


def _leads_on_hopper(x, weight, *rest) -> bool:
    """Whether Triton's epilogue beats a pass of its own, as measured on an H200 in 16 bits: from
    more than 64 rows on (43,956 x 3,072 x 768: 366 us, of 431; 512 rows: 12, of 15). While no graph
    is recorded, only what runs for longer than Python takes to launch it."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] <= 64:
        return False
    if _capability(x.device) != (9, 0):
        return False
    return x.shape[0] * weight.numel() >= 2e10 or recorded()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _activated(u: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    args: tuple[Any, ...] = (u, bias, activation)
    return BIAS_GELU.choose(args).forward(*args, save=False)[0]


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype, large=False):
        yield Sample(sample.name, (*sample.args, "gelu"))
    (tiles,) = (s for s in linear_samples(device, dtype) if s.name == "tiles")
    yield Sample("tiles", (*tiles.args, "gelu"))
    x, weight, bias = next(iter(linear_samples(device, dtype))).args
    for activation in checks.ACTIVATIONS[1:]:
        yield Sample(activation, (x, weight, bias, activation))


OP = Op(
    name="linear_gelu",
    arguments="Tensor x, Tensor weight, Tensor? bias, str activation",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(
        *packed_kernels(_packed, _backward),
        onednn.kernel(_with_epilogue(onednn.pointwise), _backward),
        _aten(),
        replace(triton_kernel("linear_gelu"), leads=_leads_on_hopper),
    ),
    samples=samples,
    cost=cost,
    differentiable=("x", "weight", "bias"),
    residuals=1,
)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x W^T + b); the default is BERT's exact GELU (arXiv 1606.08415).

    Args:
        x: [T, K], fp32, bf16 or fp16 (fp64 through ATen).
        weight: [N, K]; bias: [N] or None.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, N] in x's dtype.
    Raises: ValueError for a wrong shape, activation, device or backend; TypeError for dtypes.
    """
    return OP(x, weight, bias, activation, backend=backend)
