"""CPU GEMMs in C++ on weights packed once into panels, bias and activation in the epilogue.

The copy is kept beside the user's weight (`weight_copies`), in its dtype. Sums are fp32. 16-bit
operands are widened on the way, so bf16 and fp16 run at the speed of fp32 on machines that have no
arithmetic of theirs; with AVX-512 BF16 or AMX, bf16 is multiplied as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import ISAS, cpu_reasons
from .registry import Kernel
from .weight_copies import copy_of, reasons_against_copies


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, isa: int, int8: bool = False
) -> Tensor:
    """activation(x W^T + b) in x's dtype; `activation` may be "none". int8: see `linear_int8`."""
    run = torch.ops.bert_fast_cpu.linear_forward
    return run(x, panels(weight, isa, int8), bias, weight.shape[0], activation, isa)


def panels(weight: Tensor, isa: int, int8: bool = False) -> Tensor:
    """The packed copy kept of a weight."""
    return copy_of((weight,), f"panels {isa} {int8}", lambda: pack(weight, isa, int8))


def pack(weight: Tensor, isa: int, int8: bool = False, apart: int = 0) -> Tensor:
    """A weight [N, K] as panels of columns, in its dtype or in 8 bits.

    apart: so many of the first columns have panels of their own.
    """
    return torch.ops.bert_fast_cpu.pack_weight(weight.contiguous(), int8, apart, isa)


Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., Sequence[Tensor | None]]


def packed_kernels(
    forward: Callable[[int], Forward], backward: Backward | None
) -> tuple[Kernel, ...]:
    """A kernel per instruction set, best first; `forward(isa)` gives its forward."""
    return tuple(_kernel(name, isa, forward(isa), backward) for name, isa in ISAS.items())


def _kernel(name: str, isa: int, forward: Forward, backward: Backward | None) -> Kernel:
    def why_not(x: Tensor, weight: Tensor, *rest: Any) -> list[str]:
        return cpu_reasons(x, name, isa) or reasons_against_copies(weight)

    return Kernel(name, forward, backward, why_not, device="cpu")
