"""dV = (P M)^T dout; dS = P (dP - delta), dP = M (dout V^T); dQ = scale dS K; dK = scale dS^T Q.

P is recomputed from lse block by block, M is the dropout mask over 1 - p. Two kernels without
atomics, so results repeat bit for bit: one per block of queries gives dQ and leaves delta behind,
one per block of keys gives dK and dV. The latter forms K Q^T, keys as rows: the other way round it
would multiply by a transposed register tile, which some Triton releases miscompile on Hopper.

A row of dS sums to 0, and what a gradient near 0 (that of the bias of the keys, say) is worth
hangs on it. rowsum(dout * out) is delta only as far as out and lse are exact, and out is rounded
to its dtype. So the mean of dP that is left over, with the P at hand as weights, is summed beside
dS K, and both delta and dQ are corrected by it. One key alone has dS = 0, and is given it. Their
sum also normalises P once more: beside a finite mask over all keys of a query, the least number of
a dtype, lse has no room for log(sum), and each P is 1.
"""

import torch
import triton
import triton.language as tl

from . import attention_blocks as blocks
from . import tiles


@triton.jit
def _attend_dq(
    acc,
    weighted,
    excess,
    total,
    q,
    do,
    b_lse,
    delta,
    k_base,
    v_base,
    stride,
    bias,
    bias_row,
    o_m,
    o_dropout,
    length,
    first,
    scale,
    seed,
    threshold,
    keep_scale,
    n_from,
    n_to,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
):
    """Over the keys n_from..n_to: acc += dS K, weighted += P K, excess += dS 1, total += P 1."""
    p_k = blocks.rows(k_base, n_from + tl.arange(0, BN), stride, BLOCK_D)
    p_v = blocks.rows(v_base, n_from + tl.arange(0, BN), stride, BLOCK_D)
    for i_n in range(n_from, n_to, BN):
        o_n = i_n + tl.arange(0, BN)
        k = blocks.load_rows(p_k, o_n < length, MASKED, D, BLOCK_D)
        v = blocks.load_rows(p_v, o_n < length, MASKED, D, BLOCK_D)
        s = blocks.scores(q, k, bias, bias_row, o_m, o_n, length, first, scale, MASKED, PRECISION)
        p = blocks.exponentials(s, b_lse[:, None], bias, scale)
        dp = blocks.products(do, v, PRECISION)
        if DROPOUT:
            keep = tiles.keep_mask(seed, o_dropout, i_n, threshold, BN)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        weighted = tl.dot(p.to(k.dtype), k, weighted, input_precision=PRECISION)
        excess += tl.sum(ds, 1)
        total += tl.sum(p, 1)
        p_k += BN * stride
        p_v += BN * stride
    return acc, weighted, excess, total


