"""The two kernels before a GPU's first layer: interpreted on a CPU, beside torch's own."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import bert_fast
from bert_fast.graphs import Bucket, _Graph, bucket_of
from bert_fast.inputs import read_batch
from bert_fast.ops.backends import triton_interprets, triton_missing, triton_module
from bert_fast.padding import pack_mask, pack_scanned
from bert_fast.structure import structure_of

from .models import ids, tiny
from .parity import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        bool(triton_missing()) or not (DEVICE.type == "cuda" or triton_interprets()),
        reason="Triton does not run here",
    ),
]


def mask_of(kind: str, batch: int, length: int) -> Tensor:
    columns = torch.arange(length)
    generator = torch.Generator().manual_seed(batch * length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if kind == "holes":  # among them hidden first columns, and rows of nothing
        mask = torch.rand(batch, length, generator=generator) < 0.4
        mask[-1] = False
    else:
        mask = (columns < lengths) if kind == "right" else (columns >= length - lengths)
        mask |= torch.tensor(kind == "full")
    return mask.long().to(DEVICE)


KINDS = ("right", "left", "holes", "full")
SHAPES = ((1, 1), (3, 7), (5, 300), (5, 1500), (33, 257), (9, 1030))
SCANNED = (*itertools.product(KINDS, SHAPES), ("holes", (1030, 9)))


@pytest.mark.parametrize(("kind", "shape"), SCANNED)
def test_scanned_as_by_torch(kind: str, shape: tuple[int, int]) -> None:
    mask = mask_of(kind, *shape)
    found, expected = pack_scanned(mask), pack_mask(mask.cpu())
    assert (found.batch, found.length) == (expected.batch, expected.length)
    assert found.max_seqlen >= expected.max_seqlen
    assert torch.equal(found.cu_seqlens.cpu(), expected.cu_seqlens)
    if expected.indices is None:
        assert found.indices is None and found.key_start is None
        return
    assert found.indices is not None and found.place is not None
    assert torch.equal(found.indices.cpu(), expected.indices)
    place = torch.full(shape, -1, dtype=torch.int32).flatten()
    place[expected.indices] = torch.arange(expected.indices.shape[0], dtype=torch.int32)
    assert torch.equal(found.place.flatten().cpu(), place)
    first = expected.key_start if expected.key_start is not None else expected.cu_seqlens[:-1]
    hidden = bool((mask[:, 0] == 0).any())
    assert (found.key_start is not None) == hidden
    if found.key_start is not None:
        assert torch.equal(found.key_start.cpu(), first)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    mask = mask_of("right", 4, 9)
    kept = (mask * 2).to(dtype)
    found, expected = pack_scanned(kept.t().contiguous().t()), pack_scanned(mask)
    assert found.indices is not None and expected.indices is not None
    assert torch.equal(found.indices, expected.indices)


def test_bounds_of_any_stride() -> None:
    bounds = torch.tensor([[0, 9], [3, 9], [8, 9]], dtype=torch.int32, device=DEVICE)[:, 0]
    packed, to = ids(1, 8), torch.full((8,), -1, device=DEVICE)
    positions, found = to.clone(), torch.zeros(6, dtype=torch.int32, device=DEVICE)
    triton_module("pack").stage(
        None, packed, None, packed, bounds, None, to, None, positions, found, None, 4
    )
    assert found.tolist() == [0, 3, 8, 8, 8, 8] and torch.equal(to, packed[0])


def strided(x: Tensor | None) -> Tensor | None:
    """The same values, columns first."""
    return None if x is None else x.t().contiguous().t()


STAGED = tuple(itertools.product(("right", "holes", "full"), ("none", "one row", "all rows")))


@pytest.mark.parametrize(
    ("kind", "types", "shape"),
    [*((*one, (5, 23)) for one in STAGED), ("holes", "all rows", (1100, 2))],
)
def test_staged_as_by_torch(kind: str, types: str, shape: tuple[int, int]) -> None:
    """Every input of a graph, and what it held before where nothing is written."""
    model = bert_fast.accelerate(tiny()).to(DEVICE)
    structure = structure_of(model, model.bert_fast_family)
    batch, length = shape
    inputs = {"input_ids": ids(batch, length), "attention_mask": mask_of(kind, batch, length)}
    if types != "none":
        inputs["token_type_ids"] = ids(batch if types == "all rows" else 1, length, 2)
        inputs["position_ids"] = ids(batch if types == "all rows" else 1, length, 39)
    read = read_batch(structure, inputs)
    given = read.input_ids, read.token_type_ids, read.position_ids
    packing = pack_scanned(inputs["attention_mask"])

    def staged(by_kernel: bool) -> dict[str, Tensor | None]:
        bucket: Bucket = bucket_of(read, None)
        graph = _Graph(bucket, lambda *_: torch.zeros(1), DEVICE, lambda *_: (print, None), None)
        graph.ids.fill_(7), graph.positions.fill_(7)
        if by_kernel:
            triton_module("pack").stage(
                packing.place, *map(strided, given),
                packing.cu_seqlens, packing.key_start, graph.ids, graph.types, graph.positions,
                graph.bounds, graph.key_start, graph.batch.packing.max_seqlen,
            )  # fmt: skip
        else:
            graph.take_piecewise(read)
        names = ("ids", "types", "positions", "bounds", "key_start")
        return {name: copy.copy(getattr(graph, name)) for name in names}

    found, expected = staged(True), staged(False)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], value), name
