"""What the packed forward was asked for, while a test watches."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from torch import Tensor

import bert_fast
from bert_fast import packed

from .models import tiny


class Forward(NamedTuple):
    """tokens: those computed; padded: those of the batch; rows: those wanted, None for all."""

    training: bool
    tokens: int
    padded: int
    rows: Tensor | None


def forwards(monkeypatch: pytest.MonkeyPatch, cls: type) -> list[Forward]:
    """A list that takes every forward of a packed encoder; `cls`: of the head above it."""
    bert_fast.accelerate(tiny(cls))  # a class is looked at once in a process, by forwards too
    seen: list[Forward] = []
    run = packed.packed_forward

    def watched(*args: Any) -> Any:
        model, _, batch, _, _, _, rows, _ = args
        padded = batch.packing.batch * batch.packing.length
        seen.append(Forward(model.training, batch.tokens, padded, rows))
        return run(*args)

    monkeypatch.setattr(packed, "packed_forward", watched)
    return seen
