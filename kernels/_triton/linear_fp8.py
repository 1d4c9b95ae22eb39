"""y = act(2^(e + f) sum(q p) + b): the GEMM of `linear` on e4m3 factors, scaled in its epilogue.

The rows of x are rounded in a pass of their own, a program holding whole rows: their scale depends
on all of a row, and inside the GEMM every column of tiles would find it anew. The scales are powers
of two, made of the exponent's bits, so no division can round them.
"""

import torch
import triton
import triton.language as tl

from . import linear, tiles

SHIFT = tl.constexpr(7)  # a row's greatest magnitude becomes 2^7 or more, and less than 2^8
LEAST = tl.constexpr(32)  # the least exponent (as stored) that a greatest is taken to have


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    if tiles.family(device) not in linear.FP8 or dtype == torch.float32:
        return
    for label, (x, weight, bias) in linear.samples(dtype, device, full):
        e4m3 = weight.to(torch.float8_e4m3fn)
        scale = weight.new_empty((weight.shape[0], 1), dtype=torch.float32)
        yield f"{label} gelu", (x, e4m3, scale, bias, "gelu")
        if full:
            yield label, (x, e4m3, scale, bias, "none")


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x,  # [n_rows, n_cols]
    q,  # [n_rows, n_cols] e4m3 output
    scale,  # [n_rows] float32 output
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_col < n_cols)[None, :]
    p_row = o_row[:, None] * n_cols + o_col[None, :]
    b_x = tiles.load(x + p_row, mask)
    # of magnitudes as integers the greatest is a NaN, if there is one
    greatest = tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), 1)
    exponent = tl.maximum(greatest >> 23, LEAST)
    b_scale = ((exponent - SHIFT) << 23).to(tl.float32, bitcast=True)
    inverse = ((-exponent + (254 + SHIFT)) << 23).to(tl.float32, bitcast=True)
    tl.store(scale + o_row, tl.where(exponent == 255, float("nan"), b_scale), mask=m_row)
    tiles.store(q + p_row, b_x * inverse[:, None], mask)


def quantize(
    x: torch.Tensor,  # [T, K]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x as e4m3 [T, K], and what its rows are to be multiplied by, [T, 1]."""
    n_rows, n_cols = x.shape
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((n_rows, 1), dtype=torch.float32)
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, False)
        _quantize_kernel[(triton.cdiv(n_rows, cfg["ROWS"]),)](x, q, scale, n_rows, n_cols, **cfg)
    return q, scale


def forward(
    x,  # [T, K]
    weight,  # [N, K] e4m3
    scale,  # [N, 1] float32
    bias,  # [N] or None
    activation,
    save,
):
    q, x_scale = quantize(x)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    linear.gemm(q, weight.t(), bias, y, act=activation, a_scale=x_scale, b_scale=scale)
    return (y,)
