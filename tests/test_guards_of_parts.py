"""What a model is made of, each guard by itself: parts and settings that are not the usual ones."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForPreTraining

import bert_fast

from .models import ids, small, tiny
from .parity import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:bert_fast")
tensor = functools.partial(torch.tensor, device=DEVICE)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_inside_is_called(kind: str) -> None:
    model, called = bert_fast.accelerate(tiny()), []
    part = model.encoder.layer[0].attention.output.dense
    getattr(part, kind)(lambda *args: called.append(1) or None)
    model(ids(2, 6))[0].sum().backward()
    assert called


@pytest.mark.parametrize("setting", ["scale_grad_by_freq", "sparse"])
def test_settings_of_a_table_that_is_trained(setting: str) -> None:
    model = tiny()
    setattr(model.embeddings.token_type_embeddings, setting, True)
    plain = copy.deepcopy(model)
    words = tensor([[3, 3, 3, 5]])
    for one in (plain, bert_fast.accelerate(model)):
        one(words)[0].square().sum().backward()
    found, expected = (m.embeddings.token_type_embeddings.weight.grad for m in (model, plain))
    assert found.is_sparse == expected.is_sparse
    same(found.to_dense(), expected.to_dense())


def test_looked_at_anew_with_gradients_in_between() -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    bert_fast.accelerate(model)
    with torch.no_grad():
        model(ids(2, 6)), model(ids(2, 6))
    for one in (model, plain):
        one.encoder.layer[0].output.LayerNorm.eps = 0.5
    model(ids(2, 6))  # looks at it
    with torch.no_grad():
        same(model(ids(2, 6))[0], plain(ids(2, 6))[0])


@pytest.mark.parametrize("part", ["out_norm", "down_norm", "activation"])
def test_one_setting_of_one_layer(part: str) -> None:
    model = tiny()
    layer = model.encoder.layer[1]
    if part == "activation":
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    else:
        (layer.output if part == "down_norm" else layer.attention.output).LayerNorm.eps = 0.5
    with torch.no_grad():
        expected = model(ids(2, 6))[0]
        bert_fast.accelerate(model)
        for _ in range(2):
            same(model(ids(2, 6))[0], expected)


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Off(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def test_a_norm_of_ones_own() -> None:
    model = bert_fast.accelerate(tiny())
    model.encoder.layer[0].output.LayerNorm.__class__ = Doubled
    plain = bert_fast.restore(copy.deepcopy(model))
    same(model(ids(2, 6))[0], plain(ids(2, 6))[0])


def test_a_dropout_of_ones_own() -> None:
    model = bert_fast.accelerate(tiny())
    model.encoder.layer[0].output.dropout.__class__ = Off
    plain = bert_fast.restore(copy.deepcopy(model))
    same(model(ids(2, 6))[0], plain(ids(2, 6))[0])


class Own(nn.Parameter):
    """A parameter that may compute otherwise, as sharded and quantised ones do."""


ODD = {
    "dtype": lambda tensor: nn.Parameter(tensor.data.double()),
    "class": lambda tensor: Own(tensor.data),
    "none": lambda tensor: None,
}


@pytest.mark.parametrize(
    ("part", "name", "how"),
    [
        (part, name, how)
        for part in ("dense", "LayerNorm")
        for name in ("weight", "bias")
        for how in ODD
        if part == "LayerNorm" or how != "none"
    ],
)
def test_a_parameter_unlike_the_others(part: str, name: str, how: str) -> None:
    model = tiny()
    module = getattr(model.encoder.layer[1].output, part)
    setattr(module, name, ODD[how](getattr(module, name)))
    with pytest.raises(ValueError, match=r"parameters (differ in dtype|are Own)|has no weight or"):
        bert_fast.accelerate(model)


def test_a_layer_that_is_called_as_transformers_is() -> None:
    model = tiny()
    kind = type(model.encoder.layer[0])
    model.encoder.layer[0].__class__ = type(kind.__name__, (kind,), {"__module__": __name__})
    with pytest.raises(ValueError, match="a layer is BertLayer, not transformers' BertLayer"):
        bert_fast.accelerate(model)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_positions_and_types_where_none_are_given(name: str) -> None:
    model = tiny()
    buffer = getattr(model.embeddings, name)
    buffer.copy_(1 - buffer % 2)
    expected = model(ids(2, 6))[0]
    bert_fast.accelerate(model)
    for grad in (True, False, False):
        with torch.set_grad_enabled(grad):
            same(model(ids(2, 6))[0], expected)


def test_a_method_replaced_inside() -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    bert_fast.accelerate(model)
    for one in (model, plain):
        layer = one.encoder.layer[0]
        layer.feed_forward_chunk = lambda x: x * 0.5
    same(model(ids(2, 6))[0], plain(ids(2, 6))[0])


def test_moved_where_torch_swaps_parameters() -> None:
    model = bert_fast.accelerate(tiny())
    with torch.no_grad():
        model(ids(2, 6))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model(ids(2, 6))[0].dtype == torch.bfloat16


def test_a_transposed_weight_is_trained() -> None:
    model = tiny()
    for layer in model.encoder.layer:
        for part in (layer.attention.output.dense, layer.output.dense):
            part.weight.data = part.weight.data.t().contiguous().t()
    plain = copy.deepcopy(model)
    for one in (plain, bert_fast.accelerate(model)):
        one(ids(2, 6))[0].square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            same(one.grad, other.grad)


# -- masked-LM heads ------------------------------------------------------------------------


def masked() -> tuple[Any, dict[str, Tensor]]:
    mask = torch.ones(2, 6, dtype=torch.int64, device=DEVICE)
    mask[1, 3:] = 0
    labels = torch.full((2, 6), -100, device=DEVICE)
    labels[0, 2], labels[1, 1], labels[1, 5] = 7, 8, 9
    return tiny(BertForMaskedLM), {"input_ids": ids(2, 6), "attention_mask": mask, "labels": labels}


def test_a_head_keeps_the_packed_states_once_the_encoder_has_run_alone() -> None:
    model, batch = masked()
    bert_fast.accelerate(model)
    with torch.no_grad():
        first = model(**batch)
        model.bert(batch["input_ids"], attention_mask=batch["attention_mask"])
        second = model(**batch)
    same(second.loss, first.loss)
    same(second.logits, first.logits)
    assert not second.logits[1, 3:].any()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.arange(99, device=DEVICE) / 50.0),
        nn.CrossEntropyLoss(ignore_index=7),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.MultiMarginLoss(),
    ],
    ids=["weight", "ignore_index", "reduction", "class"],
)
def test_a_loss_of_ones_own(loss: nn.Module) -> None:
    model = small(
        "transformers.models.distilbert.modeling_distilbert",
        "DistilBertForMaskedLM",
        dropout=0.0,
        attention_dropout=0.0,
    )
    labels = tensor([[7, 8, 9, 7, 5, 6]])
    model.mlm_loss_fct = loss
    expected = model(ids(1, 6), labels=labels).loss
    same(bert_fast.accelerate(model)(ids(1, 6), labels=labels).loss, expected)


def test_a_hook_on_the_loss() -> None:
    model = small(
        "transformers.models.distilbert.modeling_distilbert",
        "DistilBertForMaskedLM",
        dropout=0.0,
        attention_dropout=0.0,
    )
    labels, called = tensor([[7, 8, 9, 7, 5, 6]]), []
    bert_fast.accelerate(model)
    model.mlm_loss_fct.register_forward_hook(lambda *args: called.append(1) or None)
    model(ids(1, 6), labels=labels)
    assert called


def test_a_hook_on_the_head_itself() -> None:
    model, batch = masked()
    bert_fast.accelerate(model)
    model.cls.register_forward_hook(lambda module, args, output: output * 0)
    assert not model(batch["input_ids"]).logits.any()


def without_padding() -> tuple[Any, dict[str, Tensor]]:
    model, batch = masked()
    return model, {name: batch[name] for name in ("input_ids", "labels")}


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


HEAD_PARTS = {
    "class": lambda head: setattr(head.transform.dense, "__class__", Twice),
    "dtype": lambda head: setattr(
        head.transform.dense, "weight", nn.Parameter(head.transform.dense.weight.data.double())
    ),
    "no bias": lambda head: setattr(head.transform.LayerNorm, "bias", None),
}


@pytest.mark.parametrize("how", HEAD_PARTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_part_of_the_head_of_ones_own(how: str, first: bool) -> None:
    plain, batch = without_padding()
    model = bert_fast.accelerate(copy.deepcopy(plain))
    if first:
        model(**batch)
    for one in (plain, model):
        HEAD_PARTS[how](one.cls.predictions)
    if how == "dtype":  # as transformers: there is no such product
        for one in (plain, model):
            with pytest.raises(RuntimeError, match="dtype"):
                one(**batch)
        return
    expected = plain(**batch)
    same(model(**batch).loss, expected.loss)


def test_tuples_asked_for_by_the_config() -> None:
    plain, batch = without_padding()
    plain.config.return_dict = False
    expected, found = plain(**batch), bert_fast.accelerate(copy.deepcopy(plain))(**batch)
    assert type(found) is tuple
    same(found[0], expected[0])


def test_labels_of_pairs_in_a_column() -> None:
    model = tiny(BertForPreTraining)
    given = {"labels": ids(2, 6), "next_sentence_label": tensor([[0], [1]])}
    expected = model(ids(2, 6), **given).loss
    same(bert_fast.accelerate(model)(ids(2, 6), **given).loss, expected)


def test_labels_of_one_task_of_two() -> None:
    model = bert_fast.accelerate(tiny(BertForPreTraining))
    assert model(ids(2, 6), labels=ids(2, 6)).loss is None


def test_all_logits_in_training() -> None:
    model, batch = masked()
    assert bert_fast.accelerate(model).train()(**batch).logits.shape == (2, 6, 99)


def test_splade_says_what_it_cannot() -> None:
    model = bert_fast.accelerate(tiny(BertForMaskedLM))
    with pytest.raises(ValueError, match=r"expected \[B, S\]"):
        bert_fast.splade(
            model, ids(2, 6), attention_mask=torch.ones(2, 1, 6, 6, device=DEVICE).bool()
        )


def test_attentions_asked_for_by_the_config() -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    bert_fast.accelerate(model)
    model.config.output_attentions = True
    assert len(model(ids(2, 6)).attentions) == 2
