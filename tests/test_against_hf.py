"""The yardstick for models: what is luck passes, what is a fault does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .against_hf import NEIGHBOURS, misses


def results(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    model(x.to(model.weight)).square().sum().backward()
    return {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def planted(factor: float, calls: Iterable[int]) -> list[str]:
    """What is told where a gradient is off by a factor in some calls: 0 and 1 are of the model."""
    wrong = iter(call in calls for call in range(2 + NEIGHBOURS))

    def ours(model: Any) -> dict[str, Tensor]:
        found = results(model)
        return {**found, "dweight": found["dweight"] * (factor if next(wrong) else 1.0)}

    torch.manual_seed(0)
    return misses(nn.Linear(16, 7), results, ours)


def test_a_fault_is_told_and_luck_is_not() -> None:
    everywhere = range(2 + NEIGHBOURS)
    assert not planted(1.0, everywhere)
    assert not planted(1 + 2e-6, (0, 1, 3))
    (told,) = planted(1 + 2e-6, everywhere)
    assert told.startswith("dweight: ") and f"; with {NEIGHBOURS} neighbours dweight: " in told
    for factor in (torch.nan, 1 + 1e-4):  # no rounding makes those, however rare
        assert planted(factor, (0,))


def test_what_is_missing_is_told() -> None:
    torch.manual_seed(0)
    (told,) = misses(
        nn.Linear(16, 7), results, lambda model: {"dweight": results(model)["dweight"]}
    )
    assert told.startswith("only one side has dbias")
