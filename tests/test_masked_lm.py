"""Masked-LM heads: loss, logits and gradients of every family; what is asked of labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import BertForMaskedLM, BertForPreTraining

import bert_fast
from bert_fast import ops
from bert_fast.families import HEADS, Head
from bert_fast.masked_lm import PackedHead

from .against_hf import misses
from .guard import largest_made
from .models import ids, masks, small, tiny
from .parity import DEVICE

BATCH, LENGTH = 4, 11


def scored(share: float = 0.3) -> Tensor:
    """Labels [B, S] of a share of the real tokens, at least one."""
    generator = torch.Generator().manual_seed(8)
    chosen = (torch.rand(BATCH, LENGTH, generator=generator) < share).to(DEVICE)
    chosen &= masks(BATCH, LENGTH)["right"].bool()
    chosen[:, 1] = True
    return ids(BATCH, LENGTH, 90).masked_fill(~chosen, -100)


def inputs_of(row: Head | None = None, share: float = 0.3) -> dict[str, Any]:
    mask = masks(BATCH, LENGTH)["right"]
    inputs = {
        "input_ids": ids(BATCH, LENGTH, 90) + 2,  # no token is any family's padding
        "attention_mask": mask,
        "labels": scored(share),
    }
    if row is not None and row.pair is not None:
        inputs[row.pair.labels] = torch.tensor([0, 1, 1, 0], device=DEVICE)
    return inputs


def results(model: Any, row: Head, inputs: dict[str, Any]) -> dict[str, Tensor]:
    output = model(**inputs)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    found = {"loss": output.loss.detach(), "logits": output[row.logits].detach()[real]}
    if row.pair is not None:
        found["pair"] = output[row.pair.logits].detach()
    grads = {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | grads


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", HEADS, ids=lambda row: row.model)
def test_every_head(row: Head, dtype: torch.dtype) -> None:
    """Loss, logits of real tokens, every gradient: within budget of transformers in fp64."""
    model, inputs = small(row.module, row.model).to(dtype), inputs_of(row)
    plain = results(copy.deepcopy(model), row, inputs)

    def ours(copied: Any) -> dict[str, Tensor]:
        copied = bert_fast.accelerate(copied)
        assert isinstance(copied, PackedHead)
        found = results(copied, row, inputs)
        assert found["loss"].dtype == plain["loss"].dtype
        assert type(bert_fast.restore(copied)) is type(model)
        return found

    told = misses(model, lambda theirs: results(theirs, row, inputs), ours)
    # A loss near V's logarithm carries the errors of all logits: judged within their ulps.
    assert not told, "; ".join(told)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining])
def test_sparse_logits(cls: type) -> None:
    model = tiny(cls)
    inputs = inputs_of()
    if cls is BertForPreTraining:
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0], device=DEVICE)
    name = "logits" if cls is BertForMaskedLM else "prediction_logits"
    expected = model(**inputs)
    ours = bert_fast.accelerate(copy.deepcopy(model), sparse_logits=True)
    found = ours(**inputs)
    rows = inputs["labels"] != -100
    torch.testing.assert_close(found[name], expected[name][rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert name not in ours.train()(**inputs)
    del inputs["labels"]
    assert ours(**inputs)[name].shape == (BATCH, LENGTH, 99)


def test_sparse_logits_of_texts_without_scored_tokens() -> None:
    model, inputs = tiny(BertForMaskedLM), inputs_of()
    ours = bert_fast.accelerate(copy.deepcopy(model), sparse_logits=True)
    inputs["labels"][-1] = -100  # nothing is computed of its first token, nor of any other
    torch.testing.assert_close(ours(**inputs).loss, model(**inputs).loss, rtol=1e-5, atol=1e-5)
    inputs["labels"][:] = -100
    assert ours(**inputs).loss.isnan() and model(**inputs).loss.isnan()


def test_a_head_under_torch_compile() -> None:
    model = tiny(BertForMaskedLM)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = inputs_of()
    expected, found = model(**inputs), run(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_no_scored_token() -> None:
    """NaN and zero gradients, as cross_entropy has it."""
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    loss = ops.masked_lm_loss(x, weight, None, torch.full((5,), -100))
    assert loss.isnan()
    loss.backward()
    assert not x.grad.any() and not weight.grad.any()
    assert ops.masked_lm_loss(x[:0], weight, None, torch.empty(0, dtype=torch.int64)).isnan()
    with pytest.raises(IndexError, match="labels contains -100, expected 0 to 19 with all_scored"):
        ops.masked_lm_loss(x, weight, None, torch.full((5,), -100), all_scored=True)


def test_logits_and_labels_are_never_whole() -> None:
    """No tensor of [scored, V] or [B, S, V] exists at any time of a training step."""
    rows, vocabulary = 3000, 4099
    x = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with largest_made(lambda shape: shape[-1:] == (vocabulary,)) as largest:
        loss = ops.masked_lm_loss(x, weight, None, torch.randint(vocabulary, (rows,)))
        loss.backward()
    assert 0 < largest.numel <= rows * vocabulary // 2


@pytest.mark.parametrize("value", [99, -1, -101])
def test_a_label_outside_the_vocabulary(value: int) -> None:
    inputs = inputs_of()
    inputs["labels"][1, 1] = value
    with pytest.raises(IndexError, match=rf"labels contains {value}, expected 0 to 98, or -100"):
        bert_fast.accelerate(tiny(BertForMaskedLM))(**inputs)


def test_labels_of_another_shape() -> None:
    inputs = inputs_of()
    inputs["labels"] = inputs["labels"][:, :-1]
    with pytest.raises(ValueError, match=r"labels has shape \(4, 10\), expected \(4, 11\)"):
        bert_fast.accelerate(tiny(BertForMaskedLM))(**inputs)


def test_a_foreign_head_keeps_its_own_code() -> None:
    model = bert_fast.accelerate(tiny(BertForMaskedLM))
    expected = model(**inputs_of()).loss
    model.cls.predictions.decoder.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(UserWarning, match="a hook or a replaced method sits on the head's"):
        found = model(**inputs_of()).loss
    assert "not accelerated: a hook" in str(bert_fast.report(model))
    assert not torch.allclose(found, expected)


def test_tuples_and_hidden_states() -> None:
    model, inputs = tiny(BertForMaskedLM), inputs_of()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    rows = inputs["attention_mask"].bool()
    for more in ({"output_hidden_states": True}, {"return_dict": False}):
        expected, found = model(**inputs, **more), ours(**inputs, **more)
        assert type(found) is type(expected) and len(found) == len(expected)
    states = ours(**inputs, output_hidden_states=True).hidden_states
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    for a, b in zip(states, wanted, strict=True):
        torch.testing.assert_close(a[rows], b[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining])
def test_tokens_are_counted_before_the_encoder_runs(cls: type, sparse: bool) -> None:
    """Later, counting waits for all the encoder's work on a GPU, which then waits for more."""
    model = bert_fast.accelerate(tiny(cls), sparse_logits=sparse).train()
    inputs = inputs_of(next(row for row in HEADS if row.model == cls.__name__))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(**inputs).loss.backward()
    names = [event.name for event in sorted(found.events(), key=lambda e: e.time_range.start)]
    counted = [i for i, name in enumerate(names) if name == "aten::nonzero"]
    began = next(i for i, name in enumerate(names) if "embed_layernorm" in name)
    assert counted and max(counted) < began
