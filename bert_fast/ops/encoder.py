"""encoder: the post-LN layers of a Transformer (Vaswani et al., arXiv 1706.03762) in one call.

Per layer, by the formulas of the ops in this folder and without dropout:

    c = attention(qkv_linear(x)),  h = add_layernorm(linear(c), x),
    y = add_layernorm(feed_forward(h), h)

Given `rows`, the last layer computes h and what follows for those rows only. With `int8`, every
product with a weight is that of `linear_int8`; then an fp32 model's queries, keys and values, and
what attention gives, are rounded to bf16 where the processor multiplies that as it is (AVX-512
BF16, AMX). For inference on a CPU, where a short input spends more time between ops than in them.
The weights take no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .attention import OP as ATTENTION
from .backends import BF16, ISAS, cpu_reasons, has_isa, openmp
from .bias_gelu import activate
from .feed_forward import OP as FEED_FORWARD
from .linear_int8 import OP as LINEAR_INT8
from .onednn import leads
from .packed_linear import pack, panels
from .qkv_linear import OP as QKV_LINEAR
from .qkv_linear import packed
from .registry import Chooser, Kernel, Op, Sample
from .weight_copies import copy_of, reasons_against_copies

LAYER = (
    *("q", "k", "v", "q_bias", "k_bias", "v_bias"),
    *("out", "out_bias", "out_norm", "out_norm_bias"),
    *("up", "up_bias", "down", "down_bias", "down_norm", "down_norm_bias"),
)


def layers_of(weights: Sequence[Tensor]) -> Iterable[dict[str, Tensor]]:
    """Each layer's weights by the names in `LAYER`."""
    for i in range(0, len(weights), len(LAYER)):
        yield dict(zip(LAYER, weights[i : i + len(LAYER)], strict=True))


def attends_in_bf16(x: Tensor) -> bool:
    """Whether, in int8, attention's operands are rounded to bf16: far finer than their products."""
    return x.dtype == torch.float32 and has_isa(BF16)


def reference(
    x, cu_seqlens, key_start, bias, rows, weights, heads, max_seqlen, eps, activation, int8
) -> Tensor:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        if int8:
            return LINEAR_INT8.reference(x, weight, bias, activation)
        y = F.linear(x, weight, bias)
        return y if activation == "none" else activate(y, activation)

    hidden, last = (x.shape[1],), len(weights) // len(LAYER) - 1
    for i, w in enumerate(layers_of(weights)):
        width = w["q"].shape[0] // heads
        qkv, qkv_bias = packed([w[name] for name in LAYER[:6]], keep=False)
        qkv = linear(x, qkv, qkv_bias)
        if int8 and attends_in_bf16(x):
            qkv = qkv.bfloat16()
        context = ATTENTION.reference(
            qkv.view(-1, 3, heads, width), cu_seqlens, key_start, bias, max_seqlen, width**-0.5,
            0.0, None,
        ).flatten(1).to(x.dtype)  # fmt: skip
        if i == last and rows is not None:
            context, x = context[rows], x[rows]
        h = linear(context, w["out"], w["out_bias"]) + x
        h = F.layer_norm(h, hidden, w["out_norm"], w["out_norm_bias"], eps)
        y = linear(linear(h, w["up"], w["up_bias"], activation), w["down"], w["down_bias"]) + h
        x = F.layer_norm(y, hidden, w["down_norm"], w["down_norm_bias"], eps)
    return x


