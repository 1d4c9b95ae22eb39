"""SPLADE's pooling of masked-LM models without their logits: values, gradients, masks, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM

import bert_fast
from bert_fast import ops
from bert_fast.families import HEADS, Head

from .against_hf import misses
from .guard import largest_made
from .models import ids, masks, small, tiny
from .parity import DEVICE

BATCH, LENGTH = 4, 11
ROWS = [row for row in HEADS if row.pair is None]
MASKS = ("none", "right", "left", "holes", "first_hidden", "nothing_left")


def pooled(logits: Tensor, mask: Tensor | None) -> Tensor:
    """SPLADE's pooling of logits, as its paper writes it."""
    scores = torch.log1p(torch.relu(logits))
    return (scores if mask is None else scores * mask.bool().unsqueeze(-1)).amax(1)


def results(model: Any, vectors: Tensor) -> dict[str, Tensor]:
    dy = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2))
    vectors.backward(dy.to(vectors))
    grads = {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": vectors.detach(), **grads}


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
def test_every_head(row: Head) -> None:
    """Vectors and every gradient: within budget of transformers in fp64."""
    model = small(row.module, row.model)
    inputs = {
        "input_ids": ids(BATCH, LENGTH, 90) + 2,
        "attention_mask": masks(BATCH, LENGTH)["right"],
    }

    def theirs(model: Any) -> dict[str, Tensor]:
        return results(model, pooled(model(**inputs)[row.logits], inputs["attention_mask"]))

    def ours(model: Any) -> dict[str, Tensor]:
        model = bert_fast.accelerate(model)
        return results(model, bert_fast.splade(model, **inputs))

    told = misses(model, theirs, ours)
    assert not told, "; ".join(told)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    """No token that is masked gives a word, be it the first of its text or all of it."""
    model, mask = tiny(BertForMaskedLM), masks(BATCH, LENGTH)[kind]
    tokens = ids(BATCH, LENGTH)
    expected = pooled(model(tokens, mask).logits, mask)
    found = bert_fast.splade(bert_fast.accelerate(model), tokens, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_as_sentence_transformers_pools() -> None:
    library = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    model, mask = tiny(BertForMaskedLM), masks(BATCH, LENGTH)["right"]
    with torch.no_grad():
        logits = model(ids(BATCH, LENGTH), mask).logits
        features = {"token_embeddings": logits, "attention_mask": mask}
        expected = library.SpladePooling("max").eval()(features)["sentence_embedding"]
        found = bert_fast.splade(bert_fast.accelerate(model), ids(BATCH, LENGTH), mask)
    np.testing.assert_allclose(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-5)


def test_logits_are_never_whole() -> None:
    rows, vocabulary = 3000, 4099
    x = torch.randn(rows, 4, device="cpu", requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with largest_made(lambda shape: shape[:1] == (rows,)) as largest:
        y = ops.splade(x, weight, None, torch.tensor([0, 1000, 3000], dtype=torch.int32))
        y.sum().backward()
    assert rows * 4 < largest.numel <= rows * vocabulary // 4


def test_refuses() -> None:
    tokens, pair = ids(BATCH, LENGTH), torch.ones(BATCH, LENGTH, LENGTH, device=DEVICE)
    with pytest.raises(ValueError, match="BertForMaskedLM is no masked-LM model that"):
        bert_fast.splade(tiny(BertForMaskedLM), tokens)
    model = bert_fast.accelerate(tiny(BertForMaskedLM))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 11, 11\), expected"):
        bert_fast.splade(model, tokens, pair)
    model.cls.predictions.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="splade: a hook or a replaced method"):
        bert_fast.splade(model, tokens)
