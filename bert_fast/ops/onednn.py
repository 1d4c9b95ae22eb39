"""CPU GEMMs through oneDNN with weights reordered once, and the activation in the epilogue.

oneDNN picks AVX2, AVX-512 or AMX code by itself. A weight in oneDNN's own blocked layout is up
to 2x faster at small T than a plain one, and the fused exact GELU is nearly free; both come with
torch as `mkldnn._linear_pointwise`. The reordered copy is kept beside the user's weight, which is
never changed, for as long as that tensor lives and its version and address stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import wrong_device, wrong_dtype
from .packed_linear import Backward, Forward
from .products import has_native
from .registry import Kernel
from .weight_copies import copy_of, reasons_against_copies

_POINTWISE = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}

# oneDNN asks for a number of rows to choose its blocking for; it runs any other number as well.
_TYPICAL_TOKENS = 256


def prepacked(weight: Tensor) -> Tensor:
    """weight [N, K] in oneDNN's blocked layout, in fp32 where its dtype has no hardware here."""

    def reorder() -> Tensor:
        plain = weight.detach() if has_native(weight.dtype) else weight.detach().float()
        return torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), _TYPICAL_TOKENS)

    return copy_of((weight,), "onednn", reorder)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x W^T + b) with the prepacked weight; the result in x's dtype."""
    name, algorithm = _POINTWISE[activation]
    packed = prepacked(weight)
    if not has_native(x.dtype):
        bias = None if bias is None else bias.float()
        run = torch.ops.mkldnn._linear_pointwise(x.float(), packed, bias, name, [], algorithm)
        return run.to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def leads(x: Tensor, *rest: Any) -> bool:
    """Where it multiplies fp16 as it is, which our own kernels widen."""
    return x.device.type == "cpu" and x.dtype == torch.float16 and has_native(x.dtype)


def kernel(forward: Forward, backward: Backward) -> Kernel:
    """One of `packed_linear`'s kind."""
    return Kernel("onednn", forward, backward, why_not, leads=leads, device="cpu")


def why_not(x: Tensor, weight: Tensor, *rest: Any) -> list[str]:
    found = wrong_device(x, "cpu") + wrong_dtype(x)
    if not torch.backends.mkldnn.is_available():
        found.append("torch was built without oneDNN")
    if x.shape[0] == 0:
        found.append("no tokens")
    if not weight.numel():
        found.append("the weight is empty")
    if x.dtype == torch.float32:
        # Up to 3.4 times ATen's error, where 2 are allowed: at K = 768 with AVX2, and with AVX-512
        # in some cases of `bert-fast bench`.
        found.append("its long fp32 sums lose more digits than is allowed")
    return found + reasons_against_copies(weight)
