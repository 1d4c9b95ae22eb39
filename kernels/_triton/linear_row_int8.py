"""y = act(s f sum(q p) + b): the GEMM of `linear` on int8 factors, scaled in its epilogue.

The rows of x are rotated and rounded in a pass of their own, which is to take no longer than
reading and writing them. Tensor cores rotate 16 bits: a row of a tile is one group, its halves are
multiplied by H_64, and the sum and the difference of the products are H_128 times the group. A
tile has every group of its rows, as a scale depends on all of a row; while a program works on one
tile, the next are on their way to shared memory.

Products with +-1 are exact and sums are float32, but in another order than the reference's: a scale
may be off by a few 1e-7 of itself, and an integer by one where a value is as near to a tie. That
is a step of y, which 16 bits hide and float32 would not: its sums and differences are the
reference's, in its order.
"""

import functools

import torch
import triton
import triton.language as tl

from . import linear, tiles

GROUP = 128  # rows are padded to a multiple of it
SMALL, MEDIUM, LARGE = 32, 64, 128  # groups of a tile: for few rows, for many


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    for label, (x, weight, bias) in linear.samples(dtype, device, full):
        if label == "16384x768x768":
            x = torch.empty((16384, 3072), dtype=dtype, device=device)
        elif label == "256x768x768":
            x = torch.empty((256, tiles.MAX_HIDDEN), dtype=dtype, device=device)
        depth = triton.cdiv(x.shape[1], GROUP) * GROUP
        q = torch.empty((weight.shape[0], depth), dtype=torch.int8, device=device)
        scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=device)
        yield label, (x, q, scale, bias, "gelu" if label == "16384x3072x768" else "none")


@triton.jit
def _hadamard(
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,  # up to 256
):
    """H[i, j] = -1 where i and j have an odd number of bits in common, else 1: [SIZE, SIZE]."""
    o = tl.arange(0, SIZE)
    bits = o[:, None] & o[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1.0 - 2.0 * (bits & 1).to(tl.float32)).to(DTYPE)


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


@triton.jit
def _half_turned(
    x,  # [ROWS, 64] of 16 bits, or float32
    matrix,  # H_64 in x's dtype, or None for a float32 x
    ROWS: tl.constexpr,
):
    """H_64 times every row of x, in float32."""
    if matrix is None:
        y = _turn(x, 1, ROWS, 64)
        y = _turn(y, 2, ROWS, 64)
        y = _turn(y, 4, ROWS, 64)
        y = _turn(y, 8, ROWS, 64)
        y = _turn(y, 16, ROWS, 64)
        y = _turn(y, 32, ROWS, 64)
    else:
        y = tl.dot(x, matrix)
    return y


@triton.jit
def _rounded(
    x,  # float32 block of magnitudes below 2^22
):
    """The nearest integer, of two the even one, as int8: the last bits of x + 1.5 * 2^23."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x,  # [n_rows, n_cols]
    q,  # [n_rows, n_out] int8 output
    scale,  # [n_rows] float32 output
    n_rows,
    n_cols,
    n_out,  # n_cols, up to a multiple of GROUP
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,  # of a row, a power of 2
):
    HALF: tl.constexpr = 64
    DTYPE: tl.constexpr = x.dtype.element_ty
    matrix = None
    if DTYPE.primitive_bitwidth == 16:
        matrix = _hadamard(tl.float32 if tiles.INTERPRET else DTYPE, HALF)
    o_tile = tl.arange(0, ROWS * GROUPS)
    o_col = (o_tile % GROUPS * (2 * HALF))[:, None] + tl.arange(0, HALF)[None, :]
    for i_tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        row = (i_tile * ROWS + (o_tile // GROUPS).to(tl.int64))[:, None]  # [ROWS * GROUPS, 1]
        m_row = row < n_rows
        p_x = x + row * n_cols + o_col
        left = tiles.load_operand(p_x, m_row & (o_col < n_cols))
        right = tiles.load_operand(p_x + HALF, m_row & (o_col + HALF < n_cols))
        left = _half_turned(left, matrix, ROWS * GROUPS)
        right = _half_turned(right, matrix, ROWS * GROUPS)
        # the greater magnitude of sum and difference; as integers the greatest is a NaN, if any is
        bits = (tl.abs(left) + tl.abs(right)).to(tl.int32, bitcast=True)
        bits = tl.max(tl.reshape(tl.max(bits, 1), (ROWS, GROUPS)), 1)
        b_scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
        b_scale = tl.where(bits >= 0x7F800000, float("nan"), b_scale)
        o_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        tl.store(scale + o_row, b_scale, mask=o_row < n_rows)
        # those of which the inverse would be infinite are 0
        normal = tl.maximum(b_scale, 1.1754943508222875e-38)
        inverse = tl.where(b_scale >= normal, tl.div_rn(1.0, normal), 0.0)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, GROUPS)), (ROWS * GROUPS, 1))
        p_q = q + row * n_out + o_col
        m_out = m_row & (o_col < n_out)  # of a group all or nothing
        tl.store(p_q, _rounded((left + right) * inverse), mask=m_out)
        tl.store(p_q + HALF, _rounded((left - right) * inverse), mask=m_out)


@functools.lru_cache(4096)
def config(
    family: str, dtype: torch.dtype, n_rows: int, n_cols: int, processors: int
) -> dict[str, int]:
    """The larger tile if it still gives every processor one; a row of more groups is a tile."""
    if n_cols > tiles.MAX_HIDDEN:
        raise ValueError(f"hidden size must be <= {tiles.MAX_HIDDEN}, got {n_cols}")
    groups = triton.next_power_of_2(max(1, triton.cdiv(n_cols, GROUP)))
    wide = dtype == torch.float32
    # three of the large tiles are in shared memory at a time
    many = LARGE if not wide and family in ("sm80", "sm90", "sm100") else MEDIUM
    tile = max(groups, many if n_rows * groups >= many * processors else SMALL)
    return {
        "ROWS": tile // groups, "GROUPS": groups,
        # 64 rows and four warps are what some Triton releases miscompile for Hopper
        "num_warps": 8 if tile >= 64 else 4, "num_stages": 3,
        # fused with the sum that rounds it, a product would not be rounded before, as elsewhere
        "enable_fp_fusion": not wide,
    }  # fmt: skip


def quantize(
    x: torch.Tensor,  # [T, K]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated x as int8 [T, K + padding], and what its rows are to be multiplied by, [T, 1]."""
    n_rows, n_cols = x.shape
    n_out = triton.cdiv(n_cols, GROUP) * GROUP
    q = x.new_empty((n_rows, n_out), dtype=torch.int8)
    scale = x.new_empty((n_rows, 1), dtype=torch.float32)
    if n_rows:
        processors = tiles.processors(x.device)
        cfg = config(tiles.family(x.device), x.dtype, n_rows, n_cols, processors)
        # 16 warps a processor: what 128 registers a thread leave room for
        programs = 16 // cfg["num_warps"] * processors
        grid = (min(triton.cdiv(n_rows, cfg["ROWS"]), programs),)
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
