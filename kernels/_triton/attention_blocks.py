"""What the attention kernels share: where a program works, how it loads rows, its block sizes."""

import functools

import torch
import triton
import triton.language as tl

from . import tiles

# Block sizes (BM queries, BN keys, warps, stages). "long" is for sequences past 64 tokens, "short"
# for the rest, where one block of keys is the whole sequence and a wide block of queries would be
# mostly empty. No block of 64 rows has four warps: some Triton releases miscompile those on Hopper
# (warp-group instructions start at four warps and 64 rows); 128 rows have eight warps, 32 have two.
SHORT = {"forward": (32, 64, 2, 1), "dq": (32, 64, 2, 1), "dkv": (32, 32, 2, 1)}
LONG = {
    "sm80": {
        64: {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 2)},
        128: {"forward": (128, 64, 8, 2), "dq": (128, 64, 8, 1), "dkv": (64, 128, 8, 1)},
    },
    "sm90": {
        64: {"forward": (128, 128, 8, 2), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 2)},
        128: {"forward": (128, 128, 8, 2), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 2)},
    },
    "sm120": {
        64: {"forward": (128, 64, 8, 2), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 1)},
        128: {"forward": (128, 64, 8, 1), "dq": (128, 32, 8, 1), "dkv": (32, 128, 8, 1)},
    },
    "gfx9": {
        64: {"forward": (128, 64, 4, 1), "dq": (128, 64, 4, 1), "dkv": (64, 64, 4, 1)},
        128: {"forward": (128, 32, 4, 1), "dq": (64, 32, 4, 1), "dkv": (32, 64, 4, 1)},
    },
}
LONG["sm100"] = LONG["sm90"]
FLOAT = {
    64: {"forward": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)},
    128: {"forward": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)},
}
INTERPRETER = {"forward": (16, 32, 4, 1), "dq": (16, 32, 4, 1), "dkv": (32, 16, 4, 1)}


@functools.lru_cache
def config(
    kind: str, family: str, dtype: torch.dtype, head_dim: int, long: bool, precision: str
) -> dict[str, int | str]:
    """Launch arguments of kernel `kind`: "forward", "dq" or "dkv"."""
    width = 64 if head_dim <= 64 else 128
    if family == "interpreter":
        sizes = INTERPRETER
    elif dtype == torch.float32:
        sizes = FLOAT[width]
    else:
        sizes = LONG[family][width] if long else SHORT
    bm, bn, warps, stages = sizes[kind]
    return {
        "D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BM": bm, "BN": bn,
        "PRECISION": precision, "num_warps": warps, "num_stages": stages,
        "enable_fp_fusion": True,
    }  # fmt: skip


def samples(dtype: torch.dtype, device: torch.device):
    """One call per shipped config, as (label, arguments of `forward`)."""
    cu_seqlens = torch.empty(9, dtype=torch.int32, device=device)
    seed = torch.empty(1, dtype=torch.int64, device=device)
    for head_dim in (16, 32, 40, 64, 80, 128):
        qkv = torch.empty((2048, 3, 12, head_dim), dtype=dtype, device=device)
        for longest in (64, 512):
            label = f"D={head_dim} S={longest}"
            bias = qkv.new_empty((8, 12, longest, longest))
            yield label, (qkv, cu_seqlens, None, None, longest, 0.125, 0.0, None)
            yield f"{label} dropout", (qkv, cu_seqlens, None, None, longest, 0.125, 0.1, seed)
            yield f"{label} key_start", (qkv, cu_seqlens, cu_seqlens, None, longest, 0.125, 0.0, None)
            yield (
                f"{label} key_start, bias, dropout",
                (qkv, cu_seqlens, cu_seqlens, bias, longest, 0.125, 0.1, seed),
            )


def bias_strides(bias: torch.Tensor | None) -> tuple[int, int, int]:
    if bias is None:
        return 0, 0, 0
    seq, head, row, _ = bias.stride()
    return seq if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, row


@triton.jit
def locate(
    cu_seqlens,
    key_start,
    n_blocks,
    n_heads,
):
    """(block, head, sequence, first packed row, length, first key) of this program."""
    pid = tl.program_id(0)
    i_block = pid % n_blocks
    i_head = (pid // n_blocks) % n_heads
    i_seq = pid // n_blocks // n_heads
    start = tl.load(cu_seqlens + i_seq)
    length = tl.load(cu_seqlens + i_seq + 1) - start
    first = 0
    if key_start is not None:
        first = tl.load(key_start + i_seq) - start
    return i_block, i_head, i_seq, start, length, first


@triton.jit
def rows(
    base,  # pointer to row 0, column 0
    o_row,  # [ROWS] rows
    stride,  # elements between rows
    BLOCK_D: tl.constexpr,
):
    """Pointers to [ROWS, BLOCK_D]."""
    return base + o_row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(
    p_x,  # [ROWS, BLOCK_D] pointers
    m_row,  # [ROWS] valid rows; unread unless MASKED
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows for the tensor cores, 0 in invalid rows and in columns past D."""
    m_d = tl.arange(0, BLOCK_D) < D
    if MASKED:
        x = tiles.load_operand(p_x, m_row[:, None] & m_d[None, :])
    elif D == BLOCK_D:
        x = tiles.load_operand(p_x, None)
    else:
        x = tiles.load_operand(p_x, m_d[None, :])
    return x


@triton.jit
def scores(
    q,  # [BM, BLOCK_D]
    k,  # [BN, BLOCK_D]
    bias,  # pointer to [S, S] of this head and sequence, or None
    bias_row,
    o_m,
    o_n,
    length,
    first,
    scale,  # times log2(e)
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(e) (scale q k^T + bias), -inf where there is no such key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if bias is not None:
        m_s = (o_m < length)[:, None] & (o_n < length)[None, :]
        p_bias = bias + o_m.to(tl.int64)[:, None] * bias_row + o_n[None, :]
        s += tiles.load(p_bias, m_s) * tiles.LOG2E
    if MASKED:
        s = tl.where(((o_n >= first) & (o_n < length))[None, :], s, float("-inf"))
    return s
