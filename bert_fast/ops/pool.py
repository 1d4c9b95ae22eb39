"""pool: one vector per sequence, its first token ("cls") or the mean of its tokens.

    v_b = x[cu_seqlens[b]]  or  mean of x[cu_seqlens[b] : cu_seqlens[b+1]]
    y_b = v_b / max(||v_b||_2, 1e-12) if normalize else v_b

Mean pooling and its normalisation: Reimers & Gurevych, arXiv 1908.10084. An empty sequence gives
zeros. Gradient, with n = max(||v||, 1e-12): dv = (dy - y (y . dy)) / n, spread evenly over the
rows of a mean. Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import cpu_kernels, triton_kernel, widest_row
from .products import sums_dtype
from .registry import Chooser, Op, Sample

MODES = ("cls", "mean")


def reference(x: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool) -> Tensor:
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    wide = sums_dtype(x)  # fp16 has no 1e-12
    if mode == "cls":
        first = torch.cat([x, x.new_zeros(1, x.shape[1])])[starts]
        y = torch.where(lengths.unsqueeze(1) > 0, first, 0.0)
    else:
        owner = torch.repeat_interleave(
            torch.arange(lengths.numel(), device=x.device), lengths, output_size=x.shape[0]
        )
        total = x.new_zeros(lengths.numel(), x.shape[1], dtype=wide)
        total = total.index_add(0, owner, x.to(wide))
        y = (total / lengths.clamp(min=1).unsqueeze(1)).to(x.dtype)
    return F.normalize(y.to(wide), dim=1).to(x.dtype) if normalize else y


def check(x, cu_seqlens, mode, normalize) -> None:
    checks.rank("pool", "x", x, 2)
    checks.rank("pool", "cu_seqlens", cu_seqlens, 1)
    checks.cu_seqlens("pool", cu_seqlens)
    if mode not in MODES:
        raise ValueError(f"bert_fast.pool: mode is {mode!r}, expected one of {MODES}")


def fake(x, cu_seqlens, mode, normalize, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]),)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)
    for name, lengths, hidden, mode, normalize in (
        ("mean", (3, 17, 1, 40), 64, "mean", False),
        ("mean_normalized", (3, 17, 1, 40), 64, "mean", True),
        ("cls", (3, 17, 1, 40), 64, "cls", False),
        ("cls_normalized", (3, 17, 1, 40), 64, "cls", True),
        ("empty_sequences", (0, 5, 0, 2, 0), 37, "mean", True),
        ("empty_sequences_cls", (0, 5, 0, 2, 0), 37, "cls", True),
        ("no_sequences", (), 64, "mean", True),
    ):
        x = torch.randn(sum(lengths), hidden, generator=generator) + 0.5
        bounds = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
        yield Sample(name, (x.to(device, dtype), bounds, mode, normalize))


def cost(x, cu_seqlens, mode, normalize) -> tuple[int, int]:
    read = x.numel() if mode == "mean" else (cu_seqlens.shape[0] - 1) * x.shape[1]
    return read, read * x.element_size()


OP = Op(
    name="pool",
    arguments="Tensor x, Tensor cu_seqlens, str mode, bool normalize",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(*cpu_kernels("pool"), triton_kernel("pool", limits=widest_row(8192))),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    normalize: bool = False,
    backend: str | Chooser = "auto",
) -> Tensor:
    """One vector per packed sequence: its first token or its mean; arXiv 1908.10084.

    Args:
        x: [T, H] packed tokens, fp32, bf16 or fp16 (fp64 through the reference).
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        mode: "cls" or "mean".
        normalize: divide each vector by its L2 norm (at least 1e-12).
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [B, H] in x's dtype; zeros for an empty sequence.
    Raises: ValueError for a wrong shape, mode, device or backend; TypeError for a wrong dtype.
    """
    return OP(x, cu_seqlens, mode, normalize, backend=backend)
