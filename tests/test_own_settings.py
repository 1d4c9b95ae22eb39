"""Attention, settings and watchers of a user's own: their answer is given, or they are told."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from transformers import (
    AlbertConfig,
    AlbertModel,
    AttentionInterface,
    AttentionMaskInterface,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import bert_fast
from bert_fast import ops
from bert_fast.modeling import encode
from bert_fast.ops.attention import OP as ATTENTION

from .models import ids, small, tiny
from .parity import DEVICE
from .test_own_parts import IDS, MASK, alike, outputs

# -- attention ------------------------------------------------------------------------------------


def halved(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)


def first_three(**given: Any) -> Tensor:
    mask = sdpa_mask(**{**given, "allow_is_bidirectional_skip": False})
    return mask & (torch.arange(mask.shape[-1], device=mask.device) < 3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["attention", "mask"])
def test_attention_of_ones_own_runs(kind: str, first: bool) -> None:
    """What transformers' registries hold of somebody's is what `set_attn_implementation` means."""
    attention, mask = (halved, sdpa_mask) if kind == "attention" else (None, first_three)
    AttentionInterface.register("own", attention or sdpa_attention_forward)
    AttentionMaskInterface.register("own", mask)
    model = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for one in (model, ours):
        one.set_attn_implementation("own")
    with pytest.warns(UserWarning, match="its attention is 'own'"):
        alike(outputs(ours).last_hidden_state, outputs(model).last_hidden_state)
    if first:
        with pytest.raises(ValueError, match="its attention is 'own'"):
            bert_fast.accelerate(model)


def pruned(heads: int) -> Callable[[Any], None]:
    """One head of each layer cut away, as its owner does it: numbers of heads left or set."""

    def change(model: Any) -> None:
        for layer in (part for part in model.modules() if type(part).__name__ == "BertAttention"):
            own, dense = layer.self, layer.output.dense
            width = own.all_head_size - own.attention_head_size
            for name in ("query", "key", "value"):
                one = getattr(own, name)
                one.weight = nn.Parameter(one.weight[:width])
                one.bias = nn.Parameter(one.bias[:width])
            dense.weight = nn.Parameter(dense.weight[:, :width])
            own.num_attention_heads = heads

    return change


def other_width(model: Any) -> None:
    for part in model.modules():
        if hasattr(part, "attention_head_size"):
            part.attention_head_size *= 2


def other_number(model: Any) -> None:
    for part in model.modules():
        for name in {"num_attention_heads", "n_heads"} & vars(part).keys():
            setattr(part, name, 1)


def one_layer_pruned(model: Any) -> None:
    pruned(3)(model.encoder.layer[1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (BertModel, pruned(3)),
        (BertModel, pruned(4)),
        (BertModel, one_layer_pruned),
        (BertModel, other_width),
        (BertModel, other_number),
        (DistilBertModel, other_width),
        (DistilBertModel, other_number),
    ],
)
def test_heads_are_as_wide_as_transformers_has_them(
    cls: type, change: Callable[[Any], None], grad: bool, first: bool
) -> None:
    """It cuts queries by `attention_head_size`, and asks for no number of heads."""
    model = small(cls.__module__, cls.__name__) if cls is DistilBertModel else tiny()
    ours = copy.deepcopy(model)
    for one in (model, ours) if first else (model,):
        with torch.no_grad():
            change(one)
    bert_fast.accelerate(ours)
    if not first:
        outputs(ours), outputs(ours)
        with torch.no_grad():
            change(ours)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            found, expected = (one(IDS, MASK).last_hidden_state for one in (ours, model))
            alike(found, expected)
            outputs(ours)


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
def test_attention_of_one_layers_own_runs() -> None:
    AttentionInterface.register("own", halved)
    model = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    outputs(ours), outputs(ours)
    for one in (model, ours):
        config = copy.deepcopy(one.config)
        config._attn_implementation = "own"
        one.encoder.layer[1].attention.self.config = config
    alike(outputs(ours).last_hidden_state, outputs(model).last_hidden_state)


@pytest.mark.parametrize("first", [True, False])
def test_a_scale_of_ones_own(first: bool) -> None:
    model = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    if not first:
        outputs(ours)
    for one in (model, ours):
        one.encoder.layer[1].attention.self.scaling *= 3
    alike(outputs(ours).last_hidden_state, outputs(model).last_hidden_state)
    assert not torch.allclose(outputs(tiny()).last_hidden_state, outputs(ours).last_hidden_state)


def test_settings_that_do_not_compare() -> None:
    model = bert_fast.accelerate(tiny())
    expected = outputs(model).last_hidden_state
    for _ in range(2):
        model.config.class_weights = torch.tensor([1.0, 2.0])
        for _ in range(2):  # once to look at it again
            alike(outputs(model).last_hidden_state, expected)


def test_attentions_asked_for_by_the_config() -> None:
    model = small("transformers.models.esm.modeling_esm", "EsmModel")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    ours = bert_fast.accelerate(copy.deepcopy(model))
    found, expected = outputs(ours).attentions, outputs(model).attentions
    assert len(found) == len(expected) == 2
    alike(found[1], expected[1], None)


def test_a_bias_that_wants_a_gradient_is_refused() -> None:
    qkv = torch.randn(6, 3, 2, 16, device=DEVICE)
    bounds = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    bias = torch.zeros(1, 1, 6, 6, device=DEVICE, requires_grad=True)
    for wanted in (qkv, qkv.clone().requires_grad_()):
        with pytest.raises(ValueError, match="bias wants a gradient"):
            ops.attention(wanted, bounds, 6, 0.25, bias=bias)
    with torch.no_grad():
        ops.attention(qkv, bounds, 6, 0.25, bias=bias)
    model = MPNetModel(mpnet()).to(DEVICE).eval()
    with pytest.raises(ValueError, match="relative position bias wants a gradient"):
        encode(model, ids(1, 6)[0], bounds, 6)


def test_a_long_mask_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float mask [B, 1, 1, S], as older code makes it: a row for each query, but once."""
    seen, ours = set(), bert_fast.accelerate(tiny())
    check = ATTENTION.check

    def watched(*args: Any) -> None:
        seen.add((args[3].data_ptr(), args[3].is_contiguous()))
        check(*args)

    monkeypatch.setattr(ATTENTION, "check", watched)
    assert MASK is not None
    mask = (1.0 - MASK.float())[:, None, None] * -1e4
    ours(IDS, mask).last_hidden_state.sum().backward()
    assert len(seen) == 1 and next(iter(seen))[1]


