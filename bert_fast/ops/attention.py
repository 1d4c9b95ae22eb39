"""attention: softmax(scale Q K^T + bias) V over packed sequences of any length.

For the rows of one sequence and one head, with P the softmax and M the dropout mask / (1 - p):

    out = (P * M) V                         lse = logsumexp_k(scale q k + bias)
    dV = (P * M)^T dout,  dP = M * (dout V^T),  delta = rowsum(P * dP) = rowsum(dout * out)
    dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q

Computed block by block without the S x S matrix (FlashAttention-2: Dao, arXiv 2307.08691).
Saved: the inputs, out and lse in fp32. A query row without keys gives zeros.

`key_start` exists for one BERT habit: the pooler reads column 0 even where it is masked, so that
row is kept as a query, first in its sequence, and is no key.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks
from .backends import cpu_kernels, cuda_kernel, triton_kernel, with_tritons_backward
from .registry import Chooser, Kernel, Op, Sample
from .rng import keep_mask


def reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    key_start: Tensor | None,
    bias: Tensor | None,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    heads = qkv.shape[2]
    bounds = cu_seqlens.tolist()
    starts = bounds[:-1] if key_start is None else key_start.tolist()
    outputs = []
    for b, (start, end, first) in enumerate(zip(bounds[:-1], bounds[1:], starts, strict=True)):
        q = qkv[start:end, 0].transpose(0, 1)  # [N, S, D]
        k, v = (qkv[first:end, i].transpose(0, 1) for i in (1, 2))
        scores = (q @ k.transpose(1, 2)) * scale  # [N, S, keys]
        if bias is not None:
            one = bias[b if bias.shape[0] > 1 else 0]
            scores = scores + one[:, : end - start, first - start : end - start].to(scores.dtype)
        # A row without keys: softmax of nothing (or of -inf only) is defined as zeros here.
        alive = (scores != -torch.inf).any(-1, keepdim=True)
        probabilities = torch.where(alive, scores, 0.0).softmax(-1).where(alive, 0.0)
        if p > 0.0:
            assert seed is not None
            token = torch.arange(start, end, device=qkv.device).view(1, -1, 1)
            head = torch.arange(heads, device=qkv.device).view(-1, 1, 1)
            cols = torch.arange(first - start, end - start, device=qkv.device)
            keep = keep_mask(seed, token * heads + head, cols, p)
            probabilities = torch.where(keep, probabilities / (1.0 - p), 0.0)
        outputs.append((probabilities @ v).transpose(0, 1))
    return torch.cat(outputs) if outputs else qkv[:, 0].clone()


def check(qkv, cu_seqlens, key_start, bias, max_seqlen, scale, p, seed) -> None:
    op = "attention"
    checks.rank(op, "qkv", qkv, 4)
    if qkv.shape[1] != 3:
        raise ValueError(f"bert_fast.{op}: qkv has shape {tuple(qkv.shape)}, expected (T, 3, N, D)")
    checks.rank(op, "cu_seqlens", cu_seqlens, 1)
    checks.cu_seqlens(op, cu_seqlens)
    batch, heads = cu_seqlens.shape[0] - 1, qkv.shape[2]
    checks.shape(op, "key_start", key_start, (batch,))
    if bias is not None and (
        bias.dim() != 4
        or bias.shape[0] not in (1, batch)
        or bias.shape[1] not in (1, heads)
        or bias.shape[2] < max_seqlen
        or bias.shape[3] < max_seqlen
    ):
        raise ValueError(
            f"bert_fast.{op}: bias has shape {tuple(bias.shape)}, expected (1 or {batch}, "
            f"1 or {heads}, S, S) with S >= max_seqlen = {max_seqlen}"
        )
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"bert_fast.{op}: bias wants a gradient, which this op does not give")
    checks.dropout(op, p, seed)


def fake(
    qkv, cu_seqlens, key_start, bias, max_seqlen, scale, p, seed, *, save
) -> tuple[Tensor, ...]:
    tokens, _, heads, width = qkv.shape
    return qkv.new_empty(tokens, heads, width), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _width(qkv: Tensor, *rest) -> list[str]:
    return [] if 8 <= qkv.shape[3] <= 128 else [f"head_dim is {qkv.shape[3]}, not 8 to 128"]


def _scale(scale: float) -> list[str]:
    if scale > 0.0:
        return []
    return [f"scale is {scale}: the maximum is taken before scaling, so it must be > 0"]


def _triton_limits(qkv: Tensor, *rest) -> list[str]:
    return _width(qkv, *rest) + _scale(rest[4])


def _cuda_limits(qkv: Tensor, cu_seqlens, key_start, bias, max_seqlen, scale, *rest) -> list[str]:
    found = _scale(scale)
    if qkv.dtype == torch.float32:
        found.append("fp32: the tensor-core kernel is for bf16 and fp16")
    if qkv.shape[3] not in (32, 64, 128):
        found.append(f"head_dim is {qkv.shape[3]}, not 32, 64 or 128")
    if bias is not None:
        found.append("additive bias is not supported")
    return found


def _wide_forward(qkv, *rest, save) -> tuple[Tensor, ...]:
    """Scores before they are scaled may be more than fp16 holds, and lose digits in bf16."""
    with torch.no_grad():
        y = reference(qkv.float(), *rest).to(qkv.dtype)
    return y, torch.zeros_like(fake(qkv, *rest, save=save)[1])


def _wide_backward(dy, qkv, *rest, needs) -> tuple[Tensor]:
    wide = qkv.detach().float().requires_grad_()
    with torch.enable_grad():
        y = reference(wide, *rest[:-2])  # without the output and what else was kept
    return (torch.autograd.grad(y, wide, dy.float())[0].to(qkv.dtype),)


def _wide_limits(qkv: Tensor, *rest) -> list[str]:
    if qkv.dtype in (torch.float16, torch.bfloat16):
        return []
    return [f"{qkv.dtype}: as the reference, in fp32, for fp16 and bf16"]


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)
    infinity = torch.inf

    def case(name, lengths, heads, width, *, skip=(), bias=None, p=0.0, alike=False) -> Sample:
        tokens, longest = sum(lengths), max((0, *lengths))
        qkv = torch.randn(tokens, 3, heads, width, generator=generator)
        if alike:
            qkv[:, 0] *= 0.1
            qkv[:, 1:] += 8.0
        bounds = torch.tensor((0, *lengths)).cumsum(0)
        key_start = bounds[:-1] + torch.tensor(skip) if skip else None
        if bias is not None:
            bias = torch.randn(*bias, longest, longest, generator=generator)
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.2, -infinity)
            bias[..., 1, :] = -infinity  # one query row that sees no key
            if dtype != torch.float64:  # one that sees all alike; finite differences would be 0
                bias[..., 2, :] = torch.finfo(dtype).min
            bias = bias.to(device, dtype)
        seed = torch.tensor([31337 << 20], device=device) if p else None
        bounds = bounds.to(device, torch.int32)
        if key_start is not None:
            key_start = key_start.to(device, torch.int32)
        qkv = qkv.to(device, dtype)
        return Sample(name, (qkv, bounds, key_start, bias, longest, width**-0.5, p, seed))

    yield case("ragged", (3, 29, 1, 17), 2, 32)
    # More keys than any kernel takes at once (the C++ one: 256), so that blocks are rescaled.
    yield case("longer_than_a_block", (270, 20, 150), 1, 32, skip=(1, 0, 0))
    yield case("head_dim_8", (5, 9), 3, 8)
    yield case("head_dim_40", (20, 33), 2, 40)
    yield case("head_dim_128", (18,), 1, 128)
    # More keys than the interpreter's blocks of 32 have, with and without a first one to skip.
    yield case("masked_first_column", (4, 37, 1, 35), 2, 32, skip=(1, 0, 1, 1))
    yield case("bias", (7, 12), 2, 16, bias=(2, 2))
    yield case("bias_broadcast", (7, 12), 2, 32, bias=(1, 1))
    yield case("dropout", (9, 21), 2, 32, p=0.25)
    # Tokens alike, as after many layers: dQ and dK are right only if the rows of dS sum to 0.
    yield case("alike", (50, 1, 9), 2, 32, alike=True)
    yield case("empty_sequences", (0, 6, 0), 2, 32)
    yield case("no_sequences", (), 2, 32)


def cost(qkv, cu_seqlens, *rest) -> tuple[int, int]:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).double()
    _, _, heads, width = qkv.shape
    flops = 4 * heads * width * int((lengths * lengths).sum())
    return flops, (qkv.numel() + qkv[:, 0].numel()) * qkv.element_size()


OP = Op(
    name="attention",
    arguments="Tensor qkv, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, "
    "SymInt max_seqlen, float scale, float p, Tensor? seed",
    reference=reference,
    check=check,
    fake=fake,
    kernels=(
        *cpu_kernels("attention", limits=_width),
        with_tritons_backward(
            cuda_kernel("attention", limits=_cuda_limits, has_backward=False), "attention"
        ),
        triton_kernel("attention", limits=_triton_limits),
        Kernel("aten", _wide_forward, _wide_backward, _wide_limits),
    ),
    samples=samples,
    cost=cost,
    differentiable=("qkv",),
    residuals=1,
    saves_output=True,
    lead="qkv",
)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    key_start: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Chooser = "auto",
) -> Tensor:
    """softmax(scale Q K^T + bias) V within each packed sequence; arXiv 2307.08691.

    Args:
        qkv: [T, 3, N, D] packed tokens, fp32, bf16 or fp16 (fp64 through the reference);
            kernels take D from 8 to 128.
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        max_seqlen: an upper bound of the longest sequence.
        scale: multiplies the scores, usually D ** -0.5.
        key_start: [B] int32 or None; the first row of each sequence that is a key.
        bias: [B or 1, N or 1, S, S] or None, added to the scores of (query, key) counted
            within a sequence; -inf forbids a key.
        p, seed: dropout of the probabilities in [0, 1) and its int64 [1] seed.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, N, D] in qkv's dtype; zeros for a query that sees no key.
    Raises: ValueError for a wrong shape, p, device or backend and for a bias that wants a gradient;
        TypeError for a wrong dtype.
    """
    return OP(qkv, cu_seqlens, key_start, bias, max_seqlen, scale, p, seed, backend=backend)
