"""linear: y = x W^T + b, the projections of the encoder (packed QKV is one call with N = 3H).

    dx = dy W,  dW = dy^T x,  db = sum_T dy

On a GPU the reference is cuBLAS and comes first; the Triton GEMM runs where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, onednn
from .backends import triton_kernel
from .packed_linear import Forward, multiply, packed_kernels
from .products import affine, product
from .registry import Chooser, Kernel, Op, Sample


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def check(x, weight, bias, op: str = "linear") -> None:
    checks.rank(op, "x", x, 2)
    checks.rank(op, "weight", weight, 2)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"bert_fast.{op}: weight has shape {tuple(weight.shape)}, expected (N, {x.shape[1]})"
            f" to match x {tuple(x.shape)}"
        )
    checks.shape(op, "bias", bias, (weight.shape[0],))


def fake(x, weight, bias, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0], weight.shape[0]),)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dW, db) of x W^T + b through ATen's GEMM, only those needed."""
    return (
        product(dy, weight) if needs[0] else None,
        product(dy.t(), x) if needs[1] else None,
        dy.sum(0) if needs[2] else None,
    )


def _backward(dy, x, weight, bias, *, needs):
    return gradients(dy, x, weight, needs)


def _aten(x: Tensor, weight: Tensor, bias: Tensor | None, *, save: bool) -> tuple[Tensor]:
    return (affine(x, weight, bias),)  # cuBLAS, oneDNN, MKL


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *, save: bool) -> tuple[Tensor]:
    return (onednn.pointwise(x, weight, bias, "none"),)


def _packed(isa: int) -> Forward:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, save: bool) -> tuple[Tensor]:
        return (multiply(x, weight, bias, "none", isa),)

    return forward


LARGE = (
    # More rows and a deeper sum than any kernel takes at once (the C++ ones: 192, 384).
    ("blocks", 201, 390, 24, True),
    # More than a tile of what Hopper's copy engine takes: rows of 16 bits that end on 16 bytes.
    ("tiles", 144, 160, 136, True),
)


def samples(device: torch.device, dtype: torch.dtype, large: bool = True) -> Iterable[Sample]:
    """large: also those that only the GEMM itself needs, not what is built on it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    for name, tokens, inner, outer, has_bias in (
        ("qkv", 37, 64, 192, True),
        ("no_bias", 20, 96, 64, False),
        ("odd", 7, 37, 41, True),
        # With AVX2 four rows are multiplied at once, or these: three and two.
        ("five_tokens", 5, 66, 50, True),
        # A short sum: for one row ATen takes a split dot product, more exact than any GEMM.
        ("one_token", 1, 32, 64, True),
        ("empty", 0, 64, 32, True),
        *(LARGE if large else ()),
    ):
        weight = draw(outer, inner, scale=inner**-0.5)
        yield Sample(name, (draw(tokens, inner), weight, draw(outer) if has_bias else None))
    yield Sample("strided", (draw(64, 9).t(), draw(64, 32).t() / 8, draw(32)))


def cost(x, weight, bias, *rest) -> tuple[int, int]:
    tokens, outer = x.shape[0], weight.shape[0]
    elements = x.numel() + weight.numel() + tokens * outer
    return 2 * tokens * weight.numel(), elements * x.element_size()


OP = Op(
    name="linear",
    arguments="Tensor x, Tensor weight, Tensor? bias",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(
        *packed_kernels(_packed, _backward),
        onednn.kernel(_onednn, _backward),
        Kernel("aten", _aten, _backward, lambda *args: []),
        triton_kernel("linear"),
    ),
    samples=samples,
    cost=cost,
    differentiable=("x", "weight", "bias"),
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | Chooser = "auto"
) -> Tensor:
    """x W^T + b.

    Args:
        x: [T, K], fp32, bf16 or fp16 (fp64 through ATen).
        weight: [N, K]; bias: [N] or None.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, N] in x's dtype.
    Raises: ValueError for a wrong shape, device or backend; TypeError for mixed dtypes.
    """
    return OP(x, weight, bias, backend=backend)
