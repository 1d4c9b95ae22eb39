"""Casts under autocast, those of one op together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops.modes import tracing


def cast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, else as they are.

    As `Tensor.to` has it, gradients included, but with one autograd node and one launch for all: a
    layer in training has 28 to cast in a step.
    """
    tensors, kind = (first, *rest), first.device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    if tracing():
        return tuple(None if t is None else t.to(dtype) for t in tensors)
    others = [t for t in tensors if t is not None and t.dtype != dtype]
    # A node's outputs all require a gradient: what is frozen must not be among its inputs.
    learned = [torch.is_grad_enabled() and t.requires_grad for t in others]
    in_graph = iter(_Cast.apply(dtype, *compress(others, learned)) if any(learned) else ())
    frozen = [(t, dtype) for t, yes in zip(others, learned, strict=True) if not yes]
    outside = iter(copies(frozen))
    done = iter([next(in_graph if yes else outside) for yes in learned])
    return tuple(t if t is None or t.dtype == dtype else next(done) for t in tensors)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(copies([(t, dtype) for t in tensors]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(g, to) for g, to in zip(grads, ctx.dtypes, strict=True) if g is not None]
        found = iter(copies(there))
        return None, *(None if g is None else next(found) for g in grads)


def copies(wanted: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
    """Of each tensor one in the dtype beside it, in one launch; without a gradient."""
    made = [torch.empty_like(t, dtype=to) for t, to in wanted]
    if made:
        torch._foreach_copy_(made, [t for t, _ in wanted])
    return made