# -- settings -------------------------------------------------------------------------------------


def mpnet() -> MPNetConfig:
    return MPNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=37, max_position_embeddings=24)  # fmt: skip


def test_a_tuple_of_mpnet_has_its_pooler_s_place() -> None:
    model = MPNetForSequenceClassification(mpnet()).to(DEVICE).eval()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    given = {"output_hidden_states": True, "return_dict": False}
    for one, other in ((ours, model), (ours.mpnet, model.mpnet)):
        found, expected = outputs(one, **given), outputs(other, **given)
        assert [type(part) for part in found] == [type(part) for part in expected]
        assert len(found[-1]) == len(expected[-1]) == 3


def test_albert_with_fewer_layers_since() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=4,
                          num_attention_heads=2, intermediate_size=37)  # fmt: skip
    model = AlbertModel(config).to(DEVICE).eval()
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for layers in (4, 2):
        for one in (model, ours):
            one.config.num_hidden_layers = layers
        found = outputs(ours, output_hidden_states=True)
        alike(found.last_hidden_state, outputs(model).last_hidden_state)
        assert len(found.hidden_states) == layers + 1


def test_no_layers_at_all() -> None:
    model = tiny(BertForSequenceClassification)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for one in (model, ours):
        one.bert.encoder.layer = one.bert.encoder.layer[:0]
    alike(outputs(ours).logits, outputs(model).logits, None)


# -- those who watch ------------------------------------------------------------------------------


def test_global_backward_hooks_are_called() -> None:
    seen: list[str] = []

    def note(module: nn.Module, *grads: Any) -> None:
        seen.append(type(module).__name__)

    ours = bert_fast.accelerate(tiny())
    handle = nn.modules.module.register_module_full_backward_hook(note)
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            ours(IDS, MASK).last_hidden_state.sum().backward()
    finally:
        handle.remove()
    assert "BertSelfOutput" in seen


@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_of_a_head_knows_no_ops_of_ours(grad: bool) -> None:
    model = tiny(BertForMaskedLM)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    with torch.set_grad_enabled(grad), pytest.warns(UserWarning, match="a trace is made"):
        traced = torch.jit.trace(ours, (IDS, MASK), strict=False, check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::gelu" in kinds
    assert not [kind for kind in kinds if not kind.startswith(("aten::", "prim::"))]
    assert "prim::PythonOp" not in kinds
    file = io.BytesIO()
    torch.jit.save(traced, file)
    alike(traced(IDS, MASK)["logits"], outputs(model).logits)


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
def test_a_trace_of_what_has_never_run() -> None:
    """It is made twice, and the two have to be the same."""
    model = bert_fast.accelerate(tiny(return_dict=False))
    traced = torch.jit.trace(model, (IDS, MASK))
    alike(traced(IDS, MASK)[0], outputs(model)[0])


def test_types_for_a_model_without_them() -> None:
    """Which the words' own module, changed, does not take either."""
    model = small("transformers.models.distilbert.modeling_distilbert", "DistilBertModel")
    parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", nn.Identity())
    expected = outputs(model, token_type_ids=torch.ones_like(IDS)).last_hidden_state
    ours = bert_fast.accelerate(model)
    alike(outputs(ours, token_type_ids=torch.ones_like(IDS)).last_hidden_state, expected)


def test_derivatives_of_a_head_by_torch_func() -> None:
    model = tiny(BertForMaskedLM)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    states = torch.randn(1, 5, 64, device=DEVICE)

    def loss(of: nn.Module) -> Any:
        return torch.func.grad(lambda x: of(inputs_embeds=x).logits.square().sum())(states)

    with pytest.warns(UserWarning, match=r"torch\.func"):
        torch.testing.assert_close(loss(ours), loss(model), rtol=1e-3, atol=1e-3)


def test_forward_derivatives() -> None:
    model = tiny().requires_grad_(False)
    ours = bert_fast.accelerate(copy.deepcopy(model))
    for one in (model, ours):
        one.set_attn_implementation("eager")
    x, v = torch.randn(2, 1, 5, 64, device=DEVICE)

    def tangent(of: nn.Module) -> Any:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, v)
            out = of(inputs_embeds=dual).last_hidden_state
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    with pytest.warns(UserWarning, match="forward-mode"):
        found = tangent(ours)
    torch.testing.assert_close(found, tangent(model), rtol=1e-4, atol=1e-4)


def test_sizes_without_values() -> None:
    """As tools ask for that reckon with memory."""
    config = tiny().config
    with FakeTensorMode(), DEVICE:
        model = bert_fast.accelerate(BertModel(config).eval())
        tokens = torch.ones(3, 12, dtype=torch.int64)
        assert model(tokens, attention_mask=tokens).last_hidden_state.shape == (3, 12, 64)
