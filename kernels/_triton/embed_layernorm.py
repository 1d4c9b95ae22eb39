"""y = dropout(weight (z - mean) rstd + bias), z = word[ids] + token_type[types] + position[pos].

The three gathers land in registers, so z never reaches memory; the schedule is add_layernorm's.
Backward gathers z again and returns its gradient: the scatter into the tables is not done here,
because a deterministic one sorts the ids and is no part of a row kernel.
"""

import torch
import triton
import triton.language as tl

from . import tiles


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    seed = torch.empty(1, dtype=torch.int64, device=device)
    shapes = [
        (64, 37, 0.1, torch.int32),
        (8192, 768, 0.1, torch.int64),
        (8192, 8192, 0.1, torch.int64),
    ]
    if full:
        shapes += [(8192, 384, 0.1, torch.int64), (64, 768, 0.0, torch.int64)]
    for n_rows, n_cols, p, kind in shapes:
        ids = torch.empty(n_rows, dtype=kind, device=device)
        tables = new(512, n_cols), new(512, n_cols), new(2, n_cols)
        tail = new(n_cols), new(n_cols), 1e-12, 0, p, seed if p else None
        yield f"{n_rows}x{n_cols} p={p}", (ids, ids, ids, *tables, *tail)
        if full and n_cols == 768:
            yield f"{n_rows}x{n_cols} p={p} one type", (ids, None, ids, *tables, *tail)
            yield f"{n_rows}x{n_cols} p={p} no type", (ids, None, ids, *tables[:2], None, *tail)


@triton.jit
def _gathered(ids, table, size, o_row, o_col, m_row, mask, n_cols):
    """Rows of a table [size, n_cols]; NaN for an id outside it, as a kernel cannot raise."""
    i_row = tl.load(ids + o_row, mask=m_row, other=0).to(tl.int64)
    known = (i_row >= 0) & (i_row < size)
    i_row = tl.where(known, i_row, 0)
    found = tiles.load(table + i_row[:, None] * n_cols + o_col[None, :], mask)
    return tl.where(known[:, None], found, float("nan"))


@triton.jit
def _row(
    input_ids,
    token_type_ids,
    position_ids,
    word,
    position,
    token_type,
    n_words,
    n_positions,
    n_types,
    o_row,
    o_col,
    m_row,
    mask,
    n_cols,
):
    """z of a tile of rows."""
    z = _gathered(input_ids, word, n_words, o_row, o_col, m_row, mask, n_cols)
    if token_type is not None:
        if token_type_ids is not None:
            z += _gathered(token_type_ids, token_type, n_types, o_row, o_col, m_row, mask, n_cols)
        else:
            z += tiles.load(token_type + o_col, o_col < n_cols)[None, :]
    return z + _gathered(position_ids, position, n_positions, o_row, o_col, m_row, mask, n_cols)


