"""What a call is given, each guard by itself: as transformers has it, or an error that says why."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, RobertaModel

import bert_fast
from bert_fast import padding
from bert_fast.one_call import prepared

from .models import ids, tiny
from .parity import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:bert_fast")
tensor = functools.partial(torch.tensor, device=DEVICE)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- inputs ---------------------------------------------------------------------------------


def test_ids_and_embeddings_at_once() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        bert_fast.accelerate(tiny())(ids(2, 6), inputs_embeds=torch.randn(2, 6, 64, device=DEVICE))


@pytest.mark.parametrize("shape", [(2, 6, 32), (6, 64)])
def test_embeddings_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="inputs_embeds is"):
        bert_fast.accelerate(tiny())(inputs_embeds=torch.randn(shape, device=DEVICE))


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 1)])
def test_ids_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} has shape"):
        bert_fast.accelerate(tiny())(
            ids(2, 6), **{name: torch.zeros(shape, dtype=torch.int64, device=DEVICE)}
        )


def test_types_that_are_no_integers() -> None:
    with pytest.raises(TypeError, match=r"token_type_ids is torch.float32, expected"):
        bert_fast.accelerate(tiny())(ids(2, 6), token_type_ids=torch.zeros(2, 6, device=DEVICE))


def test_types_for_all_texts() -> None:
    model, types = tiny(), tensor([0, 0, 0, 1, 1, 1])
    expected = model(ids(2, 6), token_type_ids=types.expand(2, 6))[0]
    same(bert_fast.accelerate(model)(ids(2, 6), token_type_ids=types)[0], expected)


def test_bounds_that_begin_later() -> None:
    with pytest.raises(ValueError, match="expected ascending numbers from 0 to 6"):
        bert_fast.accelerate(tiny())(ids(1, 6), cu_seq_lens_q=tensor([1, 6]).int())


def test_bounds_of_int64() -> None:
    model, bounds = bert_fast.accelerate(tiny()), tensor([0, 2, 6])
    expected = model(ids(1, 6), cu_seq_lens_q=bounds.int(), max_length_q=4)[0]
    same(model(ids(1, 6), cu_seq_lens_q=bounds, max_length_q=4)[0], expected)


@pytest.mark.parametrize("grad", [True, False])
def test_a_mask_is_not_written_to(grad: bool) -> None:
    mask = tensor([[True] * 6, [False, True, True, True, False, False]])
    before, model = mask.clone(), bert_fast.accelerate(tiny())
    with torch.set_grad_enabled(grad):
        model(ids(2, 6), attention_mask=mask)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("bounds", [None, [0, 2, 41], [0, 41]])
def test_a_text_of_robertas_kin_over_the_positions(bounds: list[int] | None) -> None:
    """Their padding takes no positions, but padding_idx + 1 of the table's are never a token's."""
    model = bert_fast.accelerate(tiny(RobertaModel, pad_token_id=1, max_position_embeddings=40))
    given: dict[str, Any] = {"input_ids": ids(1, 41) + 2}
    if bounds:
        given |= {"cu_seq_lens_q": tensor(bounds).int(), "max_length_q": bounds[-1] - bounds[-2]}
    with pytest.raises(ValueError, match=r"input length \d+ exceeds max_position_embeddings = 38"):
        model(**given)


def test_padding_of_robertas_kin_takes_no_positions() -> None:
    model = bert_fast.accelerate(tiny(RobertaModel, pad_token_id=1, max_position_embeddings=40))
    tokens = ids(1, 45).clamp(min=2)
    expected = model(tokens[:, :30])[0]
    tokens[:, 30:] = 1
    same(model(tokens, attention_mask=(tokens != 1).long())[0][:, :30], expected)


@pytest.mark.parametrize("grad", [True, False])
def test_an_additive_mask_of_another_dtype(grad: bool) -> None:
    model, mask = tiny(), torch.zeros(2, 1, 6, 6, device=DEVICE)
    mask[1, :, :, 3:] = -torch.inf
    expected = model(ids(2, 6), attention_mask=mask)[0]
    bert_fast.accelerate(model)
    with torch.set_grad_enabled(grad):
        same(model(ids(2, 6), attention_mask=mask.double())[0], expected)


def test_inference_first_then_training() -> None:
    """What is kept of positions serves both."""
    padding._progression.cache_clear()
    model = bert_fast.accelerate(tiny())
    with torch.inference_mode():
        model(ids(2, 6))
    model.train()
    model(ids(2, 6))[0].sum().backward()


def test_a_mask_that_wants_a_gradient() -> None:
    model = tiny()
    masks = [torch.zeros(2, 1, 6, 6, requires_grad=True, device=DEVICE) for _ in range(2)]
    (model(ids(2, 6), attention_mask=masks[0])[0] ** 2).sum().backward()
    (bert_fast.accelerate(model)(ids(2, 6), attention_mask=masks[1])[0] ** 2).sum().backward()
    same(masks[1].grad, masks[0].grad)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_causal_attention_asked_for(how: str) -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    bert_fast.accelerate(model)
    given: dict[str, Any] = {"is_causal": True} if how == "argument" else {}
    if how == "config":
        model.config.is_causal = plain.config.is_causal = True
    mask = torch.ones(2, 6, dtype=torch.int64, device=DEVICE)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            same(
                model(ids(2, 6), attention_mask=mask, **given)[0],
                plain(ids(2, 6), attention_mask=mask, **given)[0],
            )


@pytest.mark.parametrize("which", [[0, 1], -3, 0, []])
def test_hidden_states_by_index(which: Any) -> None:
    model = tiny()
    expected = model(ids(2, 6), output_hidden_states=which).hidden_states
    if which and expected and None not in expected:
        pytest.skip("this transformers knows no indices of hidden states")
    found = bert_fast.accelerate(model)(ids(2, 6), output_hidden_states=which).hidden_states
    assert (found is None) == (expected is None)
    for one, other in zip(found or (), expected or (), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other)


def test_all_hidden_states_under_a_head_that_reads_first_tokens() -> None:
    model = tiny(BertForSequenceClassification)
    expected = model(ids(2, 6), output_hidden_states=True)
    found = bert_fast.accelerate(model)(ids(2, 6), output_hidden_states=True)
    same(found.logits, expected.logits)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        same(one, other)


# -- calls after others, which one call to C++ may answer -----------------------------------


def made_ready(model: Any) -> Any:
    bert_fast.accelerate(model)
    with torch.no_grad():
        model(ids(2, 6))
    assert prepared(model)
    return model


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("since", [True, False])
def test_what_the_config_asks_for(name: str, since: bool) -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    if not since:
        setattr(model.config, name, True)
    bert_fast.accelerate(model)
    with torch.no_grad():
        for _ in range(2):
            model(ids(2, 6), **{name: False})
        model.config.output_hidden_states = model.config.output_hidden_states or False
        setattr(model.config, name, True)
        found = model(ids(2, 6))
    assert getattr(found, name.removeprefix("output_")) is not None


def test_autocast_after_a_call_without() -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    made_ready(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, fresh = model(ids(2, 6))[0], bert_fast.accelerate(plain)(ids(2, 6))[0]
    assert torch.equal(found, fresh)


def test_a_global_hook_after_a_call_without() -> None:
    model, called = made_ready(tiny()), []
    hook = nn.modules.module.register_module_forward_hook(lambda *args: called.append(1) or None)
    try:
        with torch.no_grad():
            model(ids(2, 6))
    finally:
        hook.remove()
    assert len(called) > 10


@pytest.mark.parametrize("kind", ["float", "bool", "one_row", "int8"])
def test_masks_after_a_call_without(kind: str) -> None:
    mask = tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    model = tiny()
    if kind == "one_row":
        with torch.no_grad(), pytest.raises(ValueError, match="attention_mask has shape"):
            made_ready(model)(ids(2, 6), attention_mask=mask[1:])
        return
    mask = mask.to({"float": torch.float32, "bool": torch.bool, "int8": torch.int8}[kind])
    with torch.no_grad():
        expected = model(ids(2, 6), attention_mask=mask)[0][mask.bool()]
        same(made_ready(model)(ids(2, 6), attention_mask=mask)[0][mask.bool()], expected)


def test_types_after_a_call_without() -> None:
    model = tiny()
    made_ready(model)
    with torch.no_grad():
        for wrong in (
            torch.zeros(3, 6, device=DEVICE).long(),
            torch.zeros(2, 5, device=DEVICE).long(),
        ):
            with pytest.raises(ValueError, match="token_type_ids has shape"):
                model(ids(2, 6), token_type_ids=wrong)
        with pytest.raises(TypeError, match=r"token_type_ids is torch.float32"):
            model(ids(2, 6), token_type_ids=torch.zeros(2, 6, device=DEVICE))


def test_eps_of_the_embeddings_alone() -> None:
    model = tiny()
    model.embeddings.LayerNorm.eps = 0.5
    with torch.no_grad():
        expected = model(ids(2, 6))[0]
        same(made_ready(model)(ids(2, 6))[0], expected)


def test_dropout_of_the_embeddings_alone() -> None:
    model = made_ready(tiny(hidden_dropout_prob=0.5))
    model.embeddings.dropout.train()
    with torch.no_grad():
        assert not torch.equal(model(ids(2, 6))[0], model(ids(2, 6))[0])


@pytest.mark.parametrize("part", ["activation", "dense"])
def test_a_poolers_parts(part: str) -> None:
    model = tiny()
    setattr(
        model.pooler,
        part,
        nn.ReLU() if part == "activation" else nn.Sequential(model.pooler.dense, nn.ReLU()),
    )
    with torch.no_grad():
        expected = model(ids(2, 6)).pooler_output
        bert_fast.accelerate(model)
        for _ in range(3):
            same(model(ids(2, 6)).pooler_output, expected)


# -- heads of spans -------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["start_positions", "end_positions"])
def test_one_label_of_a_span(label: str) -> None:
    model = tiny(BertForQuestionAnswering)
    mask = tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    given = {"input_ids": ids(2, 6), "attention_mask": mask, label: tensor([1, 2])}
    expected = model(**given)
    found = bert_fast.accelerate(model)(**given)
    same(found.start_logits, expected.start_logits)


def test_spans_under_another_mask() -> None:
    model = tiny(BertForQuestionAnswering)
    mask = torch.ones(2, 1, 6, 6, device=DEVICE).bool()
    mask[1, :, :, 3:] = False
    expected = model(ids(2, 6), attention_mask=mask)
    same(
        bert_fast.accelerate(model)(ids(2, 6), attention_mask=mask).end_logits, expected.end_logits
    )
