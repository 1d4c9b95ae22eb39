"""add_layernorm: y = LayerNorm(dropout(x + linear_bias) + residual).

The end of both halves of a post-LN layer: the bias of the projection before it, dropout, the
residual and LayerNorm (Ba et al., arXiv 1607.06450) in one pass over memory. With
z = dropout(x + linear_bias) + residual, xhat = (z - mean) * rstd and g = dy * weight:

    dz = rstd * (g - mean_H(g) - xhat * mean_H(g * xhat))
    dresidual = dz,  dx = dropout(dz),  dlinear_bias = sum_T dx
    dweight = sum_T dy * xhat,  dbias = sum_T dy

Saved: the inputs, mean and rstd in fp32; z is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import cpu_kernels, cuda_kernel, triton_kernel, widest_row, with_tritons_backward
from .registry import Chooser, Op, Sample
from .rng import dropout


def reference(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    z = x if linear_bias is None else x + linear_bias
    z = dropout(z, seed, p)
    z = z if residual is None else z + residual
    return F.layer_norm(z, weight.shape, weight, bias, eps)


def check(x, linear_bias, residual, weight, bias, eps, p, seed) -> None:
    checks.rank("add_layernorm", "x", x, 2)
    hidden = x.shape[1]
    checks.shape("add_layernorm", "linear_bias", linear_bias, (hidden,))
    checks.shape("add_layernorm", "residual", residual, tuple(x.shape))
    checks.shape("add_layernorm", "weight", weight, (hidden,))
    checks.shape("add_layernorm", "bias", bias, (hidden,))
    checks.dropout("add_layernorm", p, seed)


def fake(x, linear_bias, residual, weight, bias, eps, p, seed, *, save) -> tuple[Tensor, ...]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    seed = torch.tensor([0x1234567890], device=device)
    for name, tokens, hidden, p, parts in (
        ("bert", 67, 128, 0.0, (True, True)),
        ("odd_hidden", 9, 37, 0.0, (True, True)),
        ("base_hidden", 5, 768, 0.0, (True, True)),
        ("odd_wide_hidden", 5, 1031, 0.0, (True, True)),
        ("widest_hidden", 2, 4096, 0.0, (True, True)),
        ("no_bias", 6, 64, 0.0, (False, True)),
        ("plain_layernorm", 6, 64, 0.0, (False, False)),
        ("dropout", 33, 96, 0.3, (True, True)),
        ("dropout_odd", 7, 37, 0.1, (True, True)),
        ("empty", 0, 64, 0.0, (True, True)),
    ):
        args = (
            draw(tokens, hidden),
            draw(hidden) if parts[0] else None,
            draw(tokens, hidden, scale=3.0) if parts[1] else None,
            draw(hidden) + 1.0,
            draw(hidden),
            1e-12,
            p,
            seed if p else None,
        )
        yield Sample(name, args)
    # A large common offset: statistics in bf16, or E[x^2] - E[x]^2, lose the variance here.
    x, residual = draw(8, 64), draw(8, 64) + 100.0
    yield Sample("offset", (x, None, residual, draw(64) + 1.0, draw(64), 1e-12, 0.0, None))
    # Rows of nearly equal values: the variance is near eps, so a wrong eps shows.
    x = draw(8, 64, scale=1e-3)
    yield Sample("small_variance", (x, None, None, draw(64) + 1.0, draw(64), 1e-5, 0.0, None))
    columns = draw(64, 16).t()
    yield Sample(
        "strided", (columns, draw(64), columns * 2, draw(64) + 1.0, draw(64), 1e-12, 0.0, None)
    )


def cost(x, linear_bias, residual, *rest) -> tuple[int, int]:
    reads = 1 + (residual is not None)
    return 8 * x.numel(), (reads + 1) * x.numel() * x.element_size()


OP = Op(
    name="add_layernorm",
    arguments="Tensor x, Tensor? linear_bias, Tensor? residual, Tensor weight, Tensor bias, "
    "float eps, float p, Tensor? seed",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(
        *cpu_kernels("add_layernorm"),
        # Of 8,192 rows of 768, Triton's backward takes 28 us on an H200, CUDA's own 40.
        with_tritons_backward(
            cuda_kernel("add_layernorm", limits=widest_row(4096)), "add_layernorm"
        ),
        triton_kernel("add_layernorm", limits=widest_row(8192)),
    ),
    samples=samples,
    cost=cost,
    differentiable=("x", "linear_bias", "residual", "weight", "bias"),
    residuals=2,
)


def add_layernorm(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Chooser = "auto",
) -> Tensor:
    """LayerNorm(dropout(x + linear_bias) + residual); Ba et al., arXiv 1607.06450.

    Args:
        x: [T, H], fp32, bf16 or fp16 (fp64 through the reference).
        linear_bias: [H] or None; the bias of the projection that made x.
        residual: [T, H] or None.
        weight, bias: [H], LayerNorm's scale and shift.
        eps: added to the variance.
        p, seed: dropout probability in [0, 1) and its int64 [1] seed (None when p is 0).
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H] in x's dtype.
    Raises: ValueError for a wrong shape, device, p or backend; TypeError for mixed dtypes.
    """
    return OP(x, linear_bias, residual, weight, bias, eps, p, seed, backend=backend)