@triton.jit(
    do_not_specialize=["n_rows", "n_words", "n_positions", "n_types", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _forward_kernel(
    input_ids,  # [n_rows] int32 or int64
    token_type_ids,  # [n_rows] or None (row 0)
    position_ids,  # [n_rows]
    word,  # [V, n_cols]
    position,  # [P, n_cols]
    token_type,  # [Y, n_cols] or None
    weight,  # [n_cols]
    bias,  # [n_cols]
    y,  # [n_rows, n_cols] output
    mean,  # [n_rows] float32 output
    rstd,  # [n_rows] float32 output
    seed,  # [1] int64 or None
    n_words,
    n_positions,
    n_types,
    n_rows,
    n_cols,
    eps,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    z = _row(
        input_ids, token_type_ids, position_ids, word, position, token_type, n_words, n_positions,
        n_types, o_row, o_col, m_row, mask, n_cols,
    )  # fmt: skip
    z_mean, z_rstd = tiles.row_stats(z, mask, n_cols, eps)
    w = tiles.load(weight + o_col, m_col)
    b = tiles.load(bias + o_col, m_col)
    out = (z - z_mean[:, None]) * z_rstd[:, None] * w[None, :] + b[None, :]
    if DROPOUT:
        keep = tiles.keep_mask(seed, o_row, 0, threshold, COLS)
        out = tl.where(keep, out * keep_scale, 0.0)
    tiles.store(y + o_row[:, None] * n_cols + o_col[None, :], out, mask)
    tl.store(mean + o_row, z_mean, mask=m_row)
    tl.store(rstd + o_row, z_rstd, mask=m_row)


@triton.jit(
    do_not_specialize=["n_rows", "n_words", "n_positions", "n_types", "threshold"],
    do_not_specialize_on_alignment=["seed"],  # one element of many
)
def _backward_kernel(
    dy,  # [n_rows, n_cols]
    input_ids,  # [n_rows] int32 or int64
    token_type_ids,  # [n_rows] or None (row 0)
    position_ids,  # [n_rows]
    word,  # [V, n_cols]
    position,  # [P, n_cols]
    token_type,  # [Y, n_cols] or None
    weight,  # [n_cols]
    mean,  # [n_rows] float32
    rstd,  # [n_rows] float32
    dz,  # [n_rows, n_cols] output, or None
    parts,  # [programs, 2, n_cols] float32 output: dweight, dbias; or None
    seed,  # [1] int64 or None
    n_words,
    n_positions,
    n_types,
    n_rows,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_part = tl.program_id(0)
    o_col = tl.arange(0, COLS)
    m_col = o_col < n_cols
    if COLS <= 4096:
        w = tiles.load(weight + o_col, m_col)
    b_dweight = tl.zeros((COLS,), tl.float32)
    b_dbias = tl.zeros((COLS,), tl.float32)
    for i_row in range(i_part * ROWS, n_rows, tl.num_programs(0) * ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_col[None, :]
        p_row = o_row[:, None] * n_cols + o_col[None, :]
        b_dy = tiles.load(dy + p_row, mask)
        if DROPOUT:
            keep = tiles.keep_mask(seed, o_row, 0, threshold, COLS)
            b_dy = tl.where(keep, b_dy * keep_scale, 0.0)
        z = _row(
            input_ids, token_type_ids, position_ids, word, position, token_type, n_words,
            n_positions, n_types, o_row, o_col, m_row, mask, n_cols,
        )  # fmt: skip
        z_mean = tl.load(mean + o_row, mask=m_row, other=0.0)
        z_rstd = tl.load(rstd + o_row, mask=m_row, other=0.0)
        xhat = tl.where(mask, (z - z_mean[:, None]) * z_rstd[:, None], 0.0)
        if COLS > 4096:  # the widest rows have no registers to keep the weight in
            w = tiles.load(weight + o_col, m_col)
        if dz is not None:
            tiles.store(dz + p_row, tiles.norm_grad(b_dy, xhat, w, z_rstd, n_cols), mask)
        if parts is not None:
            b_dweight += tl.sum(b_dy * xhat, 0)
            b_dbias += tl.sum(b_dy, 0)
    if parts is not None:
        p_parts = parts + i_part.to(tl.int64) * 2 * n_cols + o_col
        tl.store(p_parts, b_dweight, mask=m_col)
        tl.store(p_parts + n_cols, b_dbias, mask=m_col)


def _sizes(*tables: torch.Tensor | None) -> list[int]:
    return [0 if table is None else table.shape[0] for table in tables]


def forward(
    input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps,
    padding_idx, p, seed, save,
):  # fmt: skip
    n_rows, n_cols = input_ids.shape[0], word.shape[1]
    y = word.new_empty((n_rows, n_cols))
    mean = word.new_empty(n_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, False)
        threshold, keep_scale = tiles.dropout_args(p)
        _forward_kernel[(triton.cdiv(n_rows, cfg["ROWS"]),)](
            input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias,
            y, mean, rstd, seed, *_sizes(word, position, token_type), n_rows, n_cols, eps,
            threshold, keep_scale, p > 0.0, **cfg,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    dy, input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps,
    padding_idx, p, seed, mean, rstd, needs,
):  # fmt: skip
    """(dz, dweight, dbias); the caller scatters dz [T, H] into the three tables."""
    n_rows, n_cols = dy.shape
    new = torch.empty_like if n_rows else torch.zeros_like
    dz = new(dy) if any(needs[:3]) else None
    dweight = new(weight) if needs[3] else None
    dbias = new(bias) if needs[4] else None
    if n_rows:
        cfg = tiles.row_config(n_rows >= tiles.MANY_ROWS, n_cols, True)
        programs = tiles.row_programs(n_rows, cfg, dy.device)
        parts = None
        if needs[3] or needs[4]:
            parts = dy.new_empty((programs, 2, n_cols), dtype=torch.float32)
        threshold, keep_scale = tiles.dropout_args(p)
        _backward_kernel[(programs,)](
            dy, input_ids, token_type_ids, position_ids, word, position, token_type, weight, mean,
            rstd, dz, parts, seed, *_sizes(word, position, token_type), n_rows, n_cols, threshold,
            keep_scale, p > 0.0, **cfg,
        )  # fmt: skip
        if parts is not None:
            tiles.sum_parts(parts, dweight, dbias)
    return dz, dweight, dbias
