"""From a padded batch's mask to packed tokens; and a batch into the inputs of a graph.

Both are what a GPU has to do before the first layer, and small: what they cost is their launches.
A program packs one row of the batch, and counts what stands before it: in a large
batch a kernel before this one has counted each row (98,304 tokens took one program 160 us).
Nothing here is differentiable.
"""

import torch
import triton
import triton.language as tl

RECOUNT = 8192  # tokens up to which every program counts all rows before its own


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `scan`)."""
    for shape in ((8, 128), (32, 512)):
        yield "x".join(map(str, shape)), (torch.empty(shape, dtype=torch.int64, device=device),)


@triton.jit
def _kept(
    mask,
    first,  # token of the flattened batch
    o,  # tokens from there
    length,  # of a row; `first` begins one
    end,
):
    """(whether to pack, whether it is a masked first column) of [BLOCK] tokens, as int32."""
    real = tl.load(mask + first + o, mask=o < end, other=0) != 0
    column_0 = (o % length == 0) & (o < end)
    return (real | column_0).to(tl.int32), (column_0 & (real == 0)).to(tl.int32)


@triton.jit
def _count(
    mask,
    first,
    length,
    end,  # tokens from `first` on
    BLOCK: tl.constexpr,
):
    """How many to pack, and how many masked first columns."""
    packed = (first * 0).to(tl.int32)
    hidden = (first * 0).to(tl.int32)
    for i in range(0, end, BLOCK):
        kept, alone = _kept(mask, first, i + tl.arange(0, BLOCK), length, end)
        packed += tl.sum(kept, 0)
        hidden += tl.sum(alone, 0)
    return packed, hidden


@triton.jit(do_not_specialize=["length"])
def _count_kernel(
    mask,  # [n_rows, length] integers, not 0: kept
    lengths,  # [n_rows, 2] int32 output: tokens to pack, and whether the first column is masked
    length,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    packed, hidden = _count(mask, row.to(tl.int64) * length, length, length, BLOCK)
    tl.store(lengths + 2 * row, packed)
    tl.store(lengths + 2 * row + 1, hidden)


@triton.jit(do_not_specialize=["length", "n_rows"])
def _scan_kernel(
    mask,  # [n_rows, length] integers, not 0: kept
    lengths,  # of `_count_kernel`, or None
    place,  # [n_rows, length] int32 output: its packed row, or -1
    indices,  # [n_rows * length] int64 output, the kept rows in order; as many as there are
    cu_seqlens,  # [n_rows + 1] int32 output
    key_start,  # [n_rows] int32 output
    counts,  # [2] int64 output: packed rows, and rows of the batch whose first column is masked
    length,
    n_rows,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * length
    if lengths is None:
        packed, hidden = _count(mask, first * 0, length, row * length, BLOCK)
    else:
        packed, hidden = row * 0, row * 0
        for i in range(0, row, BLOCK):
            o = i + tl.arange(0, BLOCK)
            packed += tl.sum(tl.load(lengths + 2 * o, mask=o < row, other=0), 0)
            hidden += tl.sum(tl.load(lengths + 2 * o + 1, mask=o < row, other=0), 0)
    tl.store(cu_seqlens + row, packed)
    for i in range(0, length, BLOCK):
        o = i + tl.arange(0, BLOCK)
        kept, alone = _kept(mask, first, o, length, length)
        p = packed + tl.cumsum(kept, 0) - kept
        tl.store(place + first + o, tl.where(kept != 0, p, -1), mask=o < length)
        tl.store(indices + p, first + o, mask=kept != 0)
        tl.store(key_start + row + o, p + alone, mask=o == 0)
        packed += tl.sum(kept, 0)
        hidden += tl.sum(alone, 0)
    if row == n_rows - 1:
        tl.store(cu_seqlens + n_rows, packed)
        tl.store(counts, packed.to(tl.int64))
        tl.store(counts + 1, hidden.to(tl.int64))


def scan(
    mask: torch.Tensor,  # [B, S] bool or integers, neither 0
) -> tuple[torch.Tensor, ...]:
    """(place [B, S] int32, indices [B S] int64, cu_seqlens [B + 1] int32, key_start [B] int32,
    counts [2] int64) of the tokens that `padding.pack_mask` keeps; see `_scan_kernel`."""
    batch, length = mask.shape
    mask = mask.contiguous()
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)

    def new(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=mask.device)

    place, indices = new(batch * length, torch.int32), new(batch * length, torch.int64)
    bounds, key_start = new(batch + 1, torch.int32), new(batch, torch.int32)
    counts, lengths = new(2, torch.int64), None
    launch = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
    if batch * length > RECOUNT:
        lengths = new(2 * batch, torch.int32)
        _count_kernel[(batch,)](mask, lengths, length, **launch)
    _scan_kernel[(batch,)](
        mask, lengths, place, indices, bounds, key_start, counts, length, batch, **launch
    )
    return place.view(batch, length), indices, bounds, key_start, counts


@triton.jit(
    do_not_specialize=[
        "n_tokens", "length", "type_row", "position_row", "given", "bounds", "capacity", "longest",
    ]
)  # fmt: skip
def _stage_kernel(
    place,  # [B, S] int32, or None: every token stands where it is
    ids,  # [B, S]
    types,  # [B, S] or [1, S]; or None
    positions,  # [B, S] or [1, S]
    cu_seqlens,  # [given] int32
    key_start,  # [given - 1] int32, or None
    to_ids,  # [capacity] int64 output
    to_types,  # [capacity] int64 output, or None
    to_positions,  # [capacity] int64 output
    to_bounds,  # [bounds] int32 output
    to_key_start,  # [bounds - 1] int32 output, or None
    n_tokens,  # B S
    length,
    type_row,  # 0 where one row serves all of the batch, else S
    position_row,
    given,
    bounds,
    capacity,
    longest,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_tokens
    p = o
    if place is not None:
        p = tl.load(place + o, mask=m, other=-1)
    m = m & (p >= 0)
    row, column = o // length, o % length
    tl.store(to_ids + p, tl.load(ids + o, mask=m).to(tl.int64), mask=m)
    at = tl.load(positions + row * position_row + column, mask=m)
    tl.store(to_positions + p, at.to(tl.int64), mask=m)
    if to_types is not None:
        kind = tl.load(types + row * type_row + column, mask=m)
        tl.store(to_types + p, kind.to(tl.int64), mask=m)
    if tl.program_id(0) == 0:
        tokens = tl.load(cu_seqlens + given - 1)
        for i in range(0, bounds, BLOCK):
            j = i + tl.arange(0, BLOCK)
            start = tl.load(cu_seqlens + j, mask=j < given, other=0)
            beyond = tl.minimum(tokens + (j - given + 1) * longest, capacity)
            start = tl.where(j < given, start, beyond)
            tl.store(to_bounds + j, start, mask=j < bounds)
            if to_key_start is not None:
                key = tl.load(key_start + j, mask=j < given - 1, other=0)
                key = tl.where(j < given - 1, key, start)
                tl.store(to_key_start + j, key, mask=j < bounds - 1)


def stage(
    place: torch.Tensor | None,  # [B, S] int32
    ids: torch.Tensor,  # [B, S]
    types: torch.Tensor | None,  # [B or 1, S]
    positions: torch.Tensor,  # [B or 1, S]
    cu_seqlens: torch.Tensor,  # [B + 1] int32
    key_start: torch.Tensor | None,  # [B] int32
    to_ids: torch.Tensor,  # [capacity] int64 output, as are those of types and positions
    to_types: torch.Tensor | None,
    to_positions: torch.Tensor,
    to_bounds: torch.Tensor,  # [bounds] int32 output; bounds > B
    to_key_start: torch.Tensor | None,  # [bounds - 1] int32 output
    longest: int,
) -> None:
    """Packs a batch into memory for `capacity` tokens, and their bounds: behind the batch's own
    come sequences of `longest` tokens, the last ones empty."""
    length, n_tokens = ids.shape[1], ids.numel()
    block = 1024
    _stage_kernel[(triton.cdiv(n_tokens, block),)](
        place, ids.contiguous(), None if types is None else types.contiguous(),
        positions.contiguous(), cu_seqlens.contiguous(), key_start,
        to_ids, to_types, to_positions, to_bounds, to_key_start, n_tokens, length,
        0 if types is None or types.shape[0] != ids.shape[0] else length,
        0 if positions.shape[0] != ids.shape[0] else length,
        cu_seqlens.shape[0], to_bounds.shape[0], to_ids.shape[0], longest,
        BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def forward(mask, save):
    """Launches both kernels as a model does, for what compiles them without a GPU."""
    place, _, bounds, key_start, _ = scan(mask)
    ids, to = mask.long(), mask.new_empty(mask.numel(), dtype=torch.int64)
    stage(place, ids, ids, ids[:1], bounds, key_start, to, to, to, bounds, key_start, 64)
    stage(None, ids, None, ids[:1], bounds, None, to, None, to, bounds, None, 64)
    return (place,)
