"""Matrix products for kernels made of ATen calls: who multiplies, and in what precision."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype in hardware here; else fp32 arithmetic is faster."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def in_fp32(x: Tensor) -> bool:
    """Whether products of x's dtype are better computed in fp32: on CPUs without it."""
    return x.device.type == "cpu" and not has_native(x.dtype)


def sums_dtype(x: Tensor) -> torch.dtype:
    """Of statistics and sums: fp32, and fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in their dtype."""
    if in_fp32(a):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def sums_as_fp32(x: Tensor) -> bool:
    """Whether this GPU's GEMM of x's 16 bits returns its sums in fp32."""
    if torch.version.hip or torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 for fp64), as near to unrounded as the device's GEMM gives it."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        wide = sums_as_fp32(a)
        return torch.mm(a, b, out_dtype=torch.float32) if wide else a.float() @ b.float()
    # fp16 would overflow where sums are rounded to it.
    return a.float() @ b.float() if in_fp32(a) or a.dtype == torch.float16 else (a @ b).float()


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in their dtype."""
    if in_fp32(x):
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide).to(x.dtype)
    return F.linear(x, weight, bias)
