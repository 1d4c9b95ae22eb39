"""y = x W^T + b; dx = dy W, dW = dy^T x, db = sum over tokens of dy.

One GEMM kernel with strides serves the three products: operands go to the tensor cores from shared
memory in either order, so nothing is transposed in memory. Programs walk the output in groups of
eight tile rows, which keeps the weights of a group in L2. dW has few tiles and a long sum over
tokens: the sum is split over programs, and their float32 shares are added in a fixed order.
"""

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from . import bias_gelu, linear_tma, products, tiles

# Tiles by what is multiplied: (M, N, K, warps, stages). "large" fills the device with wide tiles,
# "medium" with 128 x 128; "small" is for M or N up to 64, where many narrow tiles spread the
# weights over the device. No tile of 64 rows has four warps: some Triton releases miscompile those
# on Hopper, where warp-group instructions start at 64 rows and four warps.
HALF = {
    "sm80": {
        "large": (128, 128, 64, 8, 3),
        "medium": (128, 128, 32, 8, 4),
        "small": (32, 32, 64, 4, 4),
    },
    "sm90": {
        "large": (128, 256, 64, 8, 3),
        "medium": (128, 128, 64, 8, 4),
        "small": (32, 32, 64, 4, 5),
    },
    "sm100": {
        "large": (128, 256, 64, 8, 3),
        "medium": (128, 128, 64, 8, 4),
        "small": (32, 32, 64, 4, 5),
    },
    "sm120": {
        "large": (128, 128, 64, 8, 3),
        "medium": (128, 128, 32, 8, 3),
        "small": (32, 32, 64, 4, 4),
    },
    "gfx9": {
        "large": (128, 128, 32, 4, 2),
        "medium": (128, 128, 32, 4, 2),
        "small": (32, 32, 64, 4, 2),
    },
    "interpreter": dict.fromkeys(("large", "medium", "small"), (32, 32, 32, 4, 1)),
}
# e4m3: as many bytes a step; on Hopper a step's sum stands beside the whole sum in registers.
FP8 = {
    "sm90": {
        "large": (128, 128, 128, 8, 4),
        "medium": (128, 128, 128, 8, 4),
        "small": (32, 32, 128, 4, 5),
    },
    "sm100": {
        "large": (128, 256, 128, 8, 3),
        "medium": (128, 128, 128, 8, 4),
        "small": (32, 32, 128, 4, 5),
    },
    "sm120": {
        "large": (128, 128, 128, 8, 3),
        "medium": (128, 128, 64, 8, 3),
        "small": (32, 32, 128, 4, 4),
    },
    "interpreter": HALF["interpreter"],
}
# int8 is as wide, on more GPUs; its sums are exact in one chain, but sm100 has no such instruction
# for wide tiles.
INT8 = FP8 | {
    "sm80": {
        "large": (128, 128, 128, 8, 3),
        "medium": (128, 128, 64, 8, 4),
        "small": (32, 32, 128, 4, 4),
    },
    "sm90": FP8["sm90"] | {"large": (128, 256, 128, 8, 3)},
    "sm100": FP8["sm100"] | {"large": (128, 128, 128, 8, 3)},
    "gfx9": {
        "large": (128, 128, 64, 4, 2),
        "medium": (128, 128, 64, 4, 2),
        "small": (32, 32, 128, 4, 2),
    },
}
# float32 without TF32 runs on the ordinary cores: what limits a tile is registers.
FLOAT = {
    "large": (64, 64, 16, 8, 3),
    "medium": (64, 64, 16, 8, 3),
    "small": (32, 32, 16, 4, 3),
}
TF32 = {
    "large": (128, 128, 32, 8, 3),
    "medium": (128, 64, 32, 8, 3),
    "small": (32, 32, 16, 4, 3),
}


def table(family: str, dtype: torch.dtype, precision: str) -> Mapping[str, tuple[int, ...]]:
    if dtype == torch.float8_e4m3fn:
        return FP8[family]
    if dtype == torch.int8:
        return INT8[family]
    if dtype != torch.float32 or family == "interpreter":
        return HALF[family]
    return TF32 if precision == "tf32" else FLOAT