def check(
    x, cu_seqlens, key_start, bias, rows, weights, heads, max_seqlen, eps, activation, int8
) -> None:
    op = "encoder"
    checks.rank(op, "x", x, 2)
    if not weights or len(weights) % len(LAYER):
        raise ValueError(
            f"bert_fast.{op}: weights has {len(weights)} tensors, expected {len(LAYER)} a layer"
        )
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        raise ValueError(f"bert_fast.{op}: weights want a gradient; run the ops of a layer instead")
    for w in layers_of(weights):
        q, hidden = w["q"], x.shape[1]
        QKV_LINEAR.check(x, *(w[name] for name in LAYER[:6]))
        if heads < 1 or q.shape[0] % heads:
            raise ValueError(
                f"bert_fast.{op}: heads is {heads}, expected a divisor of {q.shape[0]}"
            )
        checks.shape(op, "out", w["out"], (hidden, q.shape[0]))
        FEED_FORWARD.check(x, w["up"], w["up_bias"], w["down"], activation, False)
        checks.shape(op, "down", w["down"], (hidden, w["up"].shape[0]))
        for name in LAYER:
            if name.startswith(("out_", "down_")):
                checks.shape(op, name, w[name], (hidden,))
    like = x.new_empty(0).expand(x.shape[0], 3, heads, 0)
    ATTENTION.check(like, cu_seqlens, key_start, bias, max_seqlen, 1.0, 0.0, None)
    if rows is not None:
        checks.rank(op, "rows", rows, 1)
        checks.indices(op, rows)


def fake(x, cu_seqlens, key_start, bias, rows, *rest, save) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1]),)


def _kernel(name: str, isa: int) -> Kernel:
    def why_not(x, cu_seqlens, key_start, bias, rows, weights, heads, *rest) -> list[str]:
        found = cpu_reasons(x, name, isa)
        if rest[-1] and isa == 0:
            found.append("8-bit products are slow without AVX2")
        for i in () if found else range(0, len(weights), len(LAYER)):
            width = weights[i].shape[0] // heads
            if not 8 <= width <= 128:
                return [f"head_dim is {width}, not 8 to 128"]
        return found or reasons_against_copies(*weights)

    def forward(
        x, cu_seqlens, key_start, bias, rows, weights, heads, max_seqlen, eps, activation, int8,
        *, save,
    ) -> tuple[Tensor]:  # fmt: skip
        kept = table_of(weights, heads, x, isa, int8)  # another thread may drop it meanwhile
        run, rest = torch.ops.bert_fast_cpu.encoder_forward, (eps, activation, openmp(), isa)
        return (run(x, cu_seqlens, key_start, bias, rows, kept.table, *rest),)

    return Kernel(name, forward, None, why_not, device="cpu")


class WeightTable(NamedTuple):
    """The weights of all layers as C++ takes them: a table of their addresses, so they stay beside
    it; who hands the table on has to hold this until C++ is done."""

    table: Tensor
    weights: list[Tensor]


def table_of(
    weights: Sequence[Tensor], heads: int, like: Tensor, isa: int, int8: bool
) -> WeightTable:
    """like: of the dtype of what will be multiplied."""

    def make() -> WeightTable:
        ready = [t for w in layers_of(weights) for t in _packed(w, isa, int8)]
        return WeightTable(torch.ops.bert_fast_cpu.encoder_table(ready, like, heads, isa), ready)

    # By their number too: layer by layer, the first one's weights are the first of both.
    kind = f"encoder {isa} {int8} {len(weights)} {heads}"
    return copy_of(weights, kind, make, itemgetter(1))


