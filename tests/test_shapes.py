"""Every tensor of every op in a wrong shape: an error that names the op, never a wrong result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.ops import OPS
from bert_fast.ops.registry import Op, Sample

CPU = torch.device("cpu")  # on a GPU, values cannot be asked for without a wait
# What may have any number of columns, and lists of which a part is one too.
ANY_WIDTH = {
    ("attention", "qkv"),
    ("bias_gelu", "x"),
    ("encoder", "rows"),
    ("pad", "x"),
    ("pool", "x"),
    ("unpad", "indices"),
    ("unpad", "x"),
}


def wrong(op: Op, sample: Sample) -> Iterator[tuple[str, list[Any]]]:
    """The arguments with one tensor made narrower, or put into one more dimension."""
    for i, name in enumerate(op.names):
        value = sample.args[i]
        many = isinstance(value, list)
        for j, tensor in enumerate(value if many else [value]):
            if not isinstance(tensor, Tensor):
                continue
            where = f"{name}[{j}]" if many else name
            for told, other in variants(op, name, tensor):
                args: list[Any] = list(sample.args)
                args[i] = [*value[:j], other, *value[j + 1 :]] if many else other
                yield f"{where} {told}", args


def variants(op: Op, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"of shape {(1, *tensor.shape)}", tensor.unsqueeze(0)
    ends_empty = name == "cu_seqlens" and tensor.numel() > 1 and tensor[-1] == tensor[-2]
    if tensor.dim() and tensor.shape[-1] and (op.name, name) not in ANY_WIDTH and not ends_empty:
        yield f"less its last of {tuple(tensor.shape)}", tensor[..., :-1].contiguous()


@pytest.mark.parametrize("name", OPS)
def test_wrong_shapes_are_refused_by_name(name: str) -> None:
    op, tried = OPS[name], 0
    for sample in op.samples(CPU, torch.float32):
        for what, args in wrong(op, sample):
            with torch.no_grad(), pytest.raises((ValueError, TypeError, RuntimeError)) as found:
                op(*args)
                pytest.fail(f"{sample.name}: {what} ran")
            assert "bert_fast." in str(found.value), f"{sample.name}: {what}: {found.value}"
            tried += 1
    assert tried >= 8, tried


@pytest.mark.parametrize("bounds", [[0, 3, 11], [0, 9, 5, 12], [1, 12]])
@pytest.mark.parametrize("name", ["attention", "pool", "splade"])
def test_bounds_that_are_not_those_of_the_rows(name: str, bounds: list[int]) -> None:
    op = OPS[name]
    args = list(next(iter(op.samples(CPU, torch.float32))).args)
    lead = op.names.index(op.lead)
    args[lead] = args[lead][:1].expand(12, *args[lead].shape[1:]).contiguous()
    at = op.names.index("cu_seqlens")
    args[at] = torch.tensor(bounds, dtype=torch.int32)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        op(*args)
