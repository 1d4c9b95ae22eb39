"""splade: y[b, v] = log(1 + relu(max over the tokens t of sequence b of l[t, v])), l = x W^T + b.

The sparse vector of SPLADE with max pooling (Formal et al., arXiv 2109.10086, section 3.1; log and
relu grow, so they may follow the max) from the logits of a masked-LM head, which are computed for a
part of the vocabulary at a time: [T, V] is never held. An empty sequence gives zeros. With t the
token that won word v in sequence b, and g = dy[b, v] / (1 + l[t, v]), 0 where l[t, v] <= 0:

    dx[t] += g W[v],  dW[v] += g x[t],  db[v] += g

Saved: [B, V] who won, and 1 / (1 + l) or 0. Backward runs over the words that any sequence has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .linear import check as check_linear
from .products import affine, in_fp32, product_fp32, sums_dtype
from .registry import Chooser, Kernel, Op, Sample

# Logits held at a time: on a CPU, near its last-level cache.
_LOGITS = {"cpu": 2**21, "cuda": 2**27}


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    scores = F.linear(x, weight, bias).relu().log1p()
    nothing = x.new_zeros(1, weight.shape[0])
    parts = scores.split(cu_seqlens.diff().tolist())
    found = [torch.cat([nothing, part]).amax(0) for part in parts]
    return torch.stack(found) if found else scores[:0]


def check(x, weight, bias, cu_seqlens) -> None:
    op = "splade"
    check_linear(x, weight, bias, op)
    checks.rank(op, "cu_seqlens", cu_seqlens, 1)
    checks.cu_seqlens(op, cu_seqlens)


def fake(x, weight, bias, cu_seqlens, *, save) -> tuple[Tensor, ...]:
    shape = cu_seqlens.shape[0] - 1, weight.shape[0]
    return (
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=sums_dtype(x)),
    )


def _chunks(x: Tensor, words: int) -> Iterator[slice]:
    """Parts of the vocabulary whose logits are held together."""
    step = max(64, _LOGITS.get(x.device.type, 2**21) // max(x.shape[0], 1))
    return (slice(first, first + step) for first in range(0, words, step))


def _forward(x, weight, bias, cu_seqlens, *, save) -> tuple[Tensor, ...]:
    shape, wide = (cu_seqlens.shape[0] - 1, weight.shape[0]), sums_dtype(x)
    top = x.new_zeros(shape, dtype=wide)
    won = x.new_zeros(shape if save else 0, dtype=torch.int64)
    lengths = cu_seqlens.diff()
    in_one = x.is_cuda and not save  # one kernel: two for each sequence would fill the queue
    bounds = [] if in_one else cu_seqlens.tolist()
    if bounds:
        checks.bounds("splade", bounds, x.shape[0])
    sequences = [(b, *ends) for b, ends in enumerate(itertools.pairwise(bounds))]
    # The bias is the same for every token of a word, so it may follow the max; but not a rounded
    # product: whether the word is there is for a sum near 0 to decide.
    rounded = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not in_fp32(x)
    inside = bias is not None and rounded
    for words in _chunks(x, weight.shape[0]):
        if inside:
            logits = affine(x, weight[words], bias[words])
        else:
            logits = product_fp32(x, weight[words].t())
        if in_one:
            top[:, words] = torch.segment_reduce(logits, "max", lengths=lengths, unsafe=True)
            continue
        for b, first, end in sequences:
            if first == end:
                continue
            if save:
                top[b, words], index = logits[first:end].max(0)
                won[b, words] = index + first
            else:
                top[b, words] = logits[first:end].amax(0)
    if bias is not None and not inside:
        top += bias
    top = top.masked_fill_((lengths == 0).unsqueeze(1), 0.0).relu_()
    slope = torch.where(top <= 0, 0.0, 1 / (1 + top)) if save else top  # NaN of NaN
    return top.log1p().to(x.dtype), won, slope


def _backward(dy, x, weight, bias, cu_seqlens, won, slope, *, needs) -> tuple[Tensor | None, ...]:
    g = dy * slope  # [B, V]
    db = g.sum(0).to(x.dtype) if needs[2] else None
    dx = torch.zeros_like(x, dtype=slope.dtype)
    dw = torch.zeros_like(weight)
    had = (slope != 0).any(0).nonzero().flatten()
    for words in _chunks(x, had.shape[0]) if needs[0] or needs[1] else ():
        some = had[words]
        # [T, words]: one value per sequence and word, in the row of the token that won.
        dense = x.new_zeros(x.shape[0], some.shape[0], dtype=slope.dtype)
        dense.scatter_add_(0, won[:, some], g[:, some])
        dense = dense.to(x.dtype)
        if needs[0]:
            dx += product_fp32(dense, weight[some])
        if needs[1]:
            dw[some] = product_fp32(dense.t(), x).to(x.dtype)
    return (dx.to(x.dtype) if needs[0] else None, dw if needs[1] else None, db)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    for name, lengths, hidden, vocabulary, has_bias in (
        ("ragged", (7, 1, 40), 64, 301, True),
        ("no_bias", (5, 9), 32, 99, False),
        ("odd", (3, 4), 37, 1031, True),
        ("empty_sequences", (0, 5, 0, 2, 0), 16, 41, True),
        ("no_sequences", (), 16, 41, True),
        # More logits than are held at a time.
        ("chunks", (700, 1400), 8, 1999, True),
    ):
        bounds = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
        weight = draw(vocabulary, hidden, scale=hidden**-0.5)
        # Most words absent, as a trained model has it: the bias is below most logits.
        bias = draw(vocabulary) - 1.0 if has_bias else None
        yield Sample(name, (draw(sum(lengths), hidden), weight, bias, bounds))


def cost(x, weight, bias, cu_seqlens) -> tuple[int, int]:
    words = (cu_seqlens.shape[0] - 1) * weight.shape[0]
    moved = x.numel() + weight.numel() + words
    return 2 * x.shape[0] * weight.numel(), moved * x.element_size()


OP = Op(
    name="splade",
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(Kernel("aten", _forward, _backward, lambda *args: []),),
    samples=samples,
    cost=cost,
    differentiable=("x", "weight", "bias"),
    residuals=2,
)


def splade(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    backend: str | Chooser = "auto",
) -> Tensor:
    """max over each sequence of log(1 + relu(x W^T + b)), without the logits; arXiv 2109.10086.

    Args:
        x: [T, E], fp32, bf16 or fp16 (or fp64): packed tokens, as the head's decoder takes them.
        weight: [V, E], usually the word embeddings; bias: [V] or None.
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [B, V] in x's dtype, 0 or more; zeros for an empty sequence.
    Raises: ValueError for a wrong shape, device or backend; TypeError for a wrong dtype.
    """
    return OP(x, weight, bias, cu_seqlens, backend=backend)
