"""y = x[indices]; its gradient puts rows back: dx[indices] = dy, zeros elsewhere.

A copy of rows: bits move as integers of the element's size, so every dtype shares one kernel and
nothing is converted. The scatter clears first: the rows it must zero are known only as "the rest".
"""

import functools

import torch
import triton
import triton.language as tl

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache
def config(n_cols: int) -> dict[str, int]:
    """Tiles of 4096 elements, wide before high."""
    cols = max(16, min(1024, triton.next_power_of_2(n_cols)))
    rows = min(16, 4096 // cols)
    return {"ROWS": rows, "COLS": cols, "num_warps": 4, "enable_fp_fusion": True}


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    indices = torch.empty(64, dtype=torch.int64, device=device)
    for n_cols in (37, 768):
        x = torch.empty((128, n_cols), dtype=dtype, device=device)
        yield f"{n_cols}", (x, indices)


@triton.jit(do_not_specialize=["n_rows"])
def _move_kernel(
    x,  # [R, n_cols] source
    indices,  # [n_rows] int64
    y,  # [R', n_cols] output
    n_rows,
    n_cols,
    SCATTER: tl.constexpr,  # y[indices[i]] = x[i], else y[i] = x[indices[i]]
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_col < n_cols)[None, :]
    o_far = tl.load(indices + o_row, mask=m_row, other=0).to(tl.int64)
    if SCATTER:
        o_from, o_to = o_row, o_far
    else:
        o_from, o_to = o_far, o_row
    rows = tl.load(x + o_from[:, None] * n_cols + o_col[None, :], mask=mask)
    tl.store(y + o_to[:, None] * n_cols + o_col[None, :], rows, mask=mask)


def _move(x: torch.Tensor, indices: torch.Tensor, y: torch.Tensor, scatter: bool) -> None:
    n_rows, n_cols = indices.shape[0], y[:1].numel()
    if n_rows and n_cols:
        kind = INTEGERS[x.element_size()]
        cfg = config(n_cols)
        grid = triton.cdiv(n_rows, cfg["ROWS"]), triton.cdiv(n_cols, cfg["COLS"])
        _move_kernel[grid](x.view(kind), indices, y.view(kind), n_rows, n_cols, scatter, **cfg)


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x[indices]."""
    y = x.new_empty((indices.shape[0], *x.shape[1:]))
    _move(x, indices, y, False)
    return y


def scatter_rows(x: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ...] with x at `indices` and zeros elsewhere."""
    y = x.new_zeros((rows, *x.shape[1:]))
    _move(x, indices, y, True)
    return y


def forward(x, indices, save):
    return (gather_rows(x, indices),)


def backward(dy, x, indices, needs):
    return (scatter_rows(dy, indices, x.shape[0]) if needs[0] else None,)
