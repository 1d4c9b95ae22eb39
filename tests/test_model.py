"""The packed model against Hugging Face's: masks, shapes, inputs, outputs, training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import bert_fast
from bert_fast.ops.registry import Kernel, Op

from .against_hf import compare
from .models import ids, masks, read_rows, tiny
from .parity import DEVICE, DTYPES

BATCH, LENGTH = 4, 11
SHAPES = {
    "awkward": {},
    "head_dim_8": {"num_attention_heads": 8, "intermediate_size": 128, "type_vocab_size": 3},
    "head_dim_40": {"hidden_size": 80, "num_attention_heads": 2, "hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu", "type_vocab_size": 1},
    "silu": {"hidden_act": "silu", "layer_norm_eps": 1e-5},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", masks(BATCH, LENGTH))
def test_masks(kind: str, dtype: torch.dtype) -> None:
    mask = masks(BATCH, LENGTH)[kind]
    if kind == "4d_additive":
        mask = mask.to(dtype)
    inputs = {"input_ids": ids(BATCH, LENGTH), "attention_mask": mask}
    compare(tiny(), dtype, (inputs, read_rows(mask, BATCH, LENGTH)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_finite_mask_over_all_keys_hides_none(dtype: torch.dtype) -> None:
    """The least number there is, added to all scores of a query, leaves them alike, as in HF.

    Its eager attention: torch's fused one is wrong in the gradient, where it takes 1 for each of
    these probabilities (exp(score - lse), and beside such scores lse has no room for log n).
    """
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=dtype, device=DEVICE)
    mask[:, :, 3] = torch.finfo(dtype).min
    inputs = {"input_ids": ids(BATCH, LENGTH), "attention_mask": mask}
    model = tiny()
    model.set_attn_implementation("eager")
    compare(model, dtype, (inputs, torch.ones(BATCH, LENGTH, dtype=torch.bool)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    mask = masks(BATCH, LENGTH)["right"]
    types = ids(BATCH, LENGTH, SHAPES[shape].get("type_vocab_size", 2))
    inputs = {"input_ids": ids(BATCH, LENGTH), "attention_mask": mask, "token_type_ids": types}
    compare(tiny(**SHAPES[shape]), dtype, (inputs, read_rows(mask, BATCH, LENGTH)))


@pytest.mark.parametrize("given", ["position_ids", "int32", "inputs_embeds", "no_pooler"])
def test_other_inputs(given: str) -> None:
    mask = masks(BATCH, LENGTH)["right"]
    inputs: dict[str, Any] = {"input_ids": ids(BATCH, LENGTH), "attention_mask": mask}
    model = tiny()
    if given == "position_ids":
        inputs["position_ids"] = ids(BATCH, LENGTH, 40)
    elif given == "int32":
        inputs["input_ids"] = inputs["input_ids"].int()
    elif given == "inputs_embeds":
        inputs["inputs_embeds"] = torch.randn(BATCH, LENGTH, 64, device=DEVICE)
        del inputs["input_ids"]
    compare(model, torch.float32, (inputs, read_rows(mask, BATCH, LENGTH)))


def test_padded_equals_unpadded_and_batch_equals_single() -> None:
    model, tokens = bert_fast.accelerate(tiny()), ids(3, 9)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    with torch.inference_mode():
        padded = model(tokens, attention_mask=mask).last_hidden_state
        for b, length in enumerate((4, 9, 9)):
            alone = model(tokens[b : b + 1, :length]).last_hidden_state
            torch.testing.assert_close(padded[b : b + 1, :length], alone, rtol=0, atol=5e-6)
    assert not padded[0, 4:].any()  # padded rows are zeros


def test_hidden_states_match_layer_by_layer() -> None:
    plain, tokens = tiny(), ids(BATCH, LENGTH)
    mask = masks(BATCH, LENGTH)["right"]
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    inputs = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True}
    expected, found = plain(**inputs), ours(**inputs)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(b[mask.bool()], a[mask.bool()], rtol=1e-5, atol=1e-5)
    for state in found.hidden_states:
        state.retain_grad()
    found.last_hidden_state[mask.bool()].sum().backward()
    assert all(state.grad is not None for state in found.hidden_states)


def test_return_dict_false_gives_the_same_tuple() -> None:
    plain, tokens = tiny(), ids(2, 5)
    expected = plain(tokens, return_dict=False)
    found = bert_fast.accelerate(plain)(tokens, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    torch.testing.assert_close(found[1], expected[1])


def test_attentions_come_from_hugging_face() -> None:
    model = tiny(attn_implementation="eager")
    expected = model(ids(2, 5), output_attentions=True).attentions
    ours = bert_fast.accelerate(model)
    with pytest.warns(UserWarning, match="output_attentions"):
        found = ours(ids(2, 5), output_attentions=True).attentions
    assert len(found) == 2 and torch.equal(found[0], expected[0])


def test_training_follows_hugging_face() -> None:
    """Ten steps of AdamW from the same start: the loss curve and the weights agree."""
    tokens, labels = ids(8, 10), ids(8, 1, 2).flatten()
    mask = masks(8, 10)["right"]
    curves, ends = [], []
    for ours in (False, True):
        model = tiny(BertForSequenceClassification).train()
        model = bert_fast.accelerate(model) if ours else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for _ in range(10):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    assert (ends[1] - ends[0]).norm() / ends[0].norm() < 1e-3


def test_dropout_trains_and_is_seeded() -> None:
    model = bert_fast.accelerate(
        tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ).train()
    tokens = ids(2, 6)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens).last_hidden_state

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))
    assert torch.equal(model.eval()(tokens)[0], model(tokens)[0])


def test_every_dropout_has_its_own_rate() -> None:
    """By what the ops are told; each place's rate differs from every other's."""
    plain = tiny(BertModel).train()
    plain.embeddings.dropout.p = 0.1
    for i, layer in enumerate(plain.encoder.layer):
        layer.attention.self.dropout.p = 0.2 + i / 100
        layer.attention.output.dropout.p = 0.3 + i / 100
        layer.output.dropout.p = 0.4 + i / 100
    told: list[tuple[str, float]] = []

    def watch(op: Op, args: tuple[Any, ...]) -> Kernel:
        if "p" in op.names:
            told.append((op.name, args[op.names.index("p")]))
        return op.choose(args)

    model = bert_fast.accelerate(plain, backend=watch)
    model(ids(2, 6))
    layers = (("attention", 0.2), ("add_layernorm", 0.3), ("add_layernorm", 0.4))
    assert told == [
        ("embed_layernorm", 0.1),
        *((name, p + i / 100) for i in range(2) for name, p in layers),
    ]
    told.clear()
    model.eval()(ids(2, 6))
    assert {p for _, p in told} == {0.0}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_redraws_the_same_masks(reentrant: bool) -> None:
    model = bert_fast.accelerate(
        tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ).train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(4)
        model(ids(2, 6)).pooler_output.sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(plain, gradients(), strict=True):
        # Not bit for bit: a reentrant checkpoint's first pass has no gradient, so oneDNN runs it.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_own_class_is_a_drop_in() -> None:
    assert issubclass(bert_fast.BertModel, BertModel)
    plain = tiny()
    ours = tiny(bert_fast.BertModel)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ours(ids(2, 5))[0], plain(ids(2, 5))[0], rtol=1e-5, atol=1e-5)
