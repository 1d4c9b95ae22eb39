"""What users change in a model, its registries or its settings is computed, or they are told."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaForMaskedLM,
    RobertaModel,
)
from transformers.models.bert import modeling_bert as hf

import bert_fast
from bert_fast.encode import token_limit
from bert_fast.modeling import encode

from .models import ids, masks, small, tiny
from .parity import DEVICE

IDS, MASK = ids(3, 12), masks(3, 12)["right"]
LEFT = masks(3, 12)["left"]


def outputs(model: nn.Module, **inputs: Any) -> Any:
    with torch.inference_mode():
        return model(**{"input_ids": IDS, "attention_mask": MASK, **inputs})


def alike(found: Tensor, expected: Tensor, mask: Tensor | None = MASK) -> None:
    rows = ... if mask is None else mask.bool()
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-4, atol=1e-5)


# -- heads --------------------------------------------------------------------------------------


class Capped(hf.BertLMPredictionHead):
    def forward(self, states: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(states) / 3)


class Shifted(hf.BertPredictionHeadTransform):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + 1


def changed_transform(model: Any) -> None:
    model.cls.predictions.transform = Shifted(model.config).to(DEVICE)


def changed_predictions(model: Any) -> None:
    model.cls.predictions = Capped(model.config).to(DEVICE)


@pytest.mark.parametrize("change", [changed_transform, changed_predictions])
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize("first", [True, False])
def test_a_head_of_ones_own_runs(cls: type, change: Any, first: bool) -> None:
    model = tiny(cls)
    if first:
        change(model)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    if not first:
        change(model)
        ours.cls = copy.deepcopy(model.cls)
    with pytest.warns(UserWarning, match="in its head is not transformers'"):
        alike(outputs(ours)[0], outputs(model)[0])
    assert "is not transformers'" in str(bert_fast.report(ours))


class Silu(nn.Module):
    def __init__(self, head: Any) -> None:
        super().__init__()
        self.dense, self.layer_norm, self.decoder = head.dense, head.layer_norm, head.decoder

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        return self.decoder(self.layer_norm(nn.functional.silu(self.dense(states))))


def test_another_module_for_robertas_head_runs() -> None:
    model = small(RobertaForMaskedLM.__module__, "RobertaForMaskedLM")
    model.lm_head = Silu(model.lm_head)
    expected = outputs(model).logits
    with pytest.warns(UserWarning, match="a Silu in its head is not transformers'"):
        alike(outputs(bert_fast.accelerate(model)).logits, expected)


def test_another_loss_is_taken() -> None:
    model = DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
    ).eval()
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)
    expected = outputs(model, labels=IDS, attention_mask=None).loss
    ours = bert_fast.accelerate(model)
    with pytest.warns(UserWarning, match="its loss is CrossEntropyLoss"):
        alike(outputs(ours, labels=IDS, attention_mask=None).loss, expected, None)


def test_children_that_are_no_part_of_the_head() -> None:
    model = tiny(BertForMaskedLM)
    ours = bert_fast.accelerate(copy.deepcopy(model), sparse_logits=True)
    ours.teacher, ours.metric, ours.spare = tiny(seed=1), Soft(nn.Embedding(2, 2)), nn.NLLLoss()
    assert MASK is not None
    labels = IDS.masked_fill(MASK.to(DEVICE) == 0, -100)
    found = outputs(ours, labels=labels)
    assert found.logits.shape == (MASK.sum(), 99)
    alike(found.loss, outputs(model, labels=labels).loss, None)


class Mean(bert_fast.BertModel):  # type: ignore[misc, name-defined]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.pooler_output = out.last_hidden_state.mean(1)
        return out


def test_a_class_on_a_packed_one_reads_all_tokens() -> None:
    for cls in (BertForSequenceClassification, BertForMaskedLM):
        model = tiny(cls)
        model.bert = Mean(model.config, add_pooling_layer=cls is not BertForMaskedLM)
        model.eval()
        ours = bert_fast.accelerate(model)
        inside = outputs(model.bert, attention_mask=None)
        with torch.inference_mode():
            if cls is BertForSequenceClassification:
                expected = model.classifier(inside.last_hidden_state.mean(1))
            else:
                expected = model.cls(inside.last_hidden_state)
        told = pytest.warns(UserWarning, match="its encoder is not accelerated")
        with nullcontext() if cls is BertForSequenceClassification else told:
            alike(outputs(ours, attention_mask=None).logits, expected, None)


# -- embeddings -----------------------------------------------------------------------------------


class FromTheFirstReal(hf.BertEmbeddings):
    """Counts positions from the first token that is not padding."""

    def forward(self, input_ids: Any = None, token_type_ids: Any = None, position_ids: Any = None,
                **kwargs: Any) -> Tensor:  # fmt: skip
        if position_ids is None:
            position_ids = (input_ids.ne(0).cumsum(1) - 1).clamp(min=0)
        return super().forward(input_ids, token_type_ids, position_ids, **kwargs)


def test_embeddings_of_ones_own_count_positions() -> None:
    model = tiny()
    model.embeddings = FromTheFirstReal(model.config).to(DEVICE).eval()
    given = {"input_ids": IDS.clamp(min=1) * LEFT.to(DEVICE), "attention_mask": LEFT}
    expected = outputs(model, **given).last_hidden_state
    ours = bert_fast.accelerate(model)
    alike(outputs(ours, **given).last_hidden_state, expected, LEFT)
    with pytest.raises(ValueError, match="position_ids has to be given with cu_seq_lens_q"):
        outputs(ours, attention_mask=None, cu_seq_lens_q=torch.tensor([0, 12]), input_ids=IDS[:1])


def test_embeddings_of_ones_own_are_not_handed_a_corpus() -> None:
    model = tiny()
    model.embeddings = FromTheFirstReal(model.config).to(DEVICE).eval()
    with pytest.raises(ValueError, match="its FromTheFirstReal may count positions by itself"):
        token_limit(model, None)


class Sinusoidal(nn.Module):
    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.sin(position_ids.unsqueeze(-1) / torch.arange(1, 65, device=DEVICE))


def test_embeddings_without_a_table_of_positions() -> None:
    model = tiny()
    model.embeddings = FromTheFirstReal(model.config).to(DEVICE).eval()
    model.embeddings.position_embeddings = Sinusoidal()
    expected = outputs(model).last_hidden_state
    ours = bert_fast.accelerate(model, verbose=True)
    alike(outputs(ours).last_hidden_state, expected)


class Soft(nn.Module):
    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) * 2


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
def test_word_embeddings_put_in_later(cls: type) -> None:
    model = tiny(cls)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for one in (model, ours):
        one.bert.embeddings.word_embeddings = Soft(one.bert.embeddings.word_embeddings)
    with pytest.warns(UserWarning, match="another layout"):
        alike(outputs(ours).logits, outputs(model).logits, MASK if cls is BertForMaskedLM else None)
    assert "another layout" in str(bert_fast.report(ours))


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_that_bounds_its_rows(first: bool) -> None:
    model = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    if not first:
        outputs(ours)
    for one in (model, ours):
        one.embeddings.word_embeddings.max_norm = 0.5
    alike(outputs(ours).last_hidden_state, outputs(model).last_hidden_state)


@pytest.mark.parametrize("part", ["word_embeddings", "LayerNorm"])
def test_tables_with_gaps(part: str) -> None:
    model = bert_fast.accelerate(tiny())
    outputs(model)
    expected = outputs(model).last_hidden_state
    weight = getattr(model.embeddings, part).weight
    weight.data = weight.data.repeat_interleave(2, -1)[..., ::2]
    for _ in range(2):
        alike(outputs(model).last_hidden_state, expected)


def test_another_forward_of_the_poolers_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.BertPooler, "forward", lambda self, states: states.mean(1))
    model = bert_fast.accelerate(tiny())
    for _ in range(3):
        found = outputs(model)
        alike(found.pooler_output, found.last_hidden_state.mean(1), None)


def test_padding_in_a_text_has_no_position() -> None:
    """A literal <pad> of RoBERTa's kin: not counted, whether texts come padded or packed."""
    model = small(RobertaModel.__module__, "RobertaModel")
    tokens = ids(1, 11)[0].clamp(min=2)
    tokens[[2, 8]] = model.config.pad_token_id
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        found = encode(model, tokens, bounds, 6)
        one, other = (model(part[None]).last_hidden_state[0] for part in tokens.split([5, 6]))
    torch.testing.assert_close(found, torch.cat([one, other]), rtol=1e-4, atol=1e-5)
