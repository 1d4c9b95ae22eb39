"""feed_forward_fp8: y = activation(x U^T + b) D^T, every factor rounded to e4m3, for inference.

x, U and D are rounded as in `linear_fp8`, each row with its own power of two. That of the inner
states a = activation(u) would take a pass over a row to find, so it is one known beforehand: as
|activation(u)| <= |u|,

    |a[t, n]| <= |x[t]| max_n |U[n]| + max_n |b[n]|      (Cauchy, Schwarz)

with x as it is before it is rounded. The power is such that this bound becomes 2^7 or more, and
less than 2^8. e4m3 being a float, a bound 2^4 above the row's greatest costs only bits of what is
2^9 times less than that. The inner states then cross memory once each way, at a byte an element.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import on_device_of, triton_kernel, widest_row
from .bias_gelu import activate
from .feed_forward import check as check_feed_forward
from .feed_forward import cost as cost_feed_forward
from .linear import samples as linear_samples
from .linear_fp8 import (
    E4M3,
    affine,
    kept,
    powers_of,
    powers_under,
    quantized,
    scaled_mm,
)
from .linear_fp8 import OP as LINEAR_FP8
from .linear_fp8 import reference as linear_reference
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of, reasons_against_copies


def reach_of(up: Tensor, up_bias: Tensor | None) -> Tensor:
    """What the bound takes of the weights, fp32 [2]: max_n |U[n]| and max_n |b[n]|."""
    lengths = torch.linalg.vector_norm(up.float(), dim=1)
    biases = lengths.new_zeros(1) if up_bias is None else up_bias.float().abs()
    return torch.stack([F.pad(each, (0, 1)).amax() for each in (lengths, biases)])


def inner_powers(x: Tensor, reach: Tensor) -> Tensor:
    """What the rows of the inner states are divided by, fp32 [T, 1]."""
    power, inverse = powers_of(x)
    length = torch.linalg.vector_norm(x.float() * inverse, dim=1, keepdim=True) * power
    return powers_under((length * reach[0] + reach[1]).abs())[0]


def reference(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, activation: str
) -> Tensor:
    with torch.no_grad():
        powers = inner_powers(x, reach_of(up, up_bias))
    inner = activate(linear_reference(x, up, up_bias), activation)
    return affine(inner, down, None, powers).to(x.dtype)


def check(x, up, up_bias, down, activation) -> None:
    op = "feed_forward_fp8"
    check_feed_forward(x, up, up_bias, down, activation, False, op)
    checks.shape(op, "down", down, (x.shape[1], up.shape[0]))
    checks.for_inference(op, "up", up)
    checks.for_inference(op, "down", down)


def fake(x, up, up_bias, down, activation, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0], down.shape[0]),)


def _why_not(name: str, x: Tensor, up: Tensor, down: Tensor) -> list[str]:
    """Of `linear_fp8`'s kernel of this name: the two products are of the same sizes."""
    (kernel,) = (kernel for kernel in LINEAR_FP8.kernels if kernel.backend == name)
    return kernel.why_not(x, up, None) or reasons_against_copies(down)


def _reach(up: Tensor, up_bias: Tensor | None) -> Tensor:
    return copy_of((up, up_bias), "e4m3 reach", lambda: reach_of(up, up_bias))


_TRITON = triton_kernel("feed_forward_fp8", limits=widest_row(8192))


def _triton() -> Kernel:
    """Two GEMMs, the first of which rounds the inner states in its epilogue."""

    def forward(x, up, up_bias, down, activation, *, save) -> tuple[Tensor, ...]:
        weights = (*kept(up), up_bias, *kept(down), _reach(up, up_bias))
        return _TRITON.forward(x, *weights, activation, save=False)

    def why_not(x, up, up_bias, down, activation) -> list[str]:
        return _why_not("triton", x, up, down)

    return replace(_TRITON, forward=forward, backward=None, why_not=why_not)


def _module(name: str) -> Any:
    return importlib.import_module(f"bert_fast._triton.{name}")


def _prepared(x: Tensor, reach: Tensor, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x as e4m3, its rows' powers, and those of the inner states."""
    if not triton:
        return *quantized(x), inner_powers(x, reach)
    with on_device_of(x):
        return _module("linear_fp8").quantize(x, reach)


def _activated(
    u: Tensor, bias: Tensor | None, activation: str, powers: Tensor, triton: bool
) -> Tensor:
    """activation(u + bias), divided by the powers of its rows, as e4m3."""
    if not triton:
        wide = u.float() if bias is None else u.float() + bias.float()
        return (activate(wide, activation) / powers).to(E4M3)
    with on_device_of(u):
        return _module("bias_gelu_fp8").forward(u, bias, activation, powers, save=False)[0]


def _scaled_mm() -> Kernel:
    """torch's products of e4m3 matrices; bias, activation and rounding in one pass between them."""

    def forward(x, up, up_bias, down, activation, *, save) -> tuple[Tensor, ...]:
        triton = x.is_cuda and not _TRITON.why_not(x)
        q, e, powers = _prepared(x, _reach(up, up_bias), triton)
        u = scaled_mm(q, e, *kept(up), None, x.dtype)
        inner = _activated(u, up_bias, activation, powers, triton)
        return (scaled_mm(inner, powers, *kept(down), None, x.dtype),)

    def why_not(x, up, up_bias, down, activation) -> list[str]:
        return _why_not("scaled_mm", x, up, down)

    return Kernel("scaled_mm", forward, None, why_not)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype, large=False):
        x, up, up_bias = sample.args
        down = up.flip(0).t().contiguous()
        # The more inner states, the likelier is one so near the middle of two e4m3 that the last
        # bit of fp32 decides: of those of relu, fewer are.
        activation = "relu" if sample.name == "qkv" else "gelu"
        yield Sample(sample.name, (x, up, up_bias, down, activation))
    yield Sample("silu", (x, up, up_bias, down, "silu"))
    outlier = x.clone()
    outlier[:, 5] = 400  # the bound is far above the other inner states
    yield Sample("outlier", (outlier, up, up_bias, down, "gelu_tanh"))
    yield Sample("zeros", (torch.zeros_like(x), up, None, down, "gelu"))


def cost(x, up, up_bias, down, activation) -> tuple[int, int]:
    return cost_feed_forward(x, up, up_bias, down)


OP = Op(
    name="feed_forward_fp8",
    arguments="Tensor x, Tensor up, Tensor? up_bias, Tensor down, str activation",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(_scaled_mm(), _triton()),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def feed_forward_fp8(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str = "gelu",
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x up^T + up_bias) down^T, every factor in e4m3.

    The formula: bert_fast/ops/feed_forward_fp8.py.

    Args:
        x: [T, H], bf16 or fp16 (fp32 and fp64 through the reference).
        up: [F, H]; down: [H, F], of x's dtype; their 8-bit forms are kept beside them.
        up_bias: [F] or None.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H] in x's dtype.
    Raises: ValueError for a wrong shape, activation, device or backend and for weights that want a
        gradient; TypeError for mixed dtypes.
    """
    return OP(x, up, up_bias, down, activation, backend=backend)
