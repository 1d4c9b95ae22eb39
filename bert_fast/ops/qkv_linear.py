"""qkv_linear: y = x [Wq; Wk; Wv]^T + [bq; bk; bv], the three projections as one GEMM.

    dx = dy [Wq; Wk; Wv],  dWq, dWk, dWv = the thirds of dy^T x,  biases likewise

The model keeps its three weights; one [3N, K] copy is kept beside them (`weight_copies`), or made
each time for weights that are being trained. The kernels are those of `linear`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .linear import OP as LINEAR
from .linear import check as check_linear
from .linear import samples as linear_samples
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of


def reference(x, q, k, v, q_bias, k_bias, v_bias) -> Tensor:
    bias = None if q_bias is None else torch.cat((q_bias, k_bias, v_bias))
    return F.linear(x, torch.cat((q, k, v)), bias)


def check(x, q, k, v, q_bias, k_bias, v_bias) -> None:
    op = "qkv_linear"
    check_linear(x, q, q_bias, op)
    for name, weight in (("k", k), ("v", v)):
        checks.shape(op, name, weight, tuple(q.shape))
    for name, bias in (("k_bias", k_bias), ("v_bias", v_bias)):
        checks.shape(op, name, bias, (q.shape[0],))
        if (bias is None) != (q_bias is None):
            raise ValueError(f"bert_fast.{op}: {name} and q_bias must both be given or both None")


def fake(x, q, k, v, q_bias, k_bias, v_bias, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0], 3 * q.shape[0]),)


def packed(weights: Sequence[Tensor | None], keep: bool) -> tuple[Tensor, Tensor | None]:
    """(q, k, v, and their biases) as one weight [3N, K] and one bias [3N] or None."""

    def pack() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return torch.cat(weights[:3]), None if weights[3] is None else torch.cat(weights[3:])

    return copy_of(weights, "qkv", pack) if keep else pack()


def _one_gemm(kernel: Kernel) -> Kernel:
    """A kernel of `linear` on the packed weights."""

    def forward(x, *weights, save: bool) -> tuple[Tensor, ...]:
        # Not by the grad mode, which is off inside an autograd node.
        trained = save and any(w.requires_grad for w in weights[:3])
        return kernel.forward(x, *packed(weights, keep=not trained), save=save)

    def backward(dy, x, *weights, needs: list[bool]) -> Sequence[Tensor | None]:
        wanted = [needs[0], any(needs[1:4]), any(needs[4:])]
        assert kernel.backward is not None
        dx, dw, db = kernel.backward(dy, x, *packed(weights, keep=not wanted[1]), needs=wanted)
        none = (None, None, None)
        return dx, *(none if dw is None else dw.chunk(3)), *(none if db is None else db.chunk(3))

    def why_not(x, q, k, v, q_bias, *rest) -> list[str]:
        trained = next((w for w in (q, k, v) if w.requires_grad), q)
        return kernel.why_not(x, trained, q_bias)

    return replace(kernel, forward=forward, backward=backward, why_not=why_not)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype, large=False):
        x, weight, bias = sample.args
        weights = (weight, weight.flip(0), weight.roll(1, 1))
        biases = (None,) * 3 if bias is None else (bias, bias.flip(0), bias + 1)
        yield Sample(sample.name, (x, *weights, *biases))


def cost(x, q, k, v, q_bias, *rest) -> tuple[int, int]:
    tokens, outer = x.shape[0], q.shape[0]
    elements = x.numel() + 3 * q.numel() + 3 * tokens * outer
    return 6 * tokens * q.numel(), elements * x.element_size()


OP = Op(
    name="qkv_linear",
    arguments="Tensor x, Tensor q, Tensor k, Tensor v, "
    "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias",
    reference=reference,
    check=check,
    fake=fake,
    kernels=tuple(_one_gemm(kernel) for kernel in LINEAR.kernels if kernel.backward),
    samples=samples,
    cost=cost,
    differentiable=("x", "q", "k", "v", "q_bias", "k_bias", "v_bias"),
)


def qkv_linear(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    backend: str | Chooser = "auto",
) -> Tensor:
    """x [q; k; v]^T + [biases], one GEMM for the three projections of attention.

    Args:
        x: [T, K], fp32, bf16 or fp16 (fp64 through ATen).
        q, k, v: [N, K] each; q_bias, k_bias, v_bias: [N] each, or all None.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, 3N] in x's dtype.
    Raises: ValueError for a wrong shape, device or backend; TypeError for mixed dtypes.
    """
    return OP(x, q, k, v, q_bias, k_bias, v_bias, backend=backend)