@functools.lru_cache(4096)
def config(
    family: str, dtype: torch.dtype, precision: str, m: int, n: int, processors: int
) -> dict[str, int | str]:
    """The largest tile of the table that still gives every processor one."""
    sizes = table(family, dtype, precision)
    name = "small"
    if m > 64 and n > 64:
        bm, bn, *_ = sizes["large"]
        name = "large" if triton.cdiv(m, bm) * triton.cdiv(n, bn) >= processors else "medium"
    bm, bn, bk, warps, stages = sizes[name]
    return {
        "BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages,
        "PRECISION": precision, "enable_fp_fusion": True,
    }  # fmt: skip


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    shapes = [(16, 768, 768), (16384, 768, 768), (16384, 3072, 768)]
    if full:
        shapes += [(256, 768, 768), (512, 3072, 768), (100, 37, 37)]
    for m, n, k in shapes:
        yield f"{m}x{n}x{k}", (new(m, k), new(n, k), new(n))


@triton.jit
def _finish(
    acc,  # [ROWS, COLS] float32
    a_scale,
    b_scale,
    y_scale,
    bias,
    y,
    u,
    o_m,
    o_n,
    m,
    n,
    ACT: tl.constexpr,
):
    """Epilogue and stores of a part of a tile."""
    acc = products.scaled(acc, a_scale, b_scale, bias, o_m, o_n, m, n)
    mask = (o_m < m)[:, None] & (o_n < n)[None, :]
    p_y = o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    if u is not None:
        tiles.store(u + p_y, acc, mask)
    SHORT: tl.constexpr = y.dtype.element_ty.primitive_bitwidth <= 16
    tiles.store(y + p_y, products.activated(acc, y_scale, o_m, m, ACT, SHORT), mask)


