"""What the attention kernels share: where a program works, how it loads rows, its block sizes."""

import functools

import torch
import triton
import triton.language as tl

from . import tiles

# Block sizes (BM queries, BN keys, warps, stages): for plain scores, with dropout, with a bias.
# Both features cost registers, and no entry may spill. LONG is for sequences past 64 tokens; in a
# SHORT one 128 rows would be mostly empty. On NVIDIA no block of 64 rows has four warps: some
# Triton releases miscompile those on Hopper, where warp-group instructions start at 64 rows and
# four warps. Blocks of 64 or 128 rows have eight; four have 32 rows and the older instructions.
Blocks = tuple[int, int, int, int]
LONG: dict[str, dict[int, dict[str, tuple[Blocks, Blocks, Blocks]]]] = {
    "sm80": {
        64: {
            "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
            "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
            "dkv": ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)),
        },
        128: {
            "forward": ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
            "dq": ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            "dkv": ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        },
    },
    "sm90": {
        64: {
            "forward": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),
            "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
            "dkv": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
        },
        128: {
            "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
            "dq": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
            "dkv": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        },
    },
    # accumulators live in tensor memory here, so registers do not limit
    "sm100": {
        width: {
            "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
            "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "dkv": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
        }
        for width in (64, 128)
    },
    "sm120": {
        64: {
            "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
            "dq": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
            "dkv": ((32, 128, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        },
        128: {
            "forward": ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
            "dq": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
            "dkv": ((32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 4, 1)),
        },
    },
    "gfx9": {
        64: {
            "forward": ((128, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
            "dq": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
            "dkv": ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        },
        128: {
            "forward": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
            "dq": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
            "dkv": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        },
    },
}
SHORT: dict[int, dict[str, Blocks]] = {
    64: {"forward": (32, 64, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)},
    128: {"forward": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (16, 32, 4, 1)},
}
# float32 multiplies on the ordinary cores hold whole rows of an operand in registers
FLOAT: dict[int, dict[str, Blocks]] = {
    64: {"forward": (32, 32, 4, 1), "dq": (32, 16, 8, 1), "dkv": (16, 32, 4, 1)},
    128: {"forward": (16, 32, 8, 1), "dq": (16, 16, 8, 1), "dkv": (16, 32, 8, 1)},
}
# several blocks even for the short sequences of a test
INTERPRETER: dict[str, Blocks] = {
    "forward": (16, 32, 4, 1),
    "dq": (16, 32, 4, 1),
    "dkv": (32, 16, 4, 1),
}


@functools.lru_cache
def config(
    kind: str,  # "forward", "dq" or "dkv"
    family: str,
    dtype: torch.dtype,
    head_dim: int,
    long: bool,
    dropout: bool,
    bias: bool,
    precision: str,
) -> dict[str, int | str | bool]:
    """Launch arguments of a kernel: block sizes and what else is fixed when it is compiled."""
    width = 64 if head_dim <= 64 else 128
    if family == "interpreter":
        sizes = INTERPRETER[kind]
    elif dtype == torch.float32:
        sizes = FLOAT[width][kind]
    elif long:
        sizes = LONG[family][width][kind][2 if bias else int(dropout)]
    else:
        sizes = SHORT[width][kind]
    bm, bn, warps, stages = sizes
    return {
        "DROPOUT": dropout, "PRECISION": precision, "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BM": bm, "BN": bn,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def choice(
    qkv: torch.Tensor, bias: torch.Tensor | None, max_seqlen: int, p: float
) -> tuple[str, torch.dtype, int, bool, bool, bool, str]:
    """The arguments of `config` after `kind`, for a call."""
    return (
        tiles.family(qkv.device), qkv.dtype, qkv.shape[3], max_seqlen > 64, p > 0.0,
        bias is not None, tiles.precision(qkv.dtype),
    )  # fmt: skip


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    cu_seqlens = torch.empty(9, dtype=torch.int32, device=device)
    seed = torch.empty(1, dtype=torch.int64, device=device)
    picked = [(64, 64, "kbd"), (64, 512, ""), (64, 512, "kbd"), (128, 512, "kbd")]
    if full:
        picked += [(64, 512, "d")] + [(d, 512, what) for d in (32, 128) for what in ("", "d")]
        picked += [(d, 64, "kbd") for d in (32, 128)] + [(64, 64, ""), (64, 512, "k")]
        picked += [(d, 512, "kbd") for d in (16, 32, 40, 80)]
    for head_dim, longest, what in picked:
        qkv = torch.empty((2048, 3, 12, head_dim), dtype=dtype, device=device)
        key_start = cu_seqlens[1:] if "k" in what else None
        bias = qkv.new_empty((8, 12, longest, longest)) if "b" in what else None
        p = 0.1 if "d" in what else 0.0
        label = " ".join(
            [f"D={head_dim} S={longest}"]
            + [name for name in ("key_start", "bias", "dropout") if name[0] in what]
        )
        yield label, (qkv, cu_seqlens, key_start, bias, longest, 0.125, p, seed if p else None)


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
def parts(
    length,
    first,  # first key
    BN: tl.constexpr,
):
    """(p, m): keys 0..p come in whole blocks and are all allowed, keys m..length need masks.

    Where the first key is not 0, which is rare (see `ops.attention`), every block is masked.
    """
    whole = length // BN * BN
    plain_to = tl.where(first > 0, 0, whole)
    masked_from = tl.where(first > 0, first // BN * BN, whole)
    return plain_to, masked_from


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
def products(
    a,  # [M, BLOCK_D]
    b,  # [N, BLOCK_D]
    PRECISION: tl.constexpr,
):
    """a b^T. Wide rows in float32 are summed in four parts: one chain of so many additions ends
    further from the truth than torch's sums do."""
    D: tl.constexpr = a.shape[1]
    if PRECISION == "ieee" and a.dtype == tl.float32 and D > 64:
        a = tl.trans(tl.reshape(a, (a.shape[0], 4, D // 4)), (1, 0, 2))
        b = tl.trans(tl.reshape(b, (b.shape[0], 4, D // 4)), (1, 2, 0))
        y = tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        y = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return y


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
    scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q k^T, or with a bias scale q k^T + bias; -inf where there is no such key."""
    s = products(q, k, PRECISION)
    if bias is not None:
        m_s = (o_m < length)[:, None] & (o_n < length)[None, :]
        p_bias = bias + o_m.to(tl.int64)[:, None] * bias_row + o_n[None, :]
        s = s * scale + tiles.load(p_bias, m_s)
    if MASKED:
        s = tl.where(((o_n >= first) & (o_n < length))[None, :], s, float("-inf"))
    return s


@triton.jit
def exponentials(
    s,  # as from `scores`
    pivot,  # broadcasts to s
    bias,  # whether there is one
    scale,
):
    """exp(scale q k^T + bias - pivot).

    Scale, log2(e) and pivot are one multiply-add a score. Not so with a bias: log2(e) times a
    finite mask over all keys of a query, the least number of its dtype, would be infinite.
    """
    if bias is None:
        p = tl.exp2(s * (scale * tiles.LOG2E) - pivot * tiles.LOG2E)
    else:
        p = tl.exp2((s - pivot) * tiles.LOG2E)
    return p
