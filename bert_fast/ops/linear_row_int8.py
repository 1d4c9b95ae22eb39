"""linear_row_int8: y = activation(x W^T + b), both factors in int8 with a scale for each row.

With r = H x and v = H w / 128, the rotated groups of `linear_int8`,

    s[t] = max|r[t]| / 127,  q = r / s;    f[n] = max|v[n]| / 127,  p = v / f;    q, p = -127 .. 127
    y[t, n] = activation(s[t] f[n] sum(q[t] p[n]) + b[n])

and the sum is exact. One scale a row leaves a GPU's integer units undisturbed through the whole
sum, where the groups of `linear_int8`, made for CPUs, would scale every 128 of it. The scales of x
are found anew for every row, so nothing is calibrated. Rounding is done in fp32 whatever x's dtype,
and a kernel may sum r of a 16-bit x in another order: q may then be off by one where it is within
that sum's error of a tie. The gradient of x is that of the rounded W (straight-through for x). For
inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .backends import triton_kernel, widest_row
from .bias_gelu import activate
from .linear import cost
from .linear import samples as linear_samples
from .linear_int8 import GROUP, LEVELS, fake, inverse, rotated
from .linear_int8 import check as check_int8
from .products import sums_dtype
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of, reasons_against_copies


def quantized(x: Tensor, whole: int = 1) -> tuple[Tensor, Tensor]:
    """[T, K] -> int8 [T, K + padding], and what its rows are to be multiplied by, fp32 [T, 1].

    whole: the rotated rows are divided by this power of two first.
    """
    rows = rotated(x.float()).flatten(1) / whole
    if not rows.numel():
        return rows.to(torch.int8), rows.new_ones((rows.shape[0], 1))
    scale = rows.abs().amax(1, keepdim=True) / LEVELS
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return torch.round(rows * inverse(scale)).nan_to_num(0).to(torch.int8), scale


def _wide(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(dtype) * scale.to(dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    wide = sums_dtype(x)
    with torch.no_grad():
        w = _wide(*quantized(weight, GROUP), wide)
        rounded = _wide(*quantized(x), wide) @ w.t()
    if x.requires_grad:  # the same value, with the gradient of x times W's rounded form
        back = rotated(w).flatten(1)[:, : x.shape[1]]
        turned = x.to(wide) @ back.t()
        rounded = rounded + (turned - turned.detach())
    y = rounded if bias is None else rounded + bias.to(wide)
    return (y if activation == "none" else activate(y, activation)).to(x.dtype)


def check(x, weight, bias, activation) -> None:
    check_int8(x, weight, bias, activation, "linear_row_int8")


def kept(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded copy kept of a weight [N, K], and its scales [N, 1]."""
    return copy_of((weight,), "int8 rows", lambda: quantized(weight, GROUP))


_TRITON = triton_kernel("linear_row_int8", limits=widest_row(8192))


def _triton() -> Kernel:
    """Quantises x in one pass over its rows; scales, bias, activation in the GEMM's epilogue."""

    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
        return _TRITON.forward(x, *kept(weight), bias, activation, save=False)

    def why_not(x, weight, bias, activation) -> list[str]:
        return _TRITON.why_not(x) or reasons_against_copies(weight)

    return replace(_TRITON, forward=forward, backward=None, why_not=why_not)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype):
        yield Sample(sample.name, (*sample.args, "none"))
    x, weight, bias = next(iter(linear_samples(device, dtype))).args
    for activation in checks.ACTIVATIONS:
        yield Sample(activation, (x, weight, bias, activation))
    outlier = x.clone()
    outlier[:, 5] = 400
    yield Sample("outlier", (outlier, weight, bias, "none"))
    yield Sample("zeros", (torch.zeros_like(x), weight * 0, bias, "none"))
    # The inverse of their scales would be infinite.
    yield Sample("subnormal", (x, weight * 1e-39, bias, "none"))
    yield Sample("subnormal_x", (x * 1e-41, weight, bias, "none"))


OP = Op(
    name="linear_row_int8",
    arguments="Tensor x, Tensor weight, Tensor? bias, str activation",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(_triton(),),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def linear_row_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x W^T + b), both factors in int8, a scale a row (about 1.4 % off).

    The formula: bert_fast/ops/linear_row_int8.py.

    Args:
        x: [T, K], fp32, bf16 or fp16 (fp64 through the reference).
        weight: [N, K], of x's dtype; its 8-bit form is kept beside it. bias: [N] or None.
        activation: "none", "gelu" (erf), "gelu_tanh", "relu" or "silu".
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, N] in x's dtype.
    Raises: ValueError for a wrong shape, activation, device or backend and for a weight that wants
        a gradient; TypeError for mixed dtypes.
    """
    return OP(x, weight, bias, activation, backend=backend)