def _packed(w: dict[str, Tensor], isa: int, int8: bool) -> Iterable[Tensor]:
    """A layer's weights as C++ takes them: q, k and v as one, matrices in panels, q's apart."""
    three = [w[name] for name in LAYER[:6]]

    def make() -> tuple[Tensor, Tensor]:
        qkv, qkv_bias = packed(three, keep=False)
        assert qkv_bias is not None
        return pack(qkv, isa, int8, apart=three[0].shape[0]), qkv_bias

    # Once where layers share their weights.
    yield from copy_of(three, f"qkv panels {isa} {int8}", make)
    for name in LAYER[6:]:
        if w[name].dim() == 2:
            yield panels(w[name], isa, int8)
        else:
            yield w[name].detach().contiguous()


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    def layer(hidden: int, inner: int, outer: int) -> list[Tensor]:
        def linear(rows: int, depth: int) -> list[Tensor]:
            return [draw(rows, depth, scale=depth**-0.5), draw(rows, scale=0.3)]

        def norm() -> list[Tensor]:
            return [draw(hidden, scale=0.2) + 1.0, draw(hidden, scale=0.2)]

        three = [linear(outer, hidden) for _ in range(3)]
        return [
            *(weight for weight, _ in three),
            *(bias for _, bias in three),
            *(*linear(hidden, outer), *norm()),
            *(*linear(inner, hidden), *linear(hidden, inner), *norm()),
        ]

    for name, lengths, sizes, heads, layers, parts in (
        ("ragged", (3, 19, 1, 14), (64, 96, 64), 2, 1, ""),
        ("rows", (5, 12, 7), (64, 80, 64), 2, 2, "rows"),
        ("bias", (6, 9), (48, 40, 48), 3, 1, "bias rows"),
        ("masked_first_column", (4, 9), (32, 48, 32), 2, 1, "key_start"),
        ("odd", (7, 2), (37, 41, 24), 2, 2, ""),
        ("odd_rows", (7, 0, 2), (37, 41, 24), 2, 2, "rows"),
        ("empty", (), (32, 48, 32), 2, 1, ""),
    ):
        tokens, longest = sum(lengths), max((0, *lengths))
        bounds = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
        key_start = rows = bias = None
        if "key_start" in parts:
            key_start = bounds[:-1] + torch.tensor((1, 0), device=device, dtype=torch.int32)
        if "rows" in parts:
            rows = torch.tensor((0, 5, 6, tokens - 1), device=device)
        if "bias" in parts:
            bias = draw(len(lengths), heads, longest, longest)
        weights = [w for _ in range(layers) for w in layer(*sizes)]
        x = draw(tokens, sizes[0])
        rest = (weights, heads, longest, 1e-12, "gelu", False)
        yield Sample(name, (x, bounds, key_start, bias, rows, *rest))


def cost(x, cu_seqlens, key_start, bias, rows, weights, heads, *rest) -> tuple[int, int]:
    layers, tokens = list(layers_of(weights)), x.shape[0]
    flops = elements = 0
    for w in layers:
        read = tokens if rows is None or w is not layers[-1] else rows.shape[0]
        like = x.new_empty(1).expand(tokens, 3, heads, w["q"].shape[0] // heads)
        after = w["out"].numel() + w["up"].numel() + w["down"].numel()
        flops += ATTENTION.cost(like, cu_seqlens)[0]
        flops += 6 * tokens * w["q"].numel() + 2 * read * after
        elements += 3 * w["q"].numel() + after + (tokens + read) * x.shape[1]
    return flops, elements * x.element_size()


def preferred(like: Tensor) -> bool:
    """Whether one call is preferred to the ops of its layers, where a kernel is willing."""
    return not leads(like)


OP = Op(
    name="encoder",
    arguments="Tensor x, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, Tensor? rows, "
    "Tensor[] weights, int heads, SymInt max_seqlen, float eps, str activation, bool int8",
    reference=reference,
    check=check,
    fake=fake,
    kernels=tuple(_kernel(*item) for item in ISAS.items()),
    samples=samples,
    cost=cost,
    differentiable=("x",),
)


def encoder(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor],
    heads: int,
    eps: float,
    activation: str = "gelu",
    key_start: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    int8: bool = False,
    backend: str | Chooser = "auto",
) -> Tensor:
    """Post-LN encoder layers on packed tokens; arXiv 1706.03762, arXiv 1810.04805.

    Args:
        x: [T, H], fp32, bf16 or fp16 (fp64 through the reference).
        cu_seqlens, max_seqlen, key_start, bias: as in `attention`.
        weights: per layer, in the order of `LAYER`: q, k, v [N D, H] and their biases; out
            [H, N D], its bias, and the weight and bias of its LayerNorm [H]; up [F, H], down
            [H, F], each before its bias; the weight and bias of the second LayerNorm.
        heads: N.
        eps: added to the variance in every LayerNorm.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        rows: [R] int64 or None; which rows of the result are wanted.
        int8: products with weights in 8 bits, as `linear_int8` has them.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H], or [R, H], in x's dtype.
    Raises: ValueError for a wrong shape, number of tensors, activation, device or backend and for
        weights that want a gradient; TypeError for mixed dtypes.
    """
    rest = (list(weights), heads, max_seqlen, eps, activation, int8)
    return OP(x, cu_seqlens, key_start, bias, rows, *rest, backend=backend)
