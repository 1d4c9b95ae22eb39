"""What tells that weights are no longer those of which there are copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.ops.backends import extension_missing

pytestmark = pytest.mark.skipif(bool(extension_missing()), reason="needs the C++ extension")
SIZE = 16  # as many rows and columns as elements are looked at


def told(weight: Tensor, read: bool = False) -> int:
    return torch.ops.bert_fast_cpu.fingerprint([weight], [0] if read else [])


CHANGES = {
    "another place": lambda w: w.clone(),
    "another dtype": lambda w: w.view(torch.int32),
    "another shape": lambda w: w.view(SIZE // 2, SIZE * 2),
    "fewer rows": lambda w: w[:-1],
    "transposed": lambda w: w.t(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_weights_are_is_told(change: str) -> None:
    weight = torch.zeros(SIZE, SIZE)
    assert told(CHANGES[change](weight)) != told(weight) == told(weight.view(SIZE, SIZE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_every_element_of_the_diagonal_is_looked_at(dtype: torch.dtype) -> None:
    weight = torch.zeros(SIZE, SIZE, dtype=dtype)
    seen = [told(weight, read=True)]
    for i in range(SIZE):
        weight[i, i] = 1
        seen.append(told(weight, read=True))
    assert len(set(seen)) == len(seen)
    alone = told(weight)
    weight[3, 3] = 0
    assert told(weight) == alone != told(weight, read=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_head_that_is_written_to_is_seen(dim: int) -> None:
    weight = torch.zeros(SIZE * 64, SIZE * 64)
    seen = [told(weight, read=True)]
    for head in range(SIZE):
        weight.narrow(dim, 64 * head, 64).fill_(1)
        seen.append(told(weight, read=True))
    assert len(set(seen)) == len(seen)
