"""Every tensor of every op in a wrong shape: an error that names the op, never a wrong result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.ops import OPS
from bert_fast.ops.backends import ISAS
from bert_fast.ops.registry import Op, Sample, contiguous

from .parity import DEVICE
from .test_parity import BACKENDS, skip_unless_willing

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
                # Refused before there is a kernel; of B + 1 bounds alone, only values tell.
                op(*args) if what.startswith("cu_seqlens less") else op.validate(tuple(args))
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


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 3, 3), (2, 2, 2, 3), (2, 2, 3, 2)])
def test_a_bias_of_another_batch_heads_or_length(shape: tuple[int, ...]) -> None:
    op, bounds = OPS["attention"], torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="bias has shape"):
        op.validate((torch.zeros(6, 3, 2, 16), bounds, None, torch.zeros(shape), 3, 1.0, 0.0, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("name", ["attention", "encoder", "pool", "splade"])
def test_bounds_are_of_int32(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    args = list(next(iter(op.samples(CPU, torch.float32))).args)
    at = op.names.index("cu_seqlens")
    args[at] = args[at].to(dtype)
    with pytest.raises(TypeError, match=f"cu_seqlens is {dtype}, expected int32"):
        op.validate(tuple(args))


@pytest.mark.parametrize("name", OPS)
def test_what_is_told_of_outputs_is_true(name: str) -> None:
    """Shapes, strides and dtypes, by which code is compiled."""
    op = OPS[name]
    for sample in op.samples(CPU, torch.float32):
        kernel = op.choose(sample.args)
        with torch.no_grad():
            y = kernel.forward(*map(contiguous, sample.args), save=False)[0]
            told = op.fake(*sample.args, save=False)[0]
        for of in (Tensor.size, Tensor.stride, Tensor.type):
            assert of(y) == of(told), sample.name


@pytest.mark.parametrize("starts", [[0, 9], [0, 3]])
def test_first_keys_outside_of_their_sequence(starts: list[int]) -> None:
    bounds, starts_of = (torch.tensor(v, dtype=torch.int32) for v in ([0, 4, 8], starts))
    args = torch.zeros(8, 3, 2, 16), bounds, starts_of, None, 4, 1.0, 0.0, None
    if (kernel := OPS["attention"].choose(args)).backend not in ISAS:
        pytest.skip(f"{kernel.backend} does not look")
    with torch.no_grad(), pytest.raises(RuntimeError, match="key_start"):
        OPS["attention"](*args)


@pytest.mark.parametrize("name", ["pad", "unpad"])
def test_indices_beyond_the_last_row(name: str) -> None:
    op, indices = OPS[name], torch.tensor([0, 3])
    args = (torch.zeros(2, 2), indices, 3) if name == "pad" else (torch.zeros(3, 2), indices)
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError), match="3"):
        op(*args)


EMPTY = {
    "add_layernorm": lambda z: (z(3, 0), None, None, z(0), z(0), 1e-12, 0.0, None),
    "bias_gelu": lambda z: (z(3, 0), z(0), "gelu"),
    "pad": lambda z: (z(2, 0), torch.tensor([0, 3]), 4),
    "unpad": lambda z: (z(4, 0), torch.tensor([0, 3])),
    "linear": lambda z: (z(3, 0), z(70, 0), None),
    "linear_int8": lambda z: (z(3, 0), z(70, 0), None, "none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), [one for one in BACKENDS if one[0] in EMPTY])
def test_no_columns(name: str, backend: str, dtype: torch.dtype) -> None:
    args = EMPTY[name](lambda *shape: torch.zeros(shape, dtype=dtype, device=DEVICE))
    args = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)
    skip_unless_willing(name, backend, args)
    expected = OPS[name].reference(*args)
    left = [torch.full_like(expected, torch.nan) for _ in range(8)]
    del left  # memory that is not written to is likely to hold it
    with torch.no_grad():
        y = OPS[name](*args, backend=backend)
    assert torch.equal(y, expected)
