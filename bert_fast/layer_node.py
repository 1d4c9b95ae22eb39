"""A layer in training as one autograd node: the ops of `modeling.layer_forward`, in its order.

Values and gradients are those of the ops one by one, bit for bit: the same kernels run. A node of
autograd costs Python more than many a kernel takes on a GPU, and so does every cast under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .casting import autocast_dtype, in_dtypes
from .ops.add_layernorm import OP as ADD_LAYERNORM
from .ops.attention import OP as ATTENTION
from .ops.encoder import LAYER
from .ops.feed_forward import OP as FEED_FORWARD
from .ops.linear import OP as LINEAR
from .ops.modes import without_autocast
from .ops.padding import UNPAD
from .ops.qkv_linear import OP as QKV_LINEAR
from .ops.registry import Kernel, Op, contiguous, keep, kept, refuse_second_gradient
from .paths import Backend, Sequences, chosen, like

# Those that the norms add are not cast: norms run in the dtype of the weights.
_MULTIPLIED = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "out", "up", "up_bias", "down")


class Settings(NamedTuple):
    """What of a layer is no gradient's business. rates, seeds: dropout of the probabilities, after
    attention, after the feed-forward network; seeds are None where the rate is 0."""

    sequences: Sequences
    heads: int
    scale: float
    eps: tuple[float, float]
    activation: str | None
    rates: tuple[float, float, float]
    seeds: tuple[Tensor | None, Tensor | None, Tensor | None]
    recompute: bool
    rows: Tensor | None
    backend: Backend


def applies(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all that a layer reads wants a gradient: single nodes leave out what does not."""
    return torch.is_grad_enabled() and x.requires_grad and all(w.requires_grad for w in weights)


def layer_node(x: Tensor, weights: Sequence[Tensor], settings: Settings) -> Tensor:
    """A post-LN layer of plain modules on packed tokens [T, H] -> [T, H], or [R, H] of the rows.

    weights: in the order of `ops.encoder.LAYER`. Under autocast, as `modeling` has it: products
    and attention in its dtype, norms and the residual in that of x and the weights.
    """
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x.device.type):
        return _Layer.apply(settings, dtype, x, *weights)


class _Step(NamedTuple):
    """An op that has run. values: its arguments, then what its kernel keeps for backward."""

    op: Op
    kernel: Kernel
    values: list[Any]

    def gradients(self, dy: Tensor) -> list[Any]:
        return self.op.backward(self.kernel, dy, self.values, self.op.given(self.values))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Settings, dtype: torch.dtype, x: Tensor, *weights: Tensor) -> Tensor:
        steps: list[_Step] = []
        run = partial(_run, steps, s.backend)
        w = dict(zip(LAYER, weights, strict=True))
        cast = in_dtypes([w[name] for name in _MULTIPLIED], [dtype] * len(_MULTIPLIED))
        # As the weights: no other copy is worth keeping of a copy that is true for one step.
        w |= zip(_MULTIPLIED, [t.requires_grad_() for t in cast], strict=True)
        eps, (p0, p1, p2), (s0, s1, s2), about = s.eps, s.rates, s.seeds, s.sequences

        qkv = run(QKV_LINEAR, x.to(dtype), *(w[name] for name in LAYER[:6]))
        qkv = qkv.view(x.shape[0], 3, s.heads, w["q"].shape[0] // s.heads)  # [T, 3, N, D]
        c = run(
            ATTENTION, qkv, about.cu_seqlens, about.key_start, like(about.bias, qkv),
            about.max_seqlen, s.scale, p0, s0,
        ).flatten(1)  # fmt: skip
        if s.rows is not None:
            c, x = run(UNPAD, c, s.rows), run(UNPAD, x, s.rows)
        y = run(LINEAR, c, w["out"], None).to(x.dtype)
        norm = w["out_norm"], w["out_norm_bias"]
        h = run(ADD_LAYERNORM, y, w["out_bias"], x, *norm, eps[0], p1, s1)
        up = w["up"], w["up_bias"]
        y = run(FEED_FORWARD, h.to(dtype), *up, w["down"], s.activation, s.recompute).to(x.dtype)
        norm = w["down_norm"], w["down_norm_bias"]
        out = run(ADD_LAYERNORM, y, w["down_bias"], h, *norm, eps[1], p2, s2)

        ctx.dtype, ctx.dtypes = dtype, [weight.dtype for weight in weights]
        ctx.ran = [(step.op, step.kernel, len(step.values)) for step in steps]
        keep(ctx, [value for step in steps for value in step.values])
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_second_gradient("layer")
        values, g = iter(kept(ctx)), {}
        steps = [_Step(op, kernel, list(islice(values, count))) for op, kernel, count in ctx.ran]
        qkv, attention, *taken, out, first_norm, feed_forward, second_norm = steps
        dz, g["down_bias"], dh, g["down_norm"], g["down_norm_bias"] = second_norm.gradients(dy)
        more, g["up"], g["up_bias"], g["down"] = feed_forward.gradients(dz.to(ctx.dtype))
        dh = dh + more  # in the wider dtype of the two
        dz, g["out_bias"], dx, g["out_norm"], g["out_norm_bias"] = first_norm.gradients(dh)
        dc, g["out"], _ = out.gradients(dz.to(ctx.dtype))
        if taken:
            (dc,), (dx,) = (step.gradients(d) for step, d in zip(taken, (dc, dx), strict=True))
        heads_and_width = attention.values[0].shape[2:]
        (dqkv,) = attention.gradients(dc.view(dc.shape[0], *heads_and_width))
        more, *grads = qkv.gradients(dqkv.flatten(1))
        g |= zip(LAYER, grads, strict=False)
        return None, None, dx + more, *in_dtypes([g[name] for name in LAYER], ctx.dtypes)


def _run(steps: list[_Step], backend: Backend, op: Op, *args: Any) -> Tensor:
    """Runs an op without autograd and notes it."""
    op.validate(args)
    with torch.enable_grad():  # kernels are asked whether they can train
        kernel = op.choose(args, chosen(backend, op.name))
    args = tuple(map(contiguous, args))
    outputs = kernel.forward(*args, save=True)
    steps.append(_Step(op, kernel, op.for_backward(args, outputs)))
    return outputs[0]
