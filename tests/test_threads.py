"""What may happen in the middle of a call: another thread has the model too, or Ctrl-C comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

import bert_fast
from bert_fast import structure
from bert_fast.encode import _evaluated, evaluating
from bert_fast.ops.locks import OneAtATime
from bert_fast.ops.weight_copies import copy_of

from .models import ids, tiny

MASK = torch.ones(2, 7, dtype=torch.int64)
MASK[1, 4:] = 0


def once_within(monkeypatch: pytest.MonkeyPatch, where: str, act: Callable[[], Any]) -> list[int]:
    """The first call of bert_fast's function `where` is interrupted by `act`; what is returned
    holds something once it was."""
    module, name = where.rsplit(".", 1)
    home = import_module(f"bert_fast.{module}")
    own, acted = getattr(home, name), list[int]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        if not acted:
            acted.append(1)
            act()
        return found

    monkeypatch.setattr(home, name, interrupted)
    return acted


@pytest.mark.filterwarnings("ignore:.*its encoder is not accelerated:UserWarning")
@pytest.mark.parametrize(
    ("cls", "where"),
    [
        (BertModel, "packed.options_of"),
        (BertModel, "packed.reasons_against_call"),
        (BertModel, "packed.structure_of"),
        (BertModel, "packed.answer"),
        (BertForSequenceClassification, "reading.takes_word"),
        (BertForSequenceClassification, "packed.read_batch"),
        (BertForQuestionAnswering, "reading.encoder_of"),
        (BertForQuestionAnswering, "reading.hooked"),
        (BertForMaskedLM, "masked_lm.options_of"),
        (BertForMaskedLM, "masked_lm.reasons_against_loss"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_put_back_in_the_middle_of_a_call(
    cls: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = bert_fast.accelerate(tiny(cls)), ids(2, 7)
    mask = MASK.to(words.device)
    real = mask.bool() if cls in (BertModel, BertForMaskedLM) else torch.ones(2) > 0
    with torch.inference_mode():
        expected = model(words, mask)
        if where != "packed.answer":  # without the look that the call before has left
            bert_fast.accelerate(model)
        acted = once_within(monkeypatch, where, lambda: bert_fast.restore(model))
        found = model(words, mask)
    assert acted and type(model) is cls
    found, expected = found[0], expected[0]
    if cls is BertForQuestionAnswering:
        found, expected, real = found[mask > 0], expected[mask > 0], slice(None)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_weights_assigned_in_the_middle_of_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not taken for those that were looked at."""
    model, other, words = bert_fast.accelerate(tiny()), tiny(seed=1), ids(2, 7)
    structure.forget_structure(model)
    weights = other.state_dict()
    acted = once_within(
        monkeypatch, "structure._look", lambda: model.load_state_dict(weights, assign=True)
    )
    with torch.inference_mode():
        model(words)
        assert acted
        torch.testing.assert_close(model(words)[0], other(words)[0], rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_cast_while_it_is_copied() -> None:
    """The copy is for that call alone: `to` has dropped the copies before this one is kept."""
    weight, made = torch.randn(4, 4), list[torch.dtype]()

    def make() -> int:
        made.append(weight.dtype)
        weight.data = weight.data.bfloat16()
        return len(made)

    assert [copy_of((weight,), "a test's", make) for _ in range(3)] == [1, 2, 2]
    assert made == [torch.float32, torch.bfloat16]


def test_threads_evaluate_a_model_in_training() -> None:
    """It is in evaluation to the end of the last, and then in the modes before the first."""
    model = bert_fast.accelerate(tiny()).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    began, ended = threading.Event(), threading.Event()

    def first() -> None:
        with evaluating(model):
            pool.submit(second)
            assert began.wait(30)
        ended.set()

    def second() -> None:
        with evaluating(model):
            began.set()
            assert ended.wait(30)
            within.append([module.training for module in model.modules()])

    within: list[list[bool]] = []
    with ThreadPoolExecutor(2) as pool:
        pool.submit(first).result()
    assert within and not any(within[0])
    assert any(modes) and [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("where", ["lock", "eval", "train"])
def test_an_interrupt_leaves_the_modes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the lock, while modes are set, while they are put back: then the next one does."""
    model, left = tiny().train(), list[int]()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    owner: Any = OneAtATime if where == "lock" else BertModel
    name = "__exit__" if where == "lock" else where
    own = getattr(owner, name)

    def interrupted(self: Any, *args: Any) -> Any:
        found = own(self, *args)
        if not left:
            left.append(1)
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt), evaluating(model):
            assert not model.training
    if where == "train":
        with evaluating(model):
            pass
    assert left and [module.training for module in model.modules()] == modes
    assert model not in _evaluated
