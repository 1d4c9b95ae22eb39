"""What the GEMM kernels share: the order in which programs walk the output, and the epilogue."""

import triton
import triton.language as tl

from . import tiles


@triton.jit
def tile_of(
    i_tile,
    n_m,  # tile rows
    n_n,  # tile columns
):
    """(row, column) of a tile: in groups of eight tile rows, whose weights then stay in L2."""
    GROUP: tl.constexpr = 8
    first = i_tile // (GROUP * n_n) * GROUP
    height = tl.minimum(n_m - first, GROUP)
    return first + (i_tile % (GROUP * n_n)) % height, (i_tile % (GROUP * n_n)) // height


@triton.jit
def scaled(
    acc,  # [ROWS, COLS] float32
    a_scale,  # [m] float32, of the rows of an a of 8 bits; or None
    b_scale,  # [n] float32, of the columns of a b of 8 bits; or None
    bias,  # [n] or None
    o_m,
    o_n,
    m,
    n,
):
    """A part of a tile of a b + bias."""
    m_m, m_n = o_m < m, o_n < n
    if a_scale is not None:
        acc *= tiles.load(a_scale + o_m, m_m)[:, None]
        acc *= tiles.load(b_scale + o_n, m_n)[None, :]
    if bias is not None:
        acc += tiles.load(bias + o_n, m_n)[None, :]
    return acc


@triton.jit
def activated(
    u,  # [ROWS, COLS] float32
    y_scale,  # [m] float32, powers of two that the rows of an e4m3 y are divided by; or None
    o_m,
    m,
    ACT: tl.constexpr,
    SHORT: tl.constexpr,  # as in `tiles.activate`
):
    """act(u), as y holds it."""
    y = tiles.activate(u, ACT, SHORT)
    if y_scale is not None:
        y *= tiles.inverse_of_power(tl.load(y_scale + o_m, mask=o_m < m, other=1.0))[:, None]
    return y
