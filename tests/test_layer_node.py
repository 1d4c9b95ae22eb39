"""A layer in one autograd node gives what its ops give one by one, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

import bert_fast
from bert_fast import layer_node

from .models import ids, tiny
from .parity import DEVICE

pytestmark = pytest.mark.gpu

MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 2 + [1] * 7])
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each layer that could be one node where gradients are recorded, whether it was."""
    asked: list[bool] = []
    applies = layer_node.applies

    def note(*args: Any) -> bool:
        found = applies(*args)
        if torch.is_grad_enabled():  # it is not where `accelerate` has a look at the model
            asked.append(found)
        return found

    monkeypatch.setattr(layer_node, "applies", note)
    yield asked


def model_of(cls: type = BertModel, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny(cls, num_labels=3, **DROPOUT, **changes).to(dtype).train()


def step(model: Any, autocast: bool = False, **inputs: Any) -> dict[str, Tensor | None]:
    """The loss, and every gradient, of one step."""
    given = {"input_ids": ids(3, 9), "attention_mask": MASK.to(DEVICE), **inputs}
    torch.manual_seed(5)
    with torch.autocast(DEVICE.type, torch.bfloat16, autocast):
        out = model(**given)
    loss = out.loss if "labels" in given else (out[0].float() * out[1].float().sum()).sin().sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def alike(monkeypatch: pytest.MonkeyPatch, run: Callable[[], dict[str, Tensor | None]]) -> None:
    one = run()
    with monkeypatch.context() as patch:
        patch.setattr(layer_node, "applies", lambda *args: False)
        single = run()
    assert one.keys() == single.keys()
    for name, value in single.items():
        other = one[name]
        assert (other is None) == (value is None), name
        if value is not None:
            assert other.dtype == value.dtype and torch.equal(other, value), name


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast", "autocast of bf16"])
def test_values_and_gradients(
    dtype: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch, nodes: list[bool]
) -> None:
    model = model_of(dtype=torch.bfloat16 if dtype.endswith("bf16") else torch.float32)
    bert_fast.accelerate(model, checkpoint=checkpoint)
    alike(monkeypatch, lambda: step(model, dtype.startswith("autocast")))
    assert nodes == [True] * (4 if checkpoint == "full" else 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_a_head(autocast: bool, monkeypatch: pytest.MonkeyPatch, nodes: list[bool]) -> None:
    """The last layer computes those that are read only."""
    model = bert_fast.accelerate(model_of(BertForSequenceClassification))
    labels = torch.tensor([0, 2, 1], device=DEVICE)
    alike(monkeypatch, lambda: step(model, autocast, labels=labels))
    labels = ids(3, 9)
    labels[:, 1::2] = -100
    model = bert_fast.accelerate(model_of(BertForMaskedLM), sparse_logits=True)
    alike(monkeypatch, lambda: step(model, autocast, labels=labels))
    assert nodes == [True] * 4


@pytest.mark.parametrize("several", [False, True])
def test_a_4d_mask_and_another_eps(
    several: bool, monkeypatch: pytest.MonkeyPatch, nodes: list[bool]
) -> None:
    model = bert_fast.accelerate(model_of())
    model(ids(3, 9))
    nodes.clear()
    for layer in model.encoder.layer:
        layer.attention.output.LayerNorm.eps = 0.5
        layer.output.LayerNorm.eps = 2.0 if several else 0.5
    mask = torch.rand(3, 4, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    alike(monkeypatch, lambda: step(model, True, attention_mask=mask.to(DEVICE)))
    assert nodes == ([] if several else [True] * 2)  # a node's layers have one


def test_what_is_frozen_gets_no_gradient(
    monkeypatch: pytest.MonkeyPatch, nodes: list[bool]
) -> None:
    model = bert_fast.accelerate(model_of(num_hidden_layers=4))
    model.embeddings.requires_grad_(False)  # so the first layer's input wants none
    model.encoder.layer[2].attention.output.dense.bias.requires_grad_(False)
    alike(monkeypatch, lambda: step(model, True))
    assert nodes == [False, True, False, True]


def test_no_texts(monkeypatch: pytest.MonkeyPatch, nodes: list[bool]) -> None:
    model = bert_fast.accelerate(model_of())
    none = {"input_ids": ids(0, 9), "attention_mask": MASK[:0].to(DEVICE)}
    alike(monkeypatch, lambda: step(model, True, **none))
    assert nodes == [True] * 2


def test_where_nothing_is_one_node(nodes: list[bool]) -> None:
    model = bert_fast.accelerate(model_of())
    model.encoder.layer[1].output.dense.bias = None  # not plain
    model(ids(3, 9))
    assert not nodes


def test_few_nodes_of_autograd() -> None:
    """A layer is one node and the casts of none: what this is for."""
    model = bert_fast.accelerate(model_of())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(ids(3, 9)).last_hidden_state  # kept: torch 2.11 forgets the nodes of others
    names, node = [], out.grad_fn
    while node is not None and "Embedding" not in node.name():
        names.append(node.name())
        node = next((n for n, _ in node.next_functions if n and "Accumulate" not in n.name()), None)
    assert names.count("_LayerBackward") == 2 and len(names) <= 5, names


def test_inside_a_node_autocast_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does in fp32, as sums of gradients, it would do in 16 bits."""
    found = []

    def note(*args: Any) -> Tensor:
        found.append(torch.is_autocast_enabled(DEVICE.type))
        return args[2] * 1.0

    monkeypatch.setattr(layer_node._Layer, "apply", note)
    model = bert_fast.accelerate(model_of())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        model(ids(3, 9))
        assert found == [False, False] and torch.is_autocast_enabled(DEVICE.type)


def test_errors() -> None:
    model = bert_fast.accelerate(model_of())
    out = model(ids(3, 9)).last_hidden_state
    weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(RuntimeError, match=r"bert_fast\.layer: there is no gradient of a gradient"):
        torch.autograd.grad(out.sum(), weight, create_graph=True)
    out = model(ids(3, 9)).last_hidden_state
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    layer = model.encoder.layer[1].intermediate.dense
    layer.weight = torch.nn.Parameter(torch.zeros(36, 64, device=DEVICE))
    with pytest.raises(ValueError, match=r"feed_forward: bias has shape \(37,\)"):
        model(ids(3, 9))
