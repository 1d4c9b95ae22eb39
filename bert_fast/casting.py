"""Casts under autocast, those of one op together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops.modes import tracing


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, or None: where it is off, and of fp64, which it leaves alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, else as they are.

    As `Tensor.to` has it, gradients included, but with one autograd node and one launch for all.
    """
    tensors, dtype = (first, *rest), autocast_dtype(first)
    if dtype is None:
        return tensors
    if tracing():
        return tuple(None if t is None else t.to(dtype) for t in tensors)
    # A node's outputs all require a gradient: what is frozen must not be among its inputs.
    grad = torch.is_grad_enabled()
    learned = [grad and t is not None and t.requires_grad and t.dtype != dtype for t in tensors]
    in_graph = iter(_Cast.apply(dtype, *compress(tensors, learned)) if any(learned) else ())
    others = [None if yes else t for t, yes in zip(tensors, learned, strict=True)]
    others = in_dtypes(others, [dtype] * len(others))
    return tuple(next(in_graph) if yes else t for t, yes in zip(others, learned, strict=True))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(in_dtypes(tensors, [dtype] * len(tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *in_dtypes(grads, ctx.dtypes)


def in_dtypes(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """The tensors in these dtypes, copied in one launch for each dtype and without a gradient; what
    has its dtype already, as it is."""
    made: list[Any] = [
        t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [(new, t) for new, t in zip(made, tensors, strict=True) if new is not t]
    for to in {new.dtype for new, _ in pairs}:  # of several at once, some GPU builds took the first
        some = [pair for pair in pairs if pair[0].dtype == to]
        torch._foreach_copy_([new for new, _ in some], [t for _, t in some])
    return made
