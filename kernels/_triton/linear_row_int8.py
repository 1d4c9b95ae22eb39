"""y = act(s f sum(q p) + b): the GEMM of `linear` on int8 factors, scaled in its epilogue.

The rows of x are rotated and rounded in a pass of their own, a program holding whole rows: the
scale depends on all of a row. A rotation is seven times the sums and differences of elements ever
further apart, in the order of the reference, so that both round the same numbers.
"""

import torch
import triton
import triton.language as tl

from . import linear, tiles

GROUP = 128  # rows are padded to a multiple of it


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    for label, (x, weight, bias) in linear.samples(dtype, device, full):
        depth = triton.cdiv(x.shape[1], GROUP) * GROUP
        q = torch.empty((weight.shape[0], depth), dtype=torch.int8, device=device)
        scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=device)
        yield label, (x, q, scale, bias, "gelu" if label == "16384x3072x768" else "none")


@triton.jit
def _turn(
    x,  # [ROWS, COLS] float32
    APART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sums and differences of the elements APART from each other."""
    pairs = tl.permute(tl.reshape(x, (ROWS, COLS // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, COLS))


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x,  # [n_rows, n_cols]
    q,  # [n_rows, n_out] int8 output
    scale,  # [n_rows] float32 output
    n_rows,
    n_cols,
    n_out,  # n_cols, up to a multiple of GROUP
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_col < n_cols)[None, :]
    b_x = tiles.load(x + o_row[:, None] * n_cols + o_col[None, :], mask)
    b_x = _turn(b_x, 1, ROWS, COLS)
    b_x = _turn(b_x, 2, ROWS, COLS)
    b_x = _turn(b_x, 4, ROWS, COLS)
    b_x = _turn(b_x, 8, ROWS, COLS)
    b_x = _turn(b_x, 16, ROWS, COLS)
    b_x = _turn(b_x, 32, ROWS, COLS)
    b_x = _turn(b_x, 64, ROWS, COLS)
    # of magnitudes as integers the greatest is a NaN, if there is one
    bits = tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), 1)
    b_scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    b_scale = tl.where(bits >= 0x7F800000, float("nan"), b_scale)
    tl.store(scale + o_row, b_scale, mask=m_row)
    # those of which the inverse would be infinite are 0
    normal = tl.maximum(b_scale, 1.1754943508222875e-38)
    inverse = tl.where(b_scale >= normal, tl.div_rn(1.0, normal), 0.0)
    b_q = tiles.round_to_int(b_x * inverse[:, None]).to(tl.int8)
    m_out = m_row[:, None] & (o_col < n_out)[None, :]
    tl.store(q + o_row[:, None] * n_out + o_col[None, :], b_q, mask=m_out)


def quantize(
    x: torch.Tensor,  # [T, K]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated x as int8 [T, K + padding], and what its rows are to be multiplied by, [T, 1]."""
    n_rows, n_cols = x.shape
    n_out = triton.cdiv(n_cols, GROUP) * GROUP
    q = x.new_empty((n_rows, n_out), dtype=torch.int8)
    scale = x.new_empty((n_rows, 1), dtype=torch.float32)
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_out, False)
        # fused with the sum that rounds it, a product would not be rounded before, as elsewhere
        cfg = cfg | {"enable_fp_fusion": False}
        grid = (triton.cdiv(n_rows, cfg["ROWS"]),)
        _quantize_kernel[grid](x, q, scale, n_rows, n_cols, n_out, **cfg)
    return q, scale


def forward(
    x,  # [T, K]
    weight,  # [N, K + padding] int8, rotated
    scale,  # [N, 1] float32
    bias,  # [N] or None
    activation,
    save,
):
    q, x_scale = quantize(x)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    linear.gemm(q, weight.t(), bias, y, act=activation, a_scale=x_scale, b_scale=scale)
    return (y,)