@triton.jit(do_not_specialize=["m", "k_split"])
def gemm_kernel(
    a,  # [m, k], strides a_m, a_k
    b,  # [k, n], strides b_k, b_n
    a_scale,  # [m] float32, of the rows of an a of 8 bits; or None
    b_scale,  # [n] float32, of the columns of a b of 8 bits; or None
    y_scale,  # [m] float32, powers of two that the rows of an e4m3 y are divided by; or None
    bias,  # [n] or None
    y,  # [m, n] output: act(a b + bias); float32 [splits, m, n] shares where SPLIT
    u,  # [m, n] output: a b + bias, or None
    m,
    n,
    k,
    k_split,  # a multiple of BK: what each program of axis 1 sums
    a_m,
    a_k,
    b_k,
    b_n,
    ACT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # k is a multiple of BK
    WIDE_M: tl.constexpr,  # m counts sixteens: the masks along m then keep 16-byte accesses
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if WIDE_M:
        m = m * 16
    i_m, i_n = products.tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < m, o_n < n
    k_first = 0
    k_last = k
    if SPLIT:
        k_first = tl.program_id(1) * k_split
        k_last = tl.minimum(k, k_first + k_split)
    o_k = k_first + tl.arange(0, BK)
    p_a = a + o_m.to(tl.int64)[:, None] * a_m + o_k.to(tl.int64)[None, :] * a_k
    p_b = b + o_k.to(tl.int64)[:, None] * b_k + o_n.to(tl.int64)[None, :] * b_n
    EXACT: tl.constexpr = a.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if EXACT else tl.float32)
    for i_k in range(k_first, k_last, BK):
        if EVEN_K:
            b_a = tiles.load_operand(p_a, m_m[:, None])
            b_b = tiles.load_operand(p_b, m_n[None, :])
        else:
            m_k = i_k + tl.arange(0, BK) < k_last
            b_a = tiles.load_operand(p_a, m_m[:, None] & m_k[None, :])
            b_b = tiles.load_operand(p_b, m_k[:, None] & m_n[None, :])
        if EXACT:
            acc = tl.dot(b_a, b_b, acc, out_dtype=tl.int32)
        elif a_scale is not None:
            # Hopper's sums of e4m3 products have 14 bits: none is longer than one step
            acc = tl.dot(b_a, b_b, acc, max_num_imprecise_acc=BK)
        elif PRECISION == "ieee" and a.dtype.element_ty == tl.float32:
            # One chain of rounded sums over all of k would err more than cuBLAS, which splits k.
            # The last argument keeps the compiler from folding the sum into the product.
            acc += tl.dot(b_a, b_b, input_precision=PRECISION, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
        p_a += BK * a_k
        p_b += BK * b_k

    if EXACT:
        acc = acc.to(tl.float32)
    if SPLIT:
        y += tl.program_id(1).to(tl.int64) * m * n
    if BN == 256:
        # half the columns at a time: the activation of a whole tile would not fit in registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        o_half = i_n * BN + tl.arange(0, BN // 2)
        _finish(left, a_scale, b_scale, y_scale, bias, y, u, o_m, o_half, m, n, ACT)
        _finish(right, a_scale, b_scale, y_scale, bias, y, u, o_m, o_half + BN // 2, m, n, ACT)
    else:
        _finish(acc, a_scale, b_scale, y_scale, bias, y, u, o_m, o_n, m, n, ACT)


def gemm(
    a: torch.Tensor,  # [m, k], any strides
    b: torch.Tensor,  # [k, n], any strides
    bias: torch.Tensor | None,  # [n]
    y: torch.Tensor,  # [m, n] contiguous output
    u: torch.Tensor | None = None,  # [m, n] contiguous output
    act: str = "none",
    split: bool = False,
    a_scale: torch.Tensor | None = None,  # [m] float32, where a and b are of 8 bits
    b_scale: torch.Tensor | None = None,  # [n] float32
    y_scale: torch.Tensor | None = None,  # [m] float32 powers of two, where y is e4m3
) -> None:
    """y = act(a b + bias), u = a b + bias; of factors in 8 bits, and as e4m3, with their scales."""
    m, k = a.shape
    n = b.shape[1]
    if not m or not n:
        return
    family = tiles.family(a.device)
    if not split and linear_tma.fits(family, a, b, y):
        return linear_tma.gemm(family, a, b, bias, y, u, act, (a_scale, b_scale, y_scale))
    processors = tiles.processors(a.device)
    cfg = config(family, a.dtype, tiles.precision(a.dtype), m, n, processors)
    n_tiles = triton.cdiv(m, cfg["BM"]) * triton.cdiv(n, cfg["BN"])
    bk = cfg["BK"]
    splits = 1
    if split:
        # at least eight steps of the sum stay with a program
        splits = max(1, min(2 * processors // n_tiles, k // (8 * bk), 16))
    k_split = triton.cdiv(triton.cdiv(k, bk), splits) * bk
    wide_m = a.stride(0) == 1 and m % 16 == 0
    out = y
    if splits > 1:
        splits = triton.cdiv(k, k_split)
        out = a.new_empty((splits, 1, m * n), dtype=torch.float32)
    gemm_kernel[(n_tiles, splits)](
        a, b, a_scale, b_scale, y_scale, bias, out, u,
        m // 16 if wide_m else m, n, k, k_split, *a.stride(), *b.stride(),
        ACT=act, SPLIT=splits > 1, EVEN_K=k % bk == 0, WIDE_M=wide_m, **cfg,
    )  # fmt: skip
    if splits > 1:
        tiles.sum_parts(out, y.view(-1))


def gemm_backward(
    du: torch.Tensor,  # [T, N]
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K]
    needs: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight) of u = x W^T, each where needed."""
    dx = dweight = None
    if needs[0]:
        dx = torch.empty_like(x)
        gemm(du, weight, None, dx)
    if needs[1]:
        dweight = torch.empty_like(weight) if du.shape[0] else torch.zeros_like(weight)
        if du.shape[0]:
            gemm(du.t(), x, None, dweight, split=True)
    return dx, dweight


def forward(x, weight, bias, save):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    gemm(x, weight.t(), bias, y)
    return (y,)


def backward(dy, x, weight, bias, needs):
    dx, dweight = gemm_backward(dy, x, weight, needs)
    dbias = None
    if bias is not None and needs[2]:
        dbias = torch.empty_like(bias)
        bias_gelu.act_backward(dy, dy, None, "none", None, dbias)
    return dx, dweight, dbias
