"""y_b = v_b / max(|v_b|, 1e-12) if normalize else v_b; v_b = first row or mean of sequence b.

A program owns a sequence, and all its columns when the norm is wanted, so the norm needs no second
kernel; rows come several at a time to keep enough bytes in flight. Backward recomputes v_b (it is
not saved: [B, H] is a small share of reading x) into dv, then a grid over sequences and row chunks
spreads it: rows outside "cls" get explicit zeros, so the output needs no clearing.
"""

import functools

import torch
import triton
import triton.language as tl

from . import tiles

CHUNKS = 16  # programs that share the rows of a sequence when dv is spread over them


@functools.lru_cache
def config(n_cols: int, normalize: bool) -> dict[str, int]:
    """The whole row when its norm is wanted, else narrow blocks: few sequences fill a GPU."""
    cols = max(16, triton.next_power_of_2(n_cols))
    if cols > tiles.MAX_HIDDEN:
        raise ValueError(f"hidden size must be <= {tiles.MAX_HIDDEN}, got {n_cols}")
    if not normalize:
        cols = min(cols, 256)
    rows = max(1, min(16, 16384 // cols))
    warps = 16 if normalize else 8
    return {"ROWS": rows, "COLS": cols, "num_warps": warps, "enable_fp_fusion": True}


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    cu_seqlens = torch.empty(9, dtype=torch.int32, device=device)
    shapes = [(37, "mean", True), (768, "mean", True), (768, "cls", False), (8192, "mean", True)]
    if full:
        shapes += [(384, "mean", True), (768, "mean", False), (768, "cls", True)]
    for n_cols, mode, normalize in shapes:
        x = torch.empty((64, n_cols), dtype=dtype, device=device)
        yield f"{n_cols} {mode} normalize={normalize}", (x, cu_seqlens, mode, normalize)


@triton.jit
def _floored(norm):
    """At least 1e-12; NaN stays, unlike in maximum."""
    return tl.where(norm <= 1e-12, 1e-12, norm)


@triton.jit
def _pooled(
    x,
    start,
    end,
    o_col,
    m_col,
    n_cols,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """v [COLS] of the sequence in rows start..end, 0 if it has none."""
    if MEAN:
        acc = tl.zeros((ROWS, COLS), tl.float32)
        # a long sequence is read by one program: what it waits for are loads one after the other
        for i_row in tl.range(start, end, ROWS, loop_unroll_factor=4):
            o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
            mask = (o_row < end)[:, None] & m_col[None, :]
            acc += tiles.load(x + o_row[:, None] * n_cols + o_col[None, :], mask)
        v = tl.sum(acc, 0) / tl.maximum(end - start, 1).to(tl.float32)
    else:
        limit = tl.where(start < end, n_cols, 0)  # an empty sequence has no first row to read
        v = tiles.load(x + start.to(tl.int64) * n_cols + o_col, o_col < limit)
    return v


@triton.jit
def _forward_kernel(
    x,  # [T, n_cols]
    cu_seqlens,  # [B + 1] int32
    y,  # [B, n_cols] output
    n_cols,
    MEAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_seq = tl.program_id(0)
    start = tl.load(cu_seqlens + i_seq)
    end = tl.load(cu_seqlens + i_seq + 1)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_col = o_col < n_cols
    v = _pooled(x, start, end, o_col, m_col, n_cols, MEAN, ROWS, COLS)
    if NORMALIZE:
        v = v / _floored(tl.sqrt(tl.sum(v * v, 0)))
    tiles.store(y + i_seq.to(tl.int64) * n_cols + o_col, v, m_col)


@triton.jit
def _norm_backward_kernel(
    dy,  # [B, n_cols]
    x,  # [T, n_cols]
    cu_seqlens,  # [B + 1] int32
    dv,  # [B, n_cols] float32 output
    n_cols,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dv = (dy - y (y . dy)) / |v| with y = v / |v|; dy / 1e-12 where the norm is clamped."""
    i_seq = tl.program_id(0)
    start = tl.load(cu_seqlens + i_seq)
    end = tl.load(cu_seqlens + i_seq + 1)
    o_col = tl.arange(0, COLS)
    m_col = o_col < n_cols
    v = _pooled(x, start, end, o_col, m_col, n_cols, MEAN, ROWS, COLS)
    norm = tl.sqrt(tl.sum(v * v, 0))
    p_row = i_seq.to(tl.int64) * n_cols + o_col
    b_dy = tiles.load(dy + p_row, m_col)
    y = v / _floored(norm)
    along = tl.where(norm > 1e-12, tl.sum(y * b_dy, 0), 0.0)
    tl.store(dv + p_row, (b_dy - y * along) / _floored(norm), mask=m_col)


@triton.jit
def _spread_kernel(
    dv,  # [B, n_cols]
    cu_seqlens,  # [B + 1] int32
    dx,  # [T, n_cols] output
    n_cols,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx_t = dv_b / length ("mean"), or dv_b on the first row and 0 below ("cls")."""
    i_seq = tl.program_id(0)
    start = tl.load(cu_seqlens + i_seq)
    end = tl.load(cu_seqlens + i_seq + 1)
    o_col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    m_col = o_col < n_cols
    g = tiles.load(dv + i_seq.to(tl.int64) * n_cols + o_col, m_col)
    if MEAN:
        g = g / tl.maximum(end - start, 1).to(tl.float32)
    for i_row in range(start + tl.program_id(1) * ROWS, end, tl.num_programs(1) * ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_row < end)[:, None] & m_col[None, :]
        out = tl.broadcast_to(g[None, :], (ROWS, COLS))
        if not MEAN:
            out = tl.where((o_row == start)[:, None], out, 0.0)
        tiles.store(dx + o_row[:, None] * n_cols + o_col[None, :], out, mask)


def forward(x, cu_seqlens, mode, normalize, save):
    n_seqs, n_cols = cu_seqlens.shape[0] - 1, x.shape[1]
    y = x.new_empty((n_seqs, n_cols))
    if n_seqs:
        cfg = config(n_cols, normalize)
        _forward_kernel[(n_seqs, triton.cdiv(n_cols, cfg["COLS"]))](
            x, cu_seqlens, y, n_cols, mode == "mean", normalize, **cfg
        )
    return (y,)


def backward(dy, x, cu_seqlens, mode, normalize, needs):
    n_seqs, n_cols = dy.shape
    dx = torch.empty_like(x) if needs[0] else None
    if dx is None or not x.shape[0]:
        return (dx,)
    mean = mode == "mean"
    dv = dy
    if normalize:
        dv = torch.empty_like(dy, dtype=torch.float32)
        _norm_backward_kernel[(n_seqs,)](
            dy, x, cu_seqlens, dv, n_cols, mean, **config(n_cols, True)
        )
    cfg = config(n_cols, False)
    _spread_kernel[(n_seqs, CHUNKS, triton.cdiv(n_cols, cfg["COLS"]))](
        dv, cu_seqlens, dx, n_cols, mean, **cfg
    )
    return (dx,)
