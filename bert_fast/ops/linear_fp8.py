"""linear_fp8: y = activation(x W^T + b) with both factors rounded to e4m3, for inference.

e4m3 (Micikevicius et al., arXiv 2209.05433) has three bits after the leading one, and numbers from
2^-9 to 448. Each row of x and of W is divided by a power of two first, which rounds nothing, such
that its greatest magnitude lies in [128, 256); as rounding is relative, a finer scale would gain
nothing but a bit below 2^-6. With q and p the rounded rows, and e and f these powers,

    y[t, n] = activation(2^(e[t] + f[n]) sum(q[t] p[n]) + b[n])

The scales of x are found anew for every row, so nothing is calibrated. The gradient of x is that
of the rounded W (straight-through for x).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .backends import on_device_of, triton_kernel, widest_row
from .bias_gelu import OP as BIAS_GELU
from .bias_gelu import activate
from .linear import cost
from .linear import samples as linear_samples
from .linear_int8 import check as check_8_bits
from .linear_int8 import fake
from .products import sums_dtype
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of, reasons_against_copies

E4M3 = torch.float8_e4m3fn
# In the bits of fp32: the exponent's place, the exponent of what is no number, and the least that a
# row's greatest is taken to have, so that its inverse is a normal number.
PLACE, NO_NUMBER, LEAST = 23, 255, 32
SHIFT = 7  # a row's greatest magnitude becomes 2^7 or more, and less than 2^8


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] -> e4m3 [T, K], and what its rows are to be multiplied by, fp32 [T, 1]."""
    if not x.shape[1]:
        return x.to(E4M3), x.new_ones((x.shape[0], 1), dtype=torch.float32)
    wide = x.float()
    # Of magnitudes as integers the greatest is a NaN, if there is one.
    greatest = wide.abs().contiguous().view(torch.int32).amax(1, keepdim=True)
    exponent = (greatest >> PLACE).clamp_min(LEAST)
    scale = ((exponent - SHIFT) << PLACE).view(torch.float32)
    scale = torch.where(exponent == NO_NUMBER, torch.nan, scale)
    inverse = ((254 + SHIFT - exponent) << PLACE).view(torch.float32)
    return (wide * inverse).to(E4M3), scale


def _rounded(x: Tensor) -> Tensor:
    """x as e4m3 tells it, in the dtype of sums."""
    q, scale = quantized(x)
    sums = sums_dtype(x)
    return q.to(sums) * scale.to(sums)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    with torch.no_grad():
        w = _rounded(weight)
        rounded = _rounded(x)
    if x.requires_grad:  # the same value, with the gradient of x
        wide = x.to(rounded.dtype)
        rounded = rounded + (wide - wide.detach())
    y = rounded @ w.t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (y if activation == "none" else activate(y, activation)).to(x.dtype)


def kept(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded copy kept of a weight [N, K], and its scales [N, 1]."""
    return copy_of((weight,), "e4m3", lambda: quantized(weight))


@functools.cache
def _too_old(device: torch.device, *least: int) -> list[str]:
    """Why this GPU has no arithmetic in e4m3."""
    if not torch.cuda.is_available():  # `doctor` asks about a GPU that is not here
        return []
    if torch.version.hip:
        return ["AMD's e4m3 is not NVIDIA's on every GPU"]
    found = torch.cuda.get_device_capability(device)
    told = f"compute capability is {found[0]}.{found[1]}, not {least[0]}.{least[1]} or more"
    return [told] if found < least else []


_TRITON = triton_kernel("linear_fp8", limits=widest_row(8192))


def _triton() -> Kernel:
    """Quantises x in one pass over its rows; scales, bias and activation in the GEMM's epilogue."""

    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
        return _TRITON.forward(x, *kept(weight), bias, activation, save=False)

    def why_not(x, weight, *rest) -> list[str]:
        found = _TRITON.why_not(x) or list(_too_old(x.device, 8, 9) if x.is_cuda else ())
        if x.is_cuda and x.dtype == torch.float32:
            found.append("sums of e4m3 products have too few bits on a GPU for fp32")
        return found or reasons_against_copies(weight)

    return replace(_TRITON, forward=forward, backward=None, why_not=why_not)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantized`, in one pass where Triton runs on a GPU."""
    if not x.is_cuda or _TRITON.why_not(x):
        return quantized(x)
    with on_device_of(x):
        return importlib.import_module("bert_fast._triton.linear_fp8").quantize(x)


def _scaled_mm() -> Kernel:
    """torch's own product of e4m3 matrices with a scale for each row, from CUTLASS."""

    def forward(x, weight, bias, activation, *, save) -> tuple[Tensor, ...]:
        p, f = kept(weight)
        q, e = _quantized(x)
        inside = bias if activation == "none" else None
        # torch.nn.functional.scaled_mm is newer than the oldest torch that is supported.
        y = torch._scaled_mm(q, p.t(), e, f.t(), bias=inside, out_dtype=x.dtype)
        if activation == "none":
            return (y,)
        args = (y, bias, activation)
        return BIAS_GELU.choose(args).forward(*args, save=False)

    def why_not(x, weight, *rest) -> list[str]:
        if not x.is_cuda:
            return [f"{x.device.type} has no arithmetic in 8-bit floats"]
        found = list(_too_old(x.device, 9, 0))
        if x.dtype != torch.bfloat16:
            found.append(f"{x.dtype} is not bf16")
        if not x.shape[0] or x.shape[1] % 16 or weight.shape[0] % 16:
            sizes = (*x.shape, weight.shape[0])
            found.append(f"sizes are {sizes}, not positive and multiples of 16 after the first")
        return found or reasons_against_copies(weight)

    return Kernel("scaled_mm", forward, None, why_not)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype, large=False):
        yield Sample(sample.name, (*sample.args, "none"))
    x, weight, bias = next(iter(linear_samples(device, dtype))).args
    yield Sample("gelu", (x, weight, bias, "gelu"))
    outlier = x.clone()
    outlier[:, 5] = 400  # most of a row falls below 2^-6, where e4m3 has fewer bits
    yield Sample("outlier", (outlier, weight, bias, "none"))
    yield Sample("zeros", (torch.zeros_like(x), weight * 0, bias, "none"))


OP = Op(
    name="linear_fp8",
    arguments="Tensor x, Tensor weight, Tensor? bias, str activation",
    reference=reference,
    check=partial(check_8_bits, op="linear_fp8"),
    fake=fake,
    kernels=(_scaled_mm(), _triton()),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x W^T + b), both factors in e4m3 (about 4 % off); see this module's formula.

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
