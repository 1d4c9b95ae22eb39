"""Guard bands around what Python-side kernels allocate: a write past either end is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

BAND = 64  # elements on either side
_MAKERS = {torch.empty, torch.empty_like, Tensor.new_empty, torch.zeros, Tensor.new_zeros}


class guarded_allocations(TorchFunctionMode):
    """Places every fresh tensor inside a larger buffer whose ends hold a known pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _MAKERS or not made.is_contiguous():
            return made
        size = made.numel()
        buffer = torch.full((size + 2 * BAND,), 7, dtype=made.dtype, device=made.device)
        buffer[BAND : BAND + size] = made.flatten()
        self.buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(made.shape)

    def broken(self) -> list[torch.Size]:
        """Shapes of the buffers whose guard bands were written."""
        return [
            buffer.shape
            for buffer, size in self.buffers
            if not (buffer[:BAND].eq(7).all() and buffer[BAND + size :].eq(7).all())
        ]
