"""The yardstick: error against fp64 at most 2x that of same-dtype PyTorch, plus one ulp.

3x for gradients. No tolerance is picked by hand: the budget comes from the reference's own error.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import widened
from bert_fast.ops import OPS
from bert_fast.ops.registry import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Truth:
    """fp64 results for one sample, and what same-dtype PyTorch gets: output, then gradients."""

    names: list[str]
    args: tuple[Any, ...]
    dy: Tensor
    exact: list[Tensor | None]
    plain: list[Tensor | None]


@functools.cache
def sample_names(op: str) -> list[str]:
    return [s.name for s in OPS[op].samples(torch.device("cpu"), torch.float32)]


@functools.cache
def smallest_sample(op: str) -> str:
    """The smallest of several rows, and with the optional arguments of the first sample.

    For what asks about the contract and not about values: Triton's interpreter is slow.
    """
    samples = list(OPS[op].samples(torch.device("cpu"), torch.float32))
    absent = [a is None for a in samples[0].args]
    lead, sizes = OPS[op].names.index(OPS[op].lead), {}
    for s in samples:
        numbers = [a.numel() for a in s.args if isinstance(a, Tensor)]
        if [a is None for a in s.args] == absent and all(numbers) and s.args[lead].shape[0] > 1:
            sizes[s.name] = sum(numbers)
    return min(sizes, key=sizes.__getitem__)


@functools.cache
def truth(name: str, sample: str, dtype: torch.dtype) -> Truth:
    op = OPS[name]
    return truth_of(op, next(s.args for s in op.samples(DEVICE, dtype) if s.name == sample))


def truth_of(op: Op, args: tuple[Any, ...]) -> Truth:
    wide = tuple(map(widened, args))
    y = op.reference(*args)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(y)
    return Truth(
        ["y", *(f"d{n}" for n in op.differentiable)],
        args,
        dy,
        results(op, op.reference, wide, dy.double()),
        results(op, op.reference, args, dy),
    )


def leaves_of(op: Op, args: tuple[Any, ...], wanted: tuple[str, ...]) -> tuple[Any, ...]:
    """The arguments, those named in `wanted` as fresh leaves that require a gradient."""
    return tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(a, Tensor) and op.names[i] in wanted
        else a
        for i, a in enumerate(args)
    )


def results(
    op: Op, run: Any, args: tuple[Any, ...], dy: Tensor, wanted: tuple[str, ...] | None = None
) -> list[Tensor | None]:
    """[y, gradient of each differentiable argument] of `run`; of `wanted` only, if given."""
    leaves = leaves_of(op, args, op.differentiable if wanted is None else wanted)
    y = run(*leaves)
    y.backward(dy)
    return [y.detach(), *gradients(op, leaves)]


def gradients(op: Op, leaves: tuple[Any, ...]) -> list[Tensor | None]:
    """Those of the differentiable arguments, in their order."""
    found = [leaves[op.names.index(n)] for n in op.differentiable]
    return [None if leaf is None else leaf.grad for leaf in found]


def trainable(op: Op, backend: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Of which arguments this kernel gives gradients: all, or x alone if weights must be frozen."""
    why = dict(op.reasons(leaves_of(op, args, op.differentiable)))[backend]
    return (op.lead,) if why else op.differentiable


def ulp(scale: float, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale else 0.0


def violations(
    expected: Truth,
    found: list[Tensor | None],
    dtype: torch.dtype,
    wanted: tuple[str, ...] | None = None,
) -> list[str]:
    """What exceeds its budget, in words; empty when all is well."""
    told = []
    for i, (name, exact, plain, got) in enumerate(
        zip(expected.names, expected.exact, expected.plain, found, strict=True)
    ):
        if i and wanted is not None and name[1:] not in wanted:
            continue
        if exact is None:
            if got is not None:
                told.append(f"{name}: a gradient where the reference has none")
            continue
        assert plain is not None
        if got is None or got.shape != exact.shape or got.dtype != plain.dtype:
            told.append(f"{name}: {None if got is None else (got.shape, got.dtype)}")
            continue
        if not exact.numel():
            continue
        error = (got.double() - exact).abs().max().item()
        yardstick = (plain.double() - exact).abs().max().item()
        budget = (3 if i else 2) * yardstick + ulp(exact.abs().max().item(), dtype)
        assert math.isfinite(budget), f"{name}: the budget itself is {budget}"
        if not error <= budget:
            told.append(f"{name}: error {error:.3e} > budget {budget:.3e} (plain {yardstick:.3e})")
    return told
