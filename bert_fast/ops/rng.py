"""Dropout's random numbers: a counter, not a stream, so that backward can redraw the same mask.

keep(seed, row, col) = philox4x32_10(key=seed, counter=(col >> 2, row, 0, 0))[col & 3] >= p * 2^32

Philox-4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). All
backends compute exactly this, bit for bit, so a mask does not depend on who draws it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 words (as int64) for each counter (c0, c1, 0, 0); seed: int64 [1]."""
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The 64-bit product may wrap to a negative int64; its bits are right, and & drops the sign.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """A word below this drops its element; an integer, so that every backend agrees."""
    return int(p * 2**32)


def keep_mask(seed: Tensor, rows: Tensor, cols: Tensor, p: float) -> Tensor:
    """Bool mask, broadcast over `rows` and `cols` (int64); True keeps, with probability 1 - p."""
    rows, cols = torch.broadcast_tensors(rows, cols)
    words = torch.stack(philox(seed, cols >> 2, rows & _LOW))
    return words.gather(0, (cols & 3).unsqueeze(0))[0] >= threshold(p)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x [T, H] with elements zeroed with probability p and the rest scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    assert seed is not None
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    cols = torch.arange(x.shape[1], device=x.device)
    return torch.where(keep_mask(seed, rows, cols, p), x / (1.0 - p), 0.0)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """`count` seeds from torch's own generator: torch.manual_seed and checkpointing govern them."""
    return torch.randint(0, 2**62, (count,), dtype=torch.int64, device=device)
