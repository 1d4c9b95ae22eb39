"""What a user sets on a model's own parts, before it has run or since: Hugging Face's answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel, RobertaConfig, RobertaModel

import bert_fast

from .models import tiny
from .parity import DEVICE
from .test_own_parts import IDS, MASK, alike, outputs


class ReLU(nn.Module):
    """Another than torch's, of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) ** 2


def replaced(module: Any, name: str, value: Any) -> None:
    """A plain tensor where there was a parameter, as of a hypernetwork."""
    delattr(module, name)
    setattr(module, name, value)


def activation(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = ReLU()


def causal(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True


def heads(model: Any) -> None:
    for layer in model.encoder.layer:
        part = layer.attention.self
        part.num_attention_heads, part.attention_head_size, part.scaling = 2, 32, 0.2


def positions(model: Any) -> None:
    model.embeddings.position_ids = model.embeddings.position_ids.roll(1)


def types(model: Any) -> None:
    model.embeddings.token_type_ids.copy_(1 - model.embeddings.token_type_ids)


def words(model: Any) -> None:
    table = model.embeddings.word_embeddings
    replaced(table, "weight", table.weight.detach() * 3)


def norms(model: Any) -> None:
    norm = model.embeddings.LayerNorm
    replaced(norm, "weight", norm.weight.detach() * 3)


def shifts(model: Any) -> None:
    for layer in model.encoder.layer:
        replaced(layer.output.LayerNorm, "bias", layer.output.LayerNorm.bias.detach() * 3)


def one_bias_less(model: Any) -> None:
    model.encoder.layer[0].attention.self.key.bias = None
    model.encoder.layer[1].attention.self.query.bias = None


def narrow_positions(model: Any) -> None:
    model.embeddings.position_embeddings.bfloat16()


def function(model: Any) -> None:
    """No module: another is found where settings are."""
    for layer in model.encoder.layer:
        found = layer.intermediate.intermediate_act_fn
        replaced(
            layer.intermediate,
            "intermediate_act_fn",
            torch.sin if found is torch.tanh else torch.tanh,
        )


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, max_position_embeddings=40, type_vocab_size=2,
    )  # fmt: skip
    model = RobertaModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(DEVICE).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("make", "change"),
    [
        *((tiny, change) for change in (activation, causal, heads, positions, types, words, norms)),
        *((tiny, change) for change in (shifts, one_bias_less, narrow_positions, function)),
        (roberta, types),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
def test_set_on_a_part(make: Callable[[], Any], change: Callable[[Any], None], first: bool) -> None:
    model = make()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    mask = None if change is causal else MASK  # SDPA: either or
    before = outputs(model, attention_mask=mask).last_hidden_state
    if not first:
        outputs(ours)
    for again in (False, True):  # a plain tensor may be followed by another
        change(model)
        change(ours)
        expected = outputs(model, attention_mask=mask).last_hidden_state
        alike(outputs(ours, attention_mask=mask).last_hidden_state, expected)
        assert again or change is one_bias_less or not torch.allclose(expected, before)


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
def test_a_dropout_that_drops_all(which: str) -> None:
    model = tiny(**{which: 1.0}).train()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    alike(ours(IDS, MASK).last_hidden_state, model(IDS, MASK).last_hidden_state)


def test_a_type_that_is_padding_has_no_gradient() -> None:
    model = tiny(BertModel)
    model.embeddings.token_type_embeddings.padding_idx = 0
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for one in (model, ours):
        one(IDS, MASK).last_hidden_state[MASK.bool()].square().sum().backward()  # type: ignore
    grads = [one.embeddings.token_type_embeddings.weight.grad for one in (model, ours)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert not grads[1][0].any()
