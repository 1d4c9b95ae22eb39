"""y = 2^(e + f) sum(q p) + b: the GEMM of `linear` on e4m3 factors, scaled in its epilogue.

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
        yield label, (x, e4m3, scale, bias)


@triton.jit
def _exponent(
    greatest,  # int32 bits of float32 magnitudes
):
    return tl.maximum(greatest >> 23, LEAST)


@triton.jit
def _power(
    exponent,  # int32, as stored in float32
):
    power = ((exponent - SHIFT) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, float("nan"), power)


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x,  # [n_rows, n_cols]
    q,  # [n_rows, n_cols] e4m3 output
    scale,  # [n_rows] float32 output
    reach,  # [2] float32: the greatest row of a weight, and of its bias; or None
    inner_scale,  # [n_rows] float32 output: for the rows of act(x W^T + b); or None
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
    exponent = _exponent(greatest)
    b_scale = _power(exponent)
    inverse = ((-exponent + (254 + SHIFT)) << 23).to(tl.float32, bitcast=True)
    b_q = b_x * inverse[:, None]
    tl.store(scale + o_row, b_scale, mask=m_row)
    tiles.store(q + p_row, b_q, mask)
    if inner_scale is not None:
        # |act(u)| <= |u| <= |x| |W[n]| + |b[n]|
        most = tl.sqrt(tl.sum(b_q * b_q, 1)) * b_scale * tl.load(reach) + tl.load(reach + 1)
        power = _power(_exponent(tl.abs(most).to(tl.int32, bitcast=True)))
        tl.store(inner_scale + o_row, power, mask=m_row)


def quantize(
    x: torch.Tensor,  # [T, K]
    reach: torch.Tensor | None = None,  # [2] float32: max |W[n]|, max |b[n]|
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x as e4m3 [T, K], and what its rows are to be multiplied by, [T, 1].

    With `reach`, also what the rows of act(x W^T + b) may be divided by, [T, 1].
    """
    n_rows, n_cols = x.shape
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((n_rows, 1), dtype=torch.float32)
    inner_scale = None if reach is None else torch.empty_like(scale)
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, False)
        grid = (triton.cdiv(n_rows, cfg["ROWS"]),)
        _quantize_kernel[grid](x, q, scale, reach, inner_scale, n_rows, n_cols, **cfg)
    return q, scale, inner_scale


def forward(
    x,  # [T, K]
    weight,  # [N, K] e4m3
    scale,  # [N, 1] float32
    bias,  # [N] or None
    save,
):
    q, x_scale, _ = quantize(x)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    linear.gemm(q, weight.t(), bias, y, a_scale=x_scale, b_scale=scale)
    return (y,)
