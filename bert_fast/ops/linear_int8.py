"""linear_int8: y = activation(x W^T + b) with both factors rounded to 8 bits, for inference.

Rows of x and W are cut along the depth into groups of 128, padded with zeros, and each is rotated
by the Hadamard matrix H_128. The rotations cancel in the product and spread an outlier over the
group, which makes ranges narrow (QuaRot, Ashkboos et al., arXiv 2404.00456; found for every token
anew, so nothing is calibrated). With H x for x and H w / 128 for W, a group is then

    x = low + step q,   q = 0 .. 127 (7 bits), low and step by the group's least and greatest value
    W = scale p,        p = -127 .. 127, scale by its greatest, but at least such that eight
                        products fit 16 bits: the positive and the negative values among p[16 i +
                        4 j + (0, 1)] of all j, and p[16 i + 4 j + (2, 3)], j = 0 .. 3, sum to 254
                        at most, before rounding

and what is summed is scale (step sum(q p) + low sum(p)), sum(q p) exactly. Rounding is done in
fp32 whatever x's dtype. The gradient of x is that of the rounded W (straight-through for x).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .bias_gelu import activate
from .linear import check as check_linear
from .linear import cost
from .linear import samples as linear_samples
from .packed_linear import Forward, multiply, packed_kernels
from .products import sums_dtype
from .registry import Chooser, Op, Sample

GROUP, LEVELS, EIGHT = 128, 127.0, 254.0


def _grouped(x: Tensor) -> Tensor:
    """[T, K] -> [T, K + padding]."""
    return F.pad(x, (0, -x.shape[1] % GROUP))


def rotated(x: Tensor) -> Tensor:
    """[T, K] -> [T, groups, 128], sqrt(128) times as long as a rotation leaves it.

    Sums and differences of elements ever further apart; it is its own inverse, but for the length.
    """
    rows = _grouped(x)
    for apart in (1, 2, 4, 8, 16, 32, 64):
        a, b = rows.unflatten(1, (-1, 2, apart)).unbind(2)
        rows = torch.stack((a + b, a - b), 2).flatten(1)
    return rows.unflatten(1, (-1, GROUP))


def inverse(step: Tensor) -> Tensor:
    """1 / step; 0 where that would be infinite."""
    return torch.where(step >= torch.finfo(step.dtype).tiny, 1 / step, 0)


def _rounded_x(x: Tensor) -> Tensor:
    """[T, groups, 128] as 7 bits tell it, in the dtype of sums."""
    rows = rotated(x.float())
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = (high - low) / LEVELS
    q = torch.round((rows - low) * inverse(step))
    wide = sums_dtype(x)
    return low.to(wide) + step.to(wide) * q.to(wide)


def _rounded_weight(weight: Tensor) -> Tensor:
    rows = rotated(weight.float()) / GROUP
    eights = rows.unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-2)  # [.., 8, 2, 8]
    parts = [sign.clamp_min(0).unbind(-1) for sign in (eights, -eights)]
    sums = torch.stack([sum(part[1:], part[0]) for part in parts]).amax((0, -1, -2))
    scale = torch.maximum(rows.abs().amax(-1) / LEVELS, sums / EIGHT).unsqueeze(-1)
    p = torch.round(rows * inverse(scale))
    wide = sums_dtype(weight)
    return scale.to(wide) * p.to(wide)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    wide, exact = sums_dtype(x), x.to(sums_dtype(x))
    with torch.no_grad():
        w = _rounded_weight(weight).flatten(1)
        rounded = _rounded_x(x).flatten(1) @ w.t()
    if exact.requires_grad:  # the same value, with the gradient of x times W's rounded form
        turned = _grouped(exact) @ rotated(w).flatten(1).t()  # turned back: it is its own inverse
        rounded = rounded + (turned - turned.detach())
    y = rounded if bias is None else rounded + bias.to(wide)
    return (y if activation == "none" else activate(y, activation)).to(x.dtype)


def check(x, weight, bias, activation, op: str = "linear_int8") -> None:
    check_linear(x, weight, bias, op)
    if activation != "none":
        checks.activation(op, activation)
    checks.for_inference(op, "weight", weight)


def fake(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0], weight.shape[0]),)


def _packed(isa: int) -> Forward:
    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor]:
        return (multiply(x, weight, bias, activation, isa, int8=True),)

    return forward


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype):
        yield Sample(sample.name, (*sample.args, "none"))
    x, weight, bias = next(iter(linear_samples(device, dtype))).args
    for activation in checks.ACTIVATIONS:
        yield Sample(activation, (x, weight, bias, activation))
    # Rotated, all of this weight is as large as any, and so is x where eight products meet: 16 bits
    # could not hold them at full scale.
    flat, spike = torch.zeros_like(x), torch.zeros_like(weight)
    flat[:, 0], flat[:, 2], spike[:, 0] = 1.0, 0.5, 1.0
    yield Sample("greatest", (flat, spike, None, "none"))
    outlier = x.clone()
    outlier[:, 5] = 40
    yield Sample("outlier", (outlier, weight, bias, "none"))
    yield Sample("zeros", (torch.zeros_like(x), weight * 0, bias, "none"))
    # The inverse of their steps would be infinite.
    yield Sample("subnormal", (x, weight * 1e-39, bias, "none"))
    yield Sample("subnormal_x", (x * 1e-39, weight, bias, "none"))


OP = Op(
    name="linear_int8",
    arguments="Tensor x, Tensor weight, Tensor? bias, str activation",
    reference=reference,
    check=check,
    fake=fake,
    kernels=packed_kernels(_packed, None),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x W^T + b), both factors in 8 bits (about 1 % off).

    The formula: bert_fast/ops/linear_int8.py.

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
