"""y[indices] = x, zeros elsewhere, with `rows` rows; its gradient is dy[indices].

The same two row copies as unpad, in the other order.
"""

import torch

from .unpad import gather_rows, scatter_rows


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    indices = torch.empty(64, dtype=torch.int64, device=device)
    for n_cols in (37, 768):
        x = torch.empty((64, n_cols), dtype=dtype, device=device)
        yield f"{n_cols}", (x, indices, 128)


def forward(x, indices, rows, save):
    return (scatter_rows(x, indices, rows),)


def backward(dy, x, indices, rows, needs):
    return (gather_rows(dy, indices) if needs[0] else None,)
