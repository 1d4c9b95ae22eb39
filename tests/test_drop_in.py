"""Habits of code written for transformers, which no single feature covers."""

from __future__ import annotations

import functools
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, DynamicCache

import bert_fast
from bert_fast import probe
from bert_fast.packed import packed_class

from .models import ids, tiny
from .parity import DEVICE


@pytest.fixture(params=["accelerated", "by_name"])
def make(request: Any) -> Any:
    """Makes a model of a class, accelerated in place or as bert_fast's class of the same name."""

    def build(cls: type, **changes: Any) -> Any:
        if request.param == "by_name":
            return tiny(getattr(bert_fast, cls.__name__), **changes)
        return bert_fast.accelerate(tiny(cls, **changes))

    return build


def test_gradients_of_hidden_states_and_attentions_can_be_kept(make: Any) -> None:
    """All of them require a gradient and get one, as attribution methods need."""
    model = make(BertModel, attn_implementation="eager")
    with pytest.warns(UserWarning, match="own forward runs: output_attentions"):
        out = model(ids(2, 7), output_hidden_states=True, output_attentions=True)
    for kept in (out.hidden_states[0], out.attentions[0]):
        kept.retain_grad()
    out.last_hidden_state.flatten()[0].backward()
    for kept in (out.hidden_states[0], out.attentions[0]):
        assert kept.grad.abs().max() > 0

    out = model(ids(2, 7), output_hidden_states=True)  # packed
    out.hidden_states[0].retain_grad()
    out.last_hidden_state.flatten()[0].backward()
    assert out.hidden_states[0].grad.abs().max() > 0


def test_embeddings_given_are_embeddings_looked_up(make: Any) -> None:
    model, tokens = make(BertForMaskedLM), ids(3, 9)
    with torch.no_grad():
        expected = model(tokens).logits
        found = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_attention_can_be_chosen_again(make: Any) -> None:
    """The choice is kept in the config, and the answer stays the same."""
    model, tokens = make(BertForSequenceClassification), ids(2, 7)
    found = []
    for name in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            found.append(model(tokens).logits)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_accelerated_inside_the_constructor(cls: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Also under `from_pretrained`, which builds on the meta device and loads afterwards."""
    tiny(cls).save_pretrained(tmp_path)
    tokens = ids(2, 7)
    expected = cls.from_pretrained(tmp_path).eval()(tokens)[0]
    built = cls.__init__

    @functools.wraps(built)
    def accelerated(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        bert_fast.accelerate(self)

    monkeypatch.setattr(probe, "_told", {})  # the class is looked at again, as it is built below
    monkeypatch.setattr(cls, "__init__", accelerated)
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert bert_fast.report(model).swapped
    assert torch.allclose(model.eval()(tokens)[0], expected, atol=1e-5)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("masked", [False, True])
def test_features_may_be_written_to_in_place(make: Any, cls: type, masked: bool) -> None:
    """Of a frozen encoder, run without gradients, by what is trained on top of it."""
    model, mask = make(cls), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 1 - masked
    for states in (False, True, False):
        with torch.no_grad():
            out = model(ids(2, 7), mask.to(ids(2, 7).device), output_hidden_states=states)
        outputs = [t for v in out.values() for t in (v if isinstance(v, tuple) else (v,))]
        for found in {id(t): t for t in outputs}.values():  # the last states are two outputs
            scale = torch.ones(found.shape[-1], device=found.device, requires_grad=True)
            found.mul_(scale).sum().backward()
            assert scale.grad is not None


@pytest.mark.filterwarnings("ignore:.*Hugging Face's own forward runs:UserWarning")
def test_a_cache_is_attended_to(make: Any) -> None:
    """By whichever name the version installed gives it."""
    name = "cache" if "cache" in signature(BertModel.forward).parameters else "past_key_values"
    found = []
    for model in (tiny(), make(BertModel)):
        cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
        for layer in range(model.config.num_hidden_layers):
            keys = torch.randn(2, 4, 3, 16, generator=generator).to(DEVICE)
            cache.update(keys, keys, layer)
        with torch.no_grad():
            found.append(model(ids(2, 5), **{name: cache})[0])
    assert torch.allclose(*found, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(ids(2, 5))[0], found[0], atol=1e-2)


def test_an_argument_of_a_later_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any, shift: Any = None) -> Any:
        return input_ids if shift is None else input_ids + shift

    monkeypatch.setattr(BertModel, "forward", forward)
    model = tiny()
    model.__class__ = packed_class.__wrapped__(BertModel)
    with pytest.warns(UserWarning, match="own forward runs: shift is given"):
        assert torch.equal(model(ids(1, 4), shift=2), ids(1, 4) + 2)
