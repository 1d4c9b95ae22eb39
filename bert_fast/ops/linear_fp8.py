"""linear_fp8: y = x W^T + b with both factors rounded to e4m3, for inference.

e4m3 (Micikevicius et al., arXiv 2209.05433) has three bits after the leading one, and numbers from
2^-9 to 448. Each row of x and of W is divided by a power of two first, which rounds nothing, such
that its greatest magnitude lies in [128, 256); as rounding is relative, a finer scale would gain
nothing but a bit below 2^-6. With q and p the rounded rows, and e and f these powers,

    y[t, n] = 2^(e[t] + f[n]) sum(q[t] p[n]) + b[n]

The scales of x are found anew for every row, so nothing is calibrated. The gradient of x is that
of the rounded W (straight-through for x).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .backends import on_device_of, triton_kernel, widest_row
from .linear import check as check_linear
from .linear import cost, fake
from .linear import samples as linear_samples
from .products import sums_dtype
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of, reasons_against_copies

E4M3 = torch.float8_e4m3fn
# In the bits of fp32: the exponent's place, the exponent of what is no number, and the least that a
# row's greatest is taken to have, so that its inverse is a normal number.
PLACE, NO_NUMBER, LEAST = 23, 255, 32
SHIFT = 7  # a row's greatest magnitude becomes 2^7 or more, and less than 2^8


def powers_under(greatest: Tensor) -> tuple[Tensor, Tensor]:
    """2^e such that greatest / 2^e lies in [128, 256), and 2^-e; for what is no number, NaN.

    greatest: magnitudes, fp32.
    """
    exponent = (greatest.view(torch.int32) >> PLACE).clamp_min(LEAST)
    power = ((exponent - SHIFT) << PLACE).view(torch.float32)
    inverse = ((254 + SHIFT - exponent) << PLACE).view(torch.float32)
    return torch.where(exponent == NO_NUMBER, torch.nan, power), inverse


def powers_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows of x [T, K] are to be divided by, fp32 [T, 1], and the inverse."""
    if not x.shape[1]:
        return (x.new_ones((x.shape[0], 1), dtype=torch.float32),) * 2
    # Of magnitudes as integers the greatest is a NaN, if there is one.
    bits = x.float().abs().contiguous().view(torch.int32)
    return powers_under(bits.amax(1, keepdim=True).view(torch.float32))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] -> e4m3 [T, K], and what its rows are to be multiplied by, fp32 [T, 1]."""
    power, inverse = powers_of(x)
    return (x.float() * inverse).to(E4M3), power


def _rounded(x: Tensor, powers: Tensor | None = None) -> Tensor:
    """x as e4m3 tells it, in the dtype of sums; its rows divided by these powers, or their own."""
    sums = sums_dtype(x)
    q, power = quantized(x) if powers is None else ((x.float() / powers).to(E4M3), powers)
    return q.to(sums) * power.to(sums)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, powers: Tensor | None = None) -> Tensor:
    """The formula, in the dtype of sums; powers: fp32 [T, 1], 2^e where it is not x's own."""
    with torch.no_grad():
        w = _rounded(weight)
        rounded = _rounded(x, powers)
    if x.requires_grad:  # the same value, with the gradient of x
        wide = x.to(rounded.dtype)
        rounded = rounded + (wide - wide.detach())
    y = rounded @ w.t()
    return y if bias is None else y + bias.to(y.dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return affine(x, weight, bias).to(x.dtype)


def check(x, weight, bias) -> None:
    check_linear(x, weight, bias, "linear_fp8")
    checks.for_inference("linear_fp8", "weight", weight)


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
    """Quantises x in one pass over its rows; scales and bias in the GEMM's epilogue."""

    def forward(x, weight, bias, *, save) -> tuple[Tensor, ...]:
        return _TRITON.forward(x, *kept(weight), bias, save=False)

    def why_not(x, weight, bias) -> list[str]:
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
        return importlib.import_module("bert_fast._triton.linear_fp8").quantize(x)[:2]


def scaled_mm(
    q: Tensor, e: Tensor, p: Tensor, f: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The formula on q [T, K], e [T, 1], p [N, K], f [N, 1]."""
    # torch.nn.functional.scaled_mm is newer than the oldest torch that is supported.
    return torch._scaled_mm(q, p.t(), e, f.t(), bias=bias, out_dtype=dtype)


def _scaled_mm() -> Kernel:
    """torch's own product of e4m3 matrices with a scale for each row (cuBLAS, CUTLASS)."""

    def forward(x, weight, bias, *, save) -> tuple[Tensor, ...]:
        q, e = _quantized(x)
        return (scaled_mm(q, e, *kept(weight), bias, x.dtype),)

    def why_not(x, weight, bias) -> list[str]:
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
    yield from linear_samples(device, dtype, large=False)
    x, weight, bias = next(iter(linear_samples(device, dtype))).args
    outlier = x.clone()
    outlier[:, 5] = 400  # most of a row falls below 2^-6, where e4m3 has fewer bits
    yield Sample("outlier", (outlier, weight, bias))
    yield Sample("zeros", (torch.zeros_like(x), weight * 0, bias))


OP = Op(
    name="linear_fp8",
    arguments="Tensor x, Tensor weight, Tensor? bias",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(_scaled_mm(), _triton()),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | Chooser = "auto"
) -> Tensor:
    """x W^T + b, both factors in e4m3 (about 4 % off); the formula: bert_fast/ops/linear_fp8.py.

    Args:
        x: [T, K], bf16 or fp16 (fp32 and fp64 through the reference).
        weight: [N, K], of x's dtype; its 8-bit form is kept beside it. bias: [N] or None.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, N] in x's dtype.
    Raises: ValueError for a wrong shape, device or backend and for a weight that wants a gradient;
        TypeError for mixed dtypes.
    """
    return OP(x, weight, bias, backend=backend)
