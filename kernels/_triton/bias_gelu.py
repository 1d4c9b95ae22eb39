"""y = act(x + bias); dx = dy act'(x + bias), dbias = sum over rows of dx.

Elementwise, so memory-bound: a tile spans full 16-byte accesses of one or two thousand columns and
a few rows, which shares the load of the bias. Backward walks down the rows of its columns to keep
the column sums in registers; a second kernel adds them in a fixed order. The other ops take their
activation gradients and bias gradients from here.
"""

import functools

import torch
import triton
import triton.language as tl

from . import tiles


@functools.lru_cache
def config(n_cols: int, backward: bool) -> dict[str, int]:
    """Tiles of 4096 elements (2048 backward: two inputs), wide before high.

    Backward tiles are narrower: more column blocks, so fewer rows to sum in each.
    """
    cols = max(16, min(256 if backward else 1024, triton.next_power_of_2(n_cols)))
    rows = min(32, (2048 if backward else 4096) // cols)
    return {"ROWS": rows, "COLS": cols, "num_warps": 4, "enable_fp_fusion": True}


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    for n_cols, act in ((37, "gelu"), (3072, "gelu"), (3072, "gelu_tanh"), (3072, "silu")):
        x = torch.empty((64, n_cols), dtype=dtype, device=device)
        yield f"{n_cols} {act}", (x, x[0], act)
    if full:
        yield "3072 relu", (x, x[0], "relu")
        yield "3072 gelu no bias", (x, None, "gelu")


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    x,  # [n_rows, n_cols]
    bias,  # [n_cols] or None
    y,  # [n_rows, n_cols] output
    scale,  # [n_rows] float32, powers of two that the rows of an e4m3 y are divided by; or None
    n_rows,
    n_cols,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    p_row = o_row[:, None] * n_cols + o_col[None, :]
    u = tiles.load(x + p_row, mask)
    if bias is not None:
        u += tiles.load(bias + o_col, m_col)[None, :]
    b_y = tiles.activate(u, ACT, y.dtype.element_ty.primitive_bitwidth <= 16)
    if scale is not None:
        b_y *= tiles.inverse_of_power(tl.load(scale + o_row, mask=m_row, other=1.0))[:, None]
    tiles.store(y + p_row, b_y, mask)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    dy,  # [n_rows, n_cols]
    x,  # [n_rows, n_cols]
    bias,  # [n_cols] or None
    dx,  # [n_rows, n_cols] output, or None
    parts,  # [row programs, 1, n_cols] float32 output: dbias; or None
    n_rows,
    n_cols,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_part = tl.program_id(0)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_col = o_col < n_cols
    if bias is not None:
        b = tiles.load(bias + o_col, m_col)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i_row in range(i_part * ROWS, n_rows, tl.num_programs(0) * ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_row < n_rows)[:, None] & m_col[None, :]
        p_row = o_row[:, None] * n_cols + o_col[None, :]
        b_dx = tiles.load(dy + p_row, mask)
        if ACT != "none":
            u = tiles.load(x + p_row, mask)
            if bias is not None:
                u += b[None, :]
            b_dx *= tiles.activate_grad(u, ACT, x.dtype.element_ty.primitive_bitwidth <= 16)
        if dx is not None:
            tiles.store(dx + p_row, b_dx, mask)
        if parts is not None:
            acc += b_dx
    if parts is not None:
        p_parts = parts + i_part.to(tl.int64) * n_cols + o_col
        tl.store(p_parts, tl.sum(acc, 0), mask=m_col)


def act_backward(
    dy: torch.Tensor,  # [T, F]
    x: torch.Tensor,  # [T, F]; unread where act is "none"
    bias: torch.Tensor | None,  # [F]
    act: str,
    dx: torch.Tensor | None,  # [T, F] output
    dbias: torch.Tensor | None,  # [F] output
) -> None:
    """dx = dy act'(x + bias) and dbias = its column sums, each where asked for."""
    n_rows, n_cols = dy.shape
    if not n_rows:
        if dbias is not None:
            dbias.zero_()
        return
    cfg = config(n_cols, True)
    blocks = triton.cdiv(n_cols, cfg["COLS"])
    programs = triton.cdiv(n_rows, cfg["ROWS"])
    parts = None
    if dbias is not None:
        # eight programs a processor fill it; more would only lengthen the ordered sum
        programs = min(programs, triton.cdiv(8 * tiles.processors(dy.device), blocks))
        parts = dy.new_empty((programs, 1, n_cols), dtype=torch.float32)
    _backward_kernel[(programs, blocks)](dy, x, bias, dx, parts, n_rows, n_cols, act, **cfg)
    if parts is not None:
        tiles.sum_parts(parts, dbias)


def act_forward(
    x: torch.Tensor,  # [T, F]
    bias: torch.Tensor | None,  # [F]
    act: str,
    y: torch.Tensor,  # [T, F] output
    scale: torch.Tensor | None = None,  # [T] float32 powers of two, where y is e4m3
) -> None:
    """y = act(x + bias); as e4m3, divided by its scale."""
    n_rows, n_cols = x.shape
    if n_rows:
        cfg = config(n_cols, False)
        grid = triton.cdiv(n_rows, cfg["ROWS"]), triton.cdiv(n_cols, cfg["COLS"])
        _forward_kernel[grid](x, bias, y, scale, n_rows, n_cols, act, **cfg)


def forward(x, bias, activation, save):
    y = torch.empty_like(x)
    act_forward(x, bias, activation, y)
    return (y,)


def backward(dy, x, bias, activation, needs):
    dx = torch.empty_like(x) if needs[0] else None
    dbias = torch.empty_like(bias) if bias is not None and needs[1] else None
    act_backward(dy, x, bias, activation, dx, dbias)
    return dx, dbias
