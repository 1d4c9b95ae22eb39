"""What bert_fast keeps of a model lives as long as the model, in its process and in no copy."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel

import bert_fast
from bert_fast import masked_lm, probe

from .models import ids, tiny
from .parity import DEVICE


def last(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(ids(2, 7)).last_hidden_state


def by_a_hook(model: nn.Module) -> None:
    model.encoder.layer[-1].register_forward_hook(lambda *_: model and None)


def by_a_method(model: nn.Module) -> None:
    own = model.encoder.layer[0].forward
    model.encoder.layer[0].forward = lambda *a, **k: own(*a, **k) if model else None


def by_a_hook_on_a_weight(model: nn.Module) -> None:
    model.encoder.layer[0].attention.self.query.weight.register_hook(lambda g: model and g)


def by_a_hook_on_a_norm(model: nn.Module) -> None:
    model.encoder.layer[0].output.LayerNorm.weight.register_hook(lambda g: model and g)


def by_an_attribute(model: nn.Module) -> None:
    model.encoder.layer[0].attention.self.query.weight.owner = [model]


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
@pytest.mark.parametrize(
    "refer", [by_a_hook, by_a_method, by_a_hook_on_a_weight, by_a_hook_on_a_norm, by_an_attribute]
)
def test_a_model_that_its_inside_refers_to_is_freed(refer: Callable[[nn.Module], None]) -> None:
    model = bert_fast.accelerate(tiny())
    refer(model)
    last(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_without_cycles_is_freed_at_once() -> None:
    model = bert_fast.accelerate(tiny())
    last(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_looked_at_anew(make: Callable[[nn.Module], nn.Module]) -> None:
    model = bert_fast.accelerate(tiny())
    expected = last(model)
    other = make(model)
    assert all(value is None for name, value in vars(other).items() if "_seen" in name)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.zero_()
    torch.testing.assert_close(last(other), expected)
    assert (last(model) - expected).abs().max() > 1e-3


def test_a_replica_is_looked_at_anew() -> None:
    """DataParallel's share all attributes of the original but for their modules."""
    model = bert_fast.accelerate(tiny())
    last(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.zero_()
    replica = model._replicate_for_data_parallel()
    replica._modules["embeddings"] = other.embeddings
    torch.testing.assert_close(last(replica), last(other))


def test_restore_forgets_what_was_looked_at() -> None:
    model = bert_fast.accelerate(tiny())
    last(model)
    bert_fast.restore(model)
    assert not [name for name in vars(model) if name.startswith("_bert_fast")]


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
def test_a_method_that_is_replaced_on_a_layer_runs() -> None:
    model = bert_fast.accelerate(tiny())
    before = last(model)
    layer, called = model.encoder.layer[0], []
    own = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda *args: (called.append(1), 2 * own(*args))[1]
    assert (last(model) - before).abs().max() > 1e-3 and called
    del layer.feed_forward_chunk
    torch.testing.assert_close(last(model), before)


def test_a_failure_of_a_probe_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(BertModel):
        pass

    def fail(*_: object, **__: object) -> float:
        raise MemoryError("none left")

    told: list[str | None] = []
    model = Fresh(tiny().config)
    for difference in (fail, lambda *_: 0.0, fail):
        told.append(probe._probe(model, difference))
    assert told[0] and "none left" in told[0] and told[1:] == [None, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="CUDA does not survive a fork")
def test_a_child_of_a_probing_process_may_probe() -> None:
    class Fresh(BertModel):
        pass

    model = Fresh(tiny().config)
    with probe._asking:  # as another thread of the parent holds it
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(probe._probe(model, lambda *_: 0.0) is not None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_head_that_is_put_back_in_the_middle_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny().config).eval().to(DEVICE)
    labels = ids(2, 7)
    expected = model(ids(2, 7), labels=labels)
    bert_fast.accelerate(model)
    states = masked_lm._states

    def put_back_meanwhile(found: object) -> object:
        bert_fast.restore(model)
        return states(found)

    monkeypatch.setattr(masked_lm, "_states", put_back_meanwhile)
    found = model(ids(2, 7), labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
