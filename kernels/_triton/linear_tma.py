"""The GEMM of `linear` where operands and results are moved by Hopper's copy engine (TMA).

A tile is addressed by its corner, not by a pointer for every element, which leaves registers for
the accumulator: two programs of four warps fit a multiprocessor, and the tensor cores work for one
while the other is at its epilogue. Measured on an H200 at 32,768 x 4,096 x 1,024 in bf16 with
GELU: 617 TFLOP/s, where pointers gave 476 at best (cuBLAS, without any epilogue: 743).
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import products, tiles

# (M, N, bytes of K, warps, stages): of each factor a row of a step is as long as TMA interleaves.
# Of a family the first that gives every multiprocessor a tile, or the last. For 256 rows of 3,072 x
# 768 the last takes 11 us and the first 14; for 512 rows the second takes 12 us and the first 15.
# Not 64 rows and four warps, as in `linear`.
TILES = {
    "sm90": ((128, 128, 128, 4, 3), (128, 64, 128, 4, 4), (64, 64, 128, 8, 4)),
    "interpreter": ((32, 32, 128, 4, 1),),
}
ALIGNED = 16  # bytes that TMA wants rows and their beginnings to be multiples of


def fits(family: str, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether y = a b can be computed here, and is faster so."""
    if family not in TILES or a.element_size() > 2 or a.dtype == torch.float8_e4m3fn:
        return False  # the sums of e4m3 take twice the registers, see `linear.gemm_kernel`
    if y.element_size() > 2:  # erf itself takes more registers than the exponential of 16 bits
        return False
    if min(y.shape) <= 64:  # most of a tile would be empty
        return False
    rows = (a, b.t(), y)
    return all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % ALIGNED == x.data_ptr() % ALIGNED == 0
        for x in rows
    )


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    a,  # descriptor of [m, k]
    b,  # descriptor of [n, k]
    a_scale,  # as in `products`, as are the next three
    b_scale,
    y_scale,
    bias,
    y,  # descriptor of [m, n], output: act(a b^T + bias)
    u,  # descriptor of [m, n], output: a b^T + bias; or None
    m,
    n,
    k,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_m, i_n = products.tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    EXACT: tl.constexpr = a.dtype == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if EXACT else tl.float32)
    for i_k in range(0, k, BK):
        b_a = tiles.operand(a.load([i_m * BM, i_k]))
        b_b = tiles.operand(b.load([i_n * BN, i_k]))
        acc = tl.dot(b_a, tl.trans(b_b), acc, out_dtype=tl.int32 if EXACT else tl.float32)
    if EXACT:
        acc = acc.to(tl.float32)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    acc = products.scaled(acc, a_scale, b_scale, bias, o_m, o_n, m, n)
    if u is not None:
        u.store([i_m * BM, i_n * BN], tiles.rounded(acc, u.dtype).to(u.dtype))
    SHORT: tl.constexpr = y.dtype.primitive_bitwidth <= 16
    b_y = products.activated(acc, y_scale, o_m, m, ACT, SHORT)
    y.store([i_m * BM, i_n * BN], tiles.rounded(b_y, y.dtype).to(y.dtype))


@functools.lru_cache(4096)
def tile(family: str, m: int, n: int, processors: int) -> tuple[int, int, int, int, int]:
    """The one of TILES for an output [m, n]."""
    enough = (t for t in TILES[family] if triton.cdiv(m, t[0]) * triton.cdiv(n, t[1]) >= processors)
    return next(enough, TILES[family][-1])


def gemm(
    family: str,
    a: torch.Tensor,  # [m, k]
    b: torch.Tensor,  # [k, n], the transpose of a contiguous tensor
    bias: torch.Tensor | None,
    y: torch.Tensor,
    u: torch.Tensor | None,
    act: str,
    scales: Sequence[torch.Tensor | None],  # of a, b and y
) -> None:
    """`linear.gemm` of what `fits`."""
    best = tile(family, a.shape[0], b.shape[1], tiles.processors(a.device))
    launch(best, a, b, bias, y, u, act, scales)


def launch(
    best: tuple[int, int, int, int, int],  # a tile
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    u: torch.Tensor | None,
    act: str,
    scales: Sequence[torch.Tensor | None],
    warm_up: bool = False,
) -> None:
    """`gemm` by one tile; or, to warm up, no more than its compilation."""
    (m, k), n = a.shape, b.shape[1]
    bm, bn, bytes_k, warps, stages = best
    bk = bytes_k // a.element_size()
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    run = functools.partial(gemm_kernel.warmup, grid=grid) if warm_up else gemm_kernel[grid]
    run(
        _blocks(a, bm, bk), _blocks(b.t(), bn, bk), *scales, bias,
        _blocks(y, bm, bn), None if u is None else _blocks(u, bm, bn), m, n, k,
        ACT=act, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def _blocks(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
