"""z = dropout(x + linear_bias) + residual; y = weight (z - mean) rstd + bias.

Forward: memory-bound, so a row is read once, held in registers and normalised there. With many
rows a program takes four at once: one load of the parameters and one pair of cross-warp sums serve
them all. Backward: z is recomputed instead of saved (two reads are cheaper than a write and a
read); programs stride over the rows and keep their share of the parameter gradients in registers,
and a second kernel adds the shares in a fixed order: no atomics, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from . import tiles


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    seed = torch.empty(1, dtype=torch.int64, device=device)
    shapes = [(64, 37), (8192, 768), (8192, 8192)]
    if full:
        shapes += [(8192, 384), (64, 768), (8192, 2048), (8192, 4096)]
    for n_rows, n_cols in shapes:
        x, bias, weight = new(n_rows, n_cols), new(n_cols), new(n_cols)
        yield f"{n_rows}x{n_cols}", (x, bias, x, weight, bias, 1e-12, 0.1, seed)
    x, bias, weight = new(8192, 768), new(768), new(768)
    yield "8192x768 no dropout", (x, bias, x, weight, bias, 1e-12, 0.0, None)
    yield "8192x768 bare", (x, None, None, weight, bias, 1e-12, 0.0, None)


@triton.jit
def _row(
    x,
    linear_bias,
    residual,
    p_row,
    o_row,
    o_col,
    mask,
    seed,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    COLS: tl.constexpr,
):
    """z of a tile of rows, and the keep mask used (or `mask`)."""
    z = tiles.load(x + p_row, mask)
    if linear_bias is not None:
        z += tiles.load(linear_bias + o_col[None, :], mask)
    keep = mask
    if DROPOUT:
        keep = tiles.keep_mask(seed, o_row, 0, threshold, COLS) & mask
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual is not None:
        z += tiles.load(residual + p_row, mask)
    return z, keep


@triton.jit(
    do_not_specialize=["n_rows", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _forward_kernel(
    x,  # [n_rows, n_cols]
    linear_bias,  # [n_cols] or None
    residual,  # [n_rows, n_cols] or None
    weight,  # [n_cols]
    bias,  # [n_cols]
    y,  # [n_rows, n_cols] output
    mean,  # [n_rows] float32 output
    rstd,  # [n_rows] float32 output
    seed,  # [1] int64 or None
    n_rows,
    n_cols,
    eps,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    p_row = o_row[:, None] * n_cols + o_col[None, :]
    z, _ = _row(
        x, linear_bias, residual, p_row, o_row, o_col, mask, seed, threshold, keep_scale,
        DROPOUT, COLS,
    )  # fmt: skip
    z_mean, z_rstd = tiles.row_stats(z, mask, n_cols, eps)
    w = tiles.load(weight + o_col, m_col)
    b = tiles.load(bias + o_col, m_col)
    out = (z - z_mean[:, None]) * z_rstd[:, None] * w[None, :] + b[None, :]
    tiles.store(y + p_row, out, mask)
    tl.store(mean + o_row, z_mean, mask=m_row)
    tl.store(rstd + o_row, z_rstd, mask=m_row)


@triton.jit
def _add_part(
    p_part,  # [COLS] pointers, this program's own
    value,  # [COLS]
    o_col,
    n_cols,
    is_first,
):
    """Adds to a sum kept in memory, which nobody has cleared."""
    so_far = tl.where(is_first, 0, n_cols)
    total = value + tl.load(p_part, mask=o_col < so_far, other=0.0)
    tl.store(p_part, total, mask=o_col < n_cols)


@triton.jit(
    do_not_specialize=["n_rows", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _backward_kernel(
    dy,  # [n_rows, n_cols]
    x,  # [n_rows, n_cols]
    linear_bias,  # [n_cols] or None
    residual,  # [n_rows, n_cols] or None
    weight,  # [n_cols]
    mean,  # [n_rows] float32
    rstd,  # [n_rows] float32
    dx,  # [n_rows, n_cols] output, or None
    dresidual,  # [n_rows, n_cols] output, or None
    parts,  # [programs, 3, n_cols] float32 output: dlinear_bias, dweight, dbias; or None
    seed,  # [1] int64 or None
    n_rows,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # the widest rows leave no registers for the weight and for the sums: those stay in memory
    WIDE: tl.constexpr = COLS > 4096
    i_part = tl.program_id(0)
    n_progs = tl.num_programs(0)
    o_col = tl.arange(0, COLS)
    m_col = o_col < n_cols
    if not WIDE:
        w = tiles.load(weight + o_col, m_col)
    p_parts = parts
    if parts is not None:
        p_parts = parts + i_part.to(tl.int64) * 3 * n_cols + o_col
    b_dlinear = tl.zeros((COLS,), tl.float32)
    b_dweight = tl.zeros((COLS,), tl.float32)
    b_dbias = tl.zeros((COLS,), tl.float32)
    for i_row in range(i_part * ROWS, n_rows, n_progs * ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_col[None, :]
        p_row = o_row[:, None] * n_cols + o_col[None, :]
        b_dy = tiles.load(dy + p_row, mask)
        z, keep = _row(
            x, linear_bias, residual, p_row, o_row, o_col, mask, seed, threshold, keep_scale,
            DROPOUT, COLS,
        )  # fmt: skip
        z_mean = tl.load(mean + o_row, mask=m_row, other=0.0)
        z_rstd = tl.load(rstd + o_row, mask=m_row, other=0.0)
        xhat = tl.where(mask, (z - z_mean[:, None]) * z_rstd[:, None], 0.0)
        if parts is not None and not WIDE:
            b_dweight += tl.sum(b_dy * xhat, 0)
            b_dbias += tl.sum(b_dy, 0)
        if parts is not None and WIDE:
            is_first = i_row < n_progs * ROWS
            _add_part(p_parts + n_cols, tl.sum(b_dy * xhat, 0), o_col, n_cols, is_first)
            _add_part(p_parts + 2 * n_cols, tl.sum(b_dy, 0), o_col, n_cols, is_first)
        if WIDE:
            w = tiles.load(weight + o_col, m_col)
        dz = tiles.norm_grad(b_dy, xhat, w, z_rstd, n_cols)
        if dresidual is not None:
            tiles.store(dresidual + p_row, dz, mask)
        if DROPOUT:
            dz = tl.where(keep, dz * keep_scale, 0.0)
        if dx is not None:
            tiles.store(dx + p_row, dz, mask)
        if parts is not None and linear_bias is not None:
            b_dz = tl.sum(tl.where(m_row[:, None], dz, 0.0), 0)
            if WIDE:
                _add_part(p_parts, b_dz, o_col, n_cols, i_row < n_progs * ROWS)
            else:
                b_dlinear += b_dz
        if WIDE:
            tl.debug_barrier()  # the next round reads the sums back
    if parts is not None and not WIDE:
        if linear_bias is not None:
            tl.store(p_parts, b_dlinear, mask=m_col)
        tl.store(p_parts + n_cols, b_dweight, mask=m_col)
        tl.store(p_parts + 2 * n_cols, b_dbias, mask=m_col)


def forward(x, linear_bias, residual, weight, bias, eps, p, seed, save):
    n_rows, n_cols = x.shape
    y = torch.empty_like(x)
    mean = x.new_empty(n_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, False)
        threshold, keep_scale = tiles.dropout_args(p)
        _forward_kernel[(triton.cdiv(n_rows, cfg["ROWS"]),)](
            x, linear_bias, residual, weight, bias, y, mean, rstd, seed, n_rows, n_cols, eps,
            threshold, keep_scale, p > 0.0, **cfg,
        )  # fmt: skip
    return y, mean, rstd


def backward(dy, x, linear_bias, residual, weight, bias, eps, p, seed, mean, rstd, needs):
    n_rows, n_cols = x.shape
    dropout = p > 0.0
    new = torch.empty_like if n_rows else torch.zeros_like
    dresidual = new(x) if residual is not None and needs[2] else None
    # without dropout the two gradients are the same numbers: write them once
    dx = new(x) if needs[0] and (dropout or dresidual is None) else None
    dlinear_bias = new(linear_bias) if linear_bias is not None and needs[1] else None
    dweight = new(weight) if needs[3] else None
    dbias = new(bias) if needs[4] else None
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, True)
        programs = tiles.row_programs(n_rows, cfg, x.device)
        parts = None
        if needs[3] or needs[4] or dlinear_bias is not None:
            parts = x.new_empty((programs, 3, n_cols), dtype=torch.float32)
        threshold, keep_scale = tiles.dropout_args(p)
        _backward_kernel[(programs,)](
            dy, x, linear_bias, residual, weight, mean, rstd, dx, dresidual, parts, seed, n_rows,
            n_cols, threshold, keep_scale, dropout, **cfg,
        )  # fmt: skip
        if parts is not None:
            tiles.sum_parts(parts, dlinear_bias, dweight, dbias)
    return dresidual if dx is None and needs[0] else dx, dlinear_bias, dresidual, dweight, dbias
