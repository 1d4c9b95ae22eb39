"""What is seen of the tensors that are made: writes past their ends, and how large they get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

BAND = 64  # elements on either side
_MAKERS = {torch.empty, torch.empty_like, Tensor.new_empty, torch.zeros, Tensor.new_zeros}


class largest_made(TorchFunctionMode):
    """The most elements of a tensor made inside of whose shape `is_of(shape)` holds."""

    def __init__(self, is_of: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.is_of, self.numel = is_of, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and self.is_of(made.shape):
            self.numel = max(self.numel, made.numel())
        return made


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
