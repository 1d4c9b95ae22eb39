"""unpad: y = x[indices];  pad: y[indices] = x, zeros elsewhere.

The way into and out of the packed layout, once each per forward. Each is the other's gradient
(indices are distinct): dunpad(dy) = pad(dy), dpad(dy) = dy[indices].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks
from .backends import cpu_kernels, triton_kernel
from .registry import Chooser, Op, Sample


def reference_unpad(x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(0, indices)


def reference_pad(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, x.shape[1]).index_copy(0, indices, x)


def check_unpad(x, indices) -> None:
    checks.rank("unpad", "x", x, 2)
    checks.rank("unpad", "indices", indices, 1)
    checks.indices("unpad", indices)


def check_pad(x, indices, rows) -> None:
    checks.rank("pad", "x", x, 2)
    checks.indices("pad", indices)
    checks.shape("pad", "indices", indices, (x.shape[0],))


def fake_unpad(x, indices, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(indices.shape[0], x.shape[1]),)


def fake_pad(x, indices, rows, *, save) -> tuple[Tensor, ...]:
    return (x.new_empty(rows, x.shape[1]),)


def _cases(device: torch.device) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Per case a padded batch and the rows of it that are kept."""
    generator = torch.Generator().manual_seed(0)
    for name, rows, hidden, keep in (
        ("ragged", 48, 64, 0.5),
        ("odd", 21, 37, 0.7),
        ("all", 12, 32, 1.0),
        ("none", 12, 32, 0.0),
    ):
        mask = torch.rand(rows, generator=generator) < keep
        x = torch.randn(rows, hidden, generator=generator)
        yield name, x, mask.nonzero().flatten().to(device)


def samples_unpad(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for name, x, indices in _cases(device):
        yield Sample(name, (x.to(device, dtype), indices))


def samples_pad(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for name, x, indices in _cases(device):
        yield Sample(name, (x.to(device, dtype)[indices], indices, x.shape[0]))


def cost_unpad(x, indices) -> tuple[int, int]:
    return 0, 2 * indices.numel() * x.shape[1] * x.element_size()


def cost_pad(x, indices, rows) -> tuple[int, int]:
    return 0, (x.numel() + rows * x.shape[1]) * x.element_size()


UNPAD = Op(
    name="unpad",
    arguments="Tensor x, Tensor indices",
    reference=reference_unpad,
    check=check_unpad,
    fake=fake_unpad,
    kernels=(*cpu_kernels("unpad"), triton_kernel("unpad")),
    samples=samples_unpad,
    cost=cost_unpad,
    differentiable=("x",),
)
PAD = Op(
    name="pad",
    arguments="Tensor x, Tensor indices, SymInt rows",
    reference=reference_pad,
    check=check_pad,
    fake=fake_pad,
    kernels=(*cpu_kernels("pad"), triton_kernel("pad")),
    samples=samples_pad,
    cost=cost_pad,
    differentiable=("x",),
)


def unpad(x: Tensor, indices: Tensor, backend: str | Chooser = "auto") -> Tensor:
    """x[indices]: the kept rows of a padded batch.

    Args:
        x: [R, H] rows of a padded batch (R = batch * length).
        indices: [T] int64, distinct rows to keep.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H] in x's dtype.
    Raises: ValueError for a wrong shape, device or backend; TypeError for a wrong dtype.
    """
    return UNPAD(x, indices, backend=backend)


def pad(x: Tensor, indices: Tensor, rows: int, backend: str | Chooser = "auto") -> Tensor:
    """The padded batch whose rows `indices` are x and whose other rows are zero.

    Args:
        x: [T, H] packed rows.
        indices: [T] int64, distinct rows to fill, each below `rows`.
        rows: R = batch * length.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [R, H] in x's dtype.
    Raises: ValueError for a wrong shape, device or backend; TypeError for a wrong dtype.
    """
    return PAD(x, indices, rows, backend=backend)
