"""masked_lm_loss: mean over rows with labels[t] != -100 of logsumexp(l_t) - l_t[labels[t]].

The loss of masked language modelling (Devlin et al., arXiv 1810.04805) with the logits
l = x W^T + b computed on the scored rows only and a few rows at a time: neither [T, V] nor
[scored, V] is ever held. With n scored rows, p = softmax(l) and g = (p - onehot(labels)) / n:

    dx = dloss g W (zero rows where not scored),  dW = dloss g^T x,  db = dloss sum_t g

All three are known as soon as a chunk's logits are, so the forward computes them and the logits
are never computed twice (as in Liger-Kernel, Hsu et al., arXiv 2410.10989). Saved: n times the
gradients at dloss = 1, in fp32, so that nothing that a loss scale would rescue is lost in fp16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .linear import check as check_linear
from .modes import valueless
from .products import affine, product_fp32, sums_dtype
from .registry import Chooser, Kernel, Op, Sample

IGNORED = -100

# Rows and logits held at a time: enough to keep GEMMs busy; on a CPU, near its last-level cache.
_ROWS, _LOGITS = 1024, {"cpu": 2**23, "cuda": 2**27}


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, all_scored: bool
) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(sums_dtype(x)), labels.long(), ignore_index=IGNORED)


def check(x, weight, bias, labels, all_scored) -> None:
    op = "masked_lm_loss"
    check_linear(x, weight, bias, op)
    checks.shape(op, "labels", labels, (x.shape[0],))
    checks.integers(op, "labels", labels)
    if labels.device.type != "cpu" or valueless(labels) or not labels.numel():
        return  # asking about values would stall a GPU's queue
    wrong = (labels < 0) | (labels >= weight.shape[0])
    if not all_scored:
        wrong &= labels != IGNORED
    if wrong.any():
        value = int(labels[wrong][0])
        more = " with all_scored" if value == IGNORED else f", or {IGNORED} for what is not scored"
        raise IndexError(
            f"bert_fast.{op}: labels contains {value}, expected 0 to {weight.shape[0] - 1}{more}"
        )


def fake(x, weight, bias, labels, all_scored, *, save) -> tuple[Tensor, ...]:
    wide = sums_dtype(x)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape, dtype=wide),
        x.new_empty(weight.shape, dtype=wide),
        x.new_empty(weight.shape[0], dtype=wide),
        x.new_empty((), dtype=wide),
    )


def _forward(x, weight, bias, labels, all_scored, *, save) -> tuple[Tensor, ...]:
    wide, vocabulary = sums_dtype(x), weight.shape[0]
    rows, kept = x, None
    if not all_scored:  # counting them waits for all that a GPU has been given to do
        kept = (labels != IGNORED).nonzero().flatten()
        rows, labels = x[kept], labels[kept]
    targets = labels.long()
    held = _LOGITS.get(x.device.type, 2**23)
    step = max(1, min(_ROWS, held // max(vocabulary, 1)))
    total = x.new_zeros((), dtype=wide)
    dx = torch.zeros_like(x, dtype=wide) if save else total
    dw = torch.zeros_like(weight, dtype=wide) if save else total
    db = x.new_zeros(vocabulary, dtype=wide) if save else total
    # Rounded to fp16, probabilities of a large vocabulary would be subnormal or zero.
    scale = 1024.0 if x.dtype == torch.float16 else 1.0
    for first in range(0, rows.shape[0], step):
        here = slice(first, first + step)
        some, target = rows[here], targets[here].unsqueeze(1)
        logits = affine(some, weight, bias).to(wide)
        log_p = F.log_softmax(logits, -1)
        del logits
        total -= log_p.gather(1, target).sum()
        if not save:
            continue
        g = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
        db += g.sum(0)
        if g.dtype != x.dtype:
            g = g.mul_(scale).to(x.dtype)
        dx[here if kept is None else kept[here]] = product_fp32(g, weight)
        if g.dtype == wide:
            dw.addmm_(g.t(), some)
        else:
            dw += product_fp32(g.t(), some)
    if save and scale != 1.0:
        dx, dw = dx / scale, dw / scale
    n = total.new_full((), rows.shape[0])  # no scored row: 0 / 0, as in PyTorch
    return total / n, dx, dw, db, n


def _backward(
    dy, x, weight, bias, labels, all_scored, dx, dw, db, n, *, needs
) -> tuple[Tensor | None, ...]:
    factor = dy / n.clamp(min=1)
    found = zip((dx, dw, db), needs, strict=True)
    return tuple((g * factor).to(x.dtype) if need else None for g, need in found)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    for name, tokens, hidden, vocabulary, share, has_bias in (
        ("fifteen_percent", 80, 32, 301, 0.15, True),
        ("every_row", 21, 64, 99, 1.0, True),
        ("no_bias", 40, 16, 64, 0.5, False),
        ("odd", 31, 37, 41, 0.4, True),
        ("one_token", 1, 32, 50, 1.0, True),
        # More rows than are held at a time.
        ("chunks", 1300, 8, 51, 0.9, True),
        ("chunks_of_every_row", 1300, 8, 51, 1.0, True),
    ):
        labels = torch.randint(vocabulary, (tokens,), generator=generator)
        labels[torch.rand(tokens, generator=generator) >= share] = IGNORED
        weight = draw(vocabulary, hidden, scale=2.0 * hidden**-0.5)
        bias = draw(vocabulary) if has_bias else None
        yield Sample(name, (draw(tokens, hidden), weight, bias, labels.to(device), share == 1.0))
    # One row is sure of its label and one is sure of another: p - 1 cancels, -log p is large.
    x = torch.eye(3, 16).to(device, dtype) * 40.0
    labels = torch.tensor([0, 5, IGNORED], device=device, dtype=torch.int32)
    yield Sample("sure", (x, torch.eye(20, 16).to(device, dtype), None, labels, False))


def cost(x, weight, bias, labels, all_scored) -> tuple[int, int]:
    scored = int((labels != IGNORED).sum())
    elements = x.numel() + weight.numel()
    return 2 * scored * weight.numel(), elements * x.element_size()


OP = Op(
    name="masked_lm_loss",
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor labels, bool all_scored",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(Kernel("aten", _forward, _backward, lambda *args: []),),
    samples=samples,
    cost=cost,
    differentiable=("x", "weight", "bias"),
    residuals=4,
)


def masked_lm_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    backend: str | Chooser = "auto",
    *,
    all_scored: bool = False,
) -> Tensor:
    """Mean cross-entropy of x W^T + b on the scored rows, without the logits; arXiv 1810.04805.

    Args:
        x: [T, E], fp32, bf16 or fp16 (or fp64): the transformed hidden states.
        weight: [V, E], usually the word embeddings; bias: [V] or None.
        labels: [T], int32 or int64, the token of each scored row, -100 for the others.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.
        all_scored: labels has no -100. Then no row is looked for, which on a GPU waits for it.

    Returns: a scalar in fp32 (fp64 for fp64); NaN where no row is scored, with zero gradients,
        as `torch.nn.functional.cross_entropy` has it.
    Raises: ValueError for a wrong shape, device or backend; TypeError for mixed dtypes;
        IndexError, on the CPU, for a label outside the vocabulary.
    """
    return OP(x, weight, bias, labels, all_scored, backend=backend)
