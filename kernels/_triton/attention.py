"""out = dropout(softmax(scale Q K^T + bias)) V over packed sequences of any length.

One program computes a block of query rows of one head of one sequence, keys streaming past with a
running maximum and sum (FlashAttention-2, arXiv 2307.08691), so S x S scores never reach memory.
Blocks beyond the end of a sequence return at once. Only the last block of keys is masked where
every key of the sequence is allowed. The maximum is taken before scaling, so scale is positive.
"""

import torch
import triton
import triton.language as tl

from . import attention_blocks as blocks
from . import tiles
from .attention_backward import backward
from .attention_blocks import samples

__all__ = ["backward", "forward", "samples"]


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
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
    n_from,
    n_to,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the keys n_from..n_to to the running (acc, total, top) of the rows."""
    p_k = blocks.rows(k_base, n_from + tl.arange(0, BN), stride, BLOCK_D)
    p_v = blocks.rows(v_base, n_from + tl.arange(0, BN), stride, BLOCK_D)
    for i_n in range(n_from, n_to, BN):
        o_n = i_n + tl.arange(0, BN)
        k = blocks.load_rows(p_k, o_n < length, MASKED, D, BLOCK_D)
        s = blocks.scores(q, k, bias, bias_row, o_m, o_n, length, first, scale, MASKED, PRECISION)
        new_top = tl.max(s, 1)
        if bias is None:
            new_top *= scale
        new_top = tl.maximum(top, new_top)
        # a row may have met no key yet: keep inf - inf out of the exponent
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = blocks.exponentials(s, pivot[:, None], bias, scale)
        decay = tl.exp2((top - pivot) * tiles.LOG2E)
        total = total * decay + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(tiles.keep_mask(seed, o_dropout, i_n, threshold, BN), p, 0.0)
        v = blocks.load_rows(p_v, o_n < length, MASKED, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
        p_k += BN * stride
        p_v += BN * stride
    return acc, total, top


@triton.jit(
    do_not_specialize=["n_tokens", "n_blocks", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _forward_kernel(
    qkv,  # [T, 3, N, D]
    cu_seqlens,  # [B + 1] int32
    key_start,  # [B] int32 or None
    bias,  # [B or 1, N or 1, S, S] or None
    out,  # [T, N, D] output
    lse,  # [N, T] float32 output
    seed,  # [1] int64 or None
    n_tokens,
    n_heads,
    n_blocks,  # blocks of the longest sequence
    bias_seq,  # strides of bias, 0 where it is broadcast
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
    q = blocks.load_rows(blocks.rows(q_base, o_m, stride, BLOCK_D), m_m, True, D, BLOCK_D)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    plain_to, masked_from = blocks.parts(length, first, BN)
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, stride, bias, bias_row, o_m, o_dropout, length,
        first, scale, seed, threshold, 0, plain_to, False, DROPOUT, PRECISION, D, BLOCK_D, BN,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, stride, bias, bias_row, o_m, o_dropout, length,
        first, scale, seed, threshold, masked_from, length, True, DROPOUT, PRECISION, D, BLOCK_D,
        BN,
    )  # fmt: skip
    alive = total != 0.0  # of NaN too
    # kept probabilities are scaled once, here
    inverse = tl.where(alive, keep_scale / tl.where(alive, total, 1.0), 0.0)
    o_d = tl.arange(0, BLOCK_D)
    p_out = blocks.rows(
        out + (start.to(tl.int64) * n_heads + i_head) * D, o_m, n_heads * D, BLOCK_D
    )
    tiles.store(p_out, acc * inverse[:, None], m_m[:, None] & (o_d < D)[None, :])
    b_lse = tl.where(alive, top + tl.log(tl.where(alive, total, 1.0)), float("-inf"))
    tl.store(lse + i_head.to(tl.int64) * n_tokens + start + o_m, b_lse, mask=m_m)


def forward(qkv, cu_seqlens, key_start, bias, max_seqlen, scale, p, seed, save):
    n_tokens, _, n_heads, head_dim = qkv.shape
    out = qkv.new_empty((n_tokens, n_heads, head_dim))
    lse = qkv.new_empty((n_heads, n_tokens), dtype=torch.float32)
    if n_tokens:
        cfg = blocks.config("forward", *blocks.choice(qkv, bias, max_seqlen, p))
        n_blocks = triton.cdiv(max_seqlen, cfg["BM"])
        threshold, keep_scale = tiles.dropout_args(p)
        _forward_kernel[(n_blocks * n_heads * (cu_seqlens.shape[0] - 1),)](
            qkv, cu_seqlens, key_start, bias, out, lse, seed, n_tokens, n_heads, n_blocks,
            *blocks.bias_strides(bias), scale, threshold, keep_scale, **cfg,
        )  # fmt: skip
    return out, lse