@triton.jit(
    do_not_specialize=["n_tokens", "n_blocks", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _dq_kernel(
    dout,  # [T, N, D]
    qkv,  # [T, 3, N, D]
    cu_seqlens,  # [B + 1] int32
    key_start,  # [B] int32 or None
    bias,  # [B or 1, N or 1, S, S] or None
    out,  # [T, N, D]
    lse,  # [N, T] float32
    delta,  # [N, T] float32 output: rowsum(P dP) / rowsum(P)
    norm,  # [N, T] float32 output: 1 / rowsum(P), or None where that is 1
    dqkv,  # [T, 3, N, D] output, its queries
    seed,  # [1] int64 or None
    n_tokens,
    n_heads,
    n_blocks,
    bias_seq,
    bias_head,
    bias_row,
    scale,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_block, i_head, i_seq, start, length, first = blocks.locate(
        cu_seqlens, key_start, n_blocks, n_heads
    )
    if i_block * BM >= length:
        return
    stride = 3 * n_heads * D
    q_base = qkv + start.to(tl.int64) * stride + i_head * D
    k_base = q_base + n_heads * D
    v_base = k_base + n_heads * D
    if bias is not None:
        bias += i_seq.to(tl.int64) * bias_seq + i_head.to(tl.int64) * bias_head
    o_m = i_block * BM + tl.arange(0, BM)
    m_m = o_m < length
    o_dropout = (start + o_m) * n_heads + i_head
    o_stat = i_head.to(tl.int64) * n_tokens + start + o_m
    out_base = (start.to(tl.int64) * n_heads + i_head) * D
    q = blocks.load_rows(blocks.rows(q_base, o_m, stride, BLOCK_D), m_m, True, D, BLOCK_D)
    do = blocks.load_rows(
        blocks.rows(dout + out_base, o_m, n_heads * D, BLOCK_D), m_m, True, D, BLOCK_D
    )
    b_out = blocks.load_rows(
        blocks.rows(out + out_base, o_m, n_heads * D, BLOCK_D), m_m, True, D, BLOCK_D
    )
    b_delta = tl.sum(do.to(tl.float32) * b_out.to(tl.float32), 1)
    b_lse = tl.load(lse + o_stat, mask=m_m, other=float("-inf"))
    # rows without keys: probabilities exp(s - inf) = 0
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    weighted = tl.zeros((BM, BLOCK_D), tl.float32)
    excess = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    plain_to, masked_from = blocks.parts(length, first, BN)
    acc, weighted, excess, total = _attend_dq(
        acc, weighted, excess, total, q, do, b_lse, b_delta, k_base, v_base, stride, bias,
        bias_row, o_m, o_dropout, length, first, scale, seed, threshold, keep_scale,
        0, plain_to, False, DROPOUT, PRECISION, D, BLOCK_D, BN,
    )  # fmt: skip
    acc, weighted, excess, total = _attend_dq(
        acc, weighted, excess, total, q, do, b_lse, b_delta, k_base, v_base, stride, bias,
        bias_row, o_m, o_dropout, length, first, scale, seed, threshold, keep_scale,
        masked_from, length, True, DROPOUT, PRECISION, D, BLOCK_D, BN,
    )  # fmt: skip
    alive = total != 0.0  # of NaN too
    inverse = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    excess *= inverse
    tl.store(delta + o_stat, b_delta + excess, mask=m_m)
    if norm is not None:
        tl.store(norm + o_stat, inverse, mask=m_m)
    acc = (acc - excess[:, None] * weighted) * inverse[:, None]
    acc = tl.where(length - first > 1, acc, 0.0)
    p_dq = blocks.rows(dqkv + start.to(tl.int64) * stride + i_head * D, o_m, stride, BLOCK_D)
    m_dq = m_m[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tiles.store(p_dq, acc * scale, m_dq)


@triton.jit(
    do_not_specialize=["n_tokens", "n_blocks", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _dkv_kernel(
    dout,  # [T, N, D]
    qkv,  # [T, 3, N, D]
    cu_seqlens,  # [B + 1] int32
    key_start,  # [B] int32 or None
    bias,  # [B or 1, N or 1, S, S] or None
    lse,  # [N, T] float32
    delta,  # [N, T] float32
    norm,  # [N, T] float32 or None
    dqkv,  # [T, 3, N, D] output, its keys and values
    seed,  # [1] int64 or None
    n_tokens,
    n_heads,
    n_blocks,
    bias_seq,
    bias_head,
    bias_row,
    scale,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_block, i_head, i_seq, start, length, first = blocks.locate(
        cu_seqlens, key_start, n_blocks, n_heads
    )
    if i_block * BN >= length:
        return
    stride = 3 * n_heads * D
    q_base = qkv + start.to(tl.int64) * stride + i_head * D
    k_base = q_base + n_heads * D
    v_base = k_base + n_heads * D
    do_base = dout + (start.to(tl.int64) * n_heads + i_head) * D
    o_stat = i_head.to(tl.int64) * n_tokens + start
    if bias is not None:
        bias += i_seq.to(tl.int64) * bias_seq + i_head.to(tl.int64) * bias_head
    o_n = i_block * BN + tl.arange(0, BN)
    m_n = o_n < length
    k = blocks.load_rows(blocks.rows(k_base, o_n, stride, BLOCK_D), m_n, True, D, BLOCK_D)
    v = blocks.load_rows(blocks.rows(v_base, o_n, stride, BLOCK_D), m_n, True, D, BLOCK_D)
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_D), tl.float32)
    p_q = blocks.rows(q_base, tl.arange(0, BM), stride, BLOCK_D)
    p_do = blocks.rows(do_base, tl.arange(0, BM), n_heads * D, BLOCK_D)
    for i_m in range(0, length, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < length
        q = blocks.load_rows(p_q, m_m, True, D, BLOCK_D)
        do = blocks.load_rows(p_do, m_m, True, D, BLOCK_D)
        b_lse = tl.load(lse + o_stat + o_m, mask=m_m, other=float("-inf"))
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_delta = tl.load(delta + o_stat + o_m, mask=m_m, other=0.0)
        s = blocks.products(k, q, PRECISION)  # [BN, BM]
        if bias is not None:
            p_bias = bias + o_m.to(tl.int64)[None, :] * bias_row + o_n[:, None]
            s = s * scale + tiles.load(p_bias, m_n[:, None] & m_m[None, :])
        if key_start is not None:
            s = tl.where((o_n >= first)[:, None], s, float("-inf"))
        p = blocks.exponentials(s, b_lse[None, :], bias, scale)
        if norm is not None:
            p *= tl.load(norm + o_stat + o_m, mask=m_m, other=0.0)[None, :]
        dp = blocks.products(v, do, PRECISION)
        kept = p
        if DROPOUT:
            # drawn as [BM, BN], where the columns that share a Philox call are neighbours
            o_dropout = (start + o_m) * n_heads + i_head
            keep = tl.trans(tiles.keep_mask(seed, o_dropout, i_block * BN, threshold, BN))
            kept = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - b_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        p_q += BM * stride
        p_do += BM * n_heads * D
    dk = tl.where(length - first > 1, dk, 0.0)
    m_dk = m_n[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    dk_base = dqkv + start.to(tl.int64) * stride + (n_heads + i_head) * D
    tiles.store(blocks.rows(dk_base, o_n, stride, BLOCK_D), dk * scale, m_dk)
    tiles.store(blocks.rows(dk_base + n_heads * D, o_n, stride, BLOCK_D), dv, m_dk)


def backward(
    dout, qkv, cu_seqlens, key_start, bias, max_seqlen, scale, p, seed, out, lse, needs
):  # fmt: skip
    if not needs[0]:
        return (None,)
    n_tokens, _, n_heads, _ = qkv.shape
    dqkv = torch.empty_like(qkv)
    if n_tokens:
        n_pairs = n_heads * (cu_seqlens.shape[0] - 1)
        delta = torch.empty_like(lse)
        norm = None if bias is None else torch.empty_like(lse)
        threshold, keep_scale = tiles.dropout_args(p)
        strides = blocks.bias_strides(bias)
        choice = blocks.choice(qkv, bias, max_seqlen, p)
        cfg = blocks.config("dq", *choice)
        n_blocks = triton.cdiv(max_seqlen, cfg["BM"])
        _dq_kernel[(n_blocks * n_pairs,)](
            dout, qkv, cu_seqlens, key_start, bias, out, lse, delta, norm, dqkv, seed, n_tokens,
            n_heads, n_blocks, *strides, scale, threshold, keep_scale, **cfg,
        )  # fmt: skip
        cfg = blocks.config("dkv", *choice)
        n_blocks = triton.cdiv(max_seqlen, cfg["BN"])
        _dkv_kernel[(n_blocks * n_pairs,)](
            dout, qkv, cu_seqlens, key_start, bias, lse, delta, norm, dqkv, seed, n_tokens, n_heads,
            n_blocks, *strides, scale, threshold, keep_scale, **cfg,
        )  # fmt: skip
    return (dqkv,)
