"""The yardstick: error against fp64 at most 2x that of same-dtype PyTorch, plus one ulp.

3x for gradients. No tolerance is picked by hand: the budget comes from the reference's own error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import compare, widened
from bert_fast.ops import OPS
from bert_fast.ops.registry import Op, Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
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
    return [s.name for s in OPS[op].samples(CPU, torch.float32)]


@functools.cache
def smallest_samples(op: str) -> list[str]:
    """The smallest of several rows for each choice of optional arguments and switches.

    For what asks about the contract and not about values: Triton's interpreter is slow.
    """
    best: dict[tuple[Any, ...], tuple[int, str]] = {}
    for size, sample in _sized(op):
        mode = tuple(map(_switch, sample.args))
        best[mode] = min((size, sample.name), best.get(mode, (size, sample.name)))
    return [name for _, name in best.values()]


@functools.cache
def smallest_sample(op: str) -> str:
    """The smallest of several rows, and with the optional arguments of the first sample."""
    absent = [a is None for a in next(iter(OPS[op].samples(CPU, torch.float32))).args]
    alike = [(n, s.name) for n, s in _sized(op) if [a is None for a in s.args] == absent]
    return min(alike)[1]


def _sized(op: str) -> Iterator[tuple[int, Sample]]:
    """Samples of several rows, with their number of elements."""
    lead = OPS[op].names.index(OPS[op].lead)
    for sample in OPS[op].samples(CPU, torch.float32):
        numbers = [a.numel() for a in sample.args if isinstance(a, Tensor)]
        if all(numbers) and sample.args[lead].shape[0] > 1:
            yield sum(numbers), sample


def _switch(argument: Any) -> Any:
    """What kernels go other ways by: names, switches, what is absent or 0."""
    if isinstance(argument, float):
        return argument == 0.0
    return argument if argument is None or isinstance(argument, str | bool) else ...


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


def violations(
    expected: Truth,
    found: list[Tensor | None],
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
        errors = compare(got, exact, plain, 3.0 if i else 2.0)
        assert math.isfinite(errors.budget), f"{name}: the budget itself is {errors.budget}"
        if not errors.holds:
            told.append(f"{name}: error {errors.error:.3e} > budget {errors.budget:.3e}")
    return told
