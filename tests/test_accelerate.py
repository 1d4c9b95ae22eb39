"""accelerate, restore, report, explain: what a user does around a forward pass."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertModel
from transformers.models.bert import modeling_bert as hf

import bert_fast
from bert_fast.ops import weight_copies
from bert_fast.ops.weight_copies import _copies

from .models import accelerated, ids, masks, tiny
from .parity import DEVICE
from .test_heads import LABELS, inputs_of


def last(model: nn.Module, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids(3, 8) if tokens is None else tokens, **inputs)[0]


@pytest.mark.parametrize("name", LABELS)
def test_every_head(name: str) -> None:
    model, inputs = tiny(getattr(transformers, name)), inputs_of(name)
    expected = model(**inputs)
    assert bert_fast.accelerate(model) is model
    found = model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()


def test_restore_leaves_the_model_as_it_was() -> None:
    model = tiny(BertForMaskedLM)
    classes = [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = last(model)
    bert_fast.accelerate(bert_fast.accelerate(model))  # idempotent
    assert type(model.bert).__name__ == "BertModel" and type(model.bert) is not BertModel
    last(model)
    assert bert_fast.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(state) == list(model.state_dict())
    assert torch.equal(last(model), before)
    assert not [k for k in model.bert.__dict__ if "bert_fast" in k]


def test_copies_pickles_and_saves(tmp_path: Any) -> None:
    model = bert_fast.accelerate(tiny())
    expected = last(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(last(model), expected) and not torch.equal(last(other), expected)
    assert torch.equal(last(pickle.loads(pickle.dumps(model))), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(last(BertModel.from_pretrained(tmp_path).to(DEVICE)), expected)
    loaded = bert_fast.BertModel.from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(last(loaded), expected, rtol=0, atol=0)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def one_element_in_place(model: nn.Module) -> None:
    """One that is off the diagonal, of which nothing but the tensor's version tells."""
    with torch.no_grad():
        for layer in model.encoder.layer:
            for p in layer.parameters():
                if p.dim() == 2:
                    p[0, -1] += 1.0


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.1)


def through_data_of_a_head(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.value.weight.data[16:32] = 0.0  # the second of four heads


def through_data_of_a_heads_columns(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.attention.output.dense.weight.data[:, 16:32] = 0.0


def through_data_of_biases(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.5)


def transposed(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        weight = layer.attention.output.dense.weight
        weight.data = weight.data.t()  # of a square matrix: the same memory, and its diagonal


def new_storage(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.1


def state_dict(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def new_parameters(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() * 1.1)


def swapped(model: nn.Module) -> None:
    """torch's other way to load: it refuses a parameter that anything else refers to."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        state_dict(model)
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = [
    in_place, one_element_in_place, through_data, new_storage, state_dict, new_parameters,
    swapped, transposed,
]  # fmt: skip
if DEVICE.type == "cpu":  # nothing tells of a part's change on a GPU
    CHANGES += [through_data_of_a_head, through_data_of_a_heads_columns, through_data_of_biases]
else:
    CHANGES.remove(through_data)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compiled", [True, False])
def test_changed_weights_are_seen(
    change: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed copies of the weights must never outlive what they were made of."""
    if not compiled:
        monkeypatch.setattr(weight_copies, "extension_missing", lambda: ["not built"])
    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    last(ours)
    change(plain)
    change(ours)
    torch.testing.assert_close(last(ours), last(plain), rtol=1e-5, atol=1e-5)


def test_moves_between_dtypes() -> None:
    plain, ours = tiny(), bert_fast.accelerate(tiny())
    last(ours)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        found = last(ours.to(dtype))
        assert found.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(found, last(plain.to(dtype).to(torch.bfloat16).double()),
                                       rtol=1e-9, atol=1e-9)  # fmt: skip
            plain = tiny()


def test_hooks_and_foreign_parts_fall_back_and_say_so() -> None:
    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    seen: list[Any] = []
    handle = ours.encoder.layer[1].register_forward_hook(lambda *a: seen.append(a))
    assert "hook" in str(bert_fast.report(ours))
    with pytest.warns(UserWarning, match="own forward runs: .*hook"):
        assert torch.equal(last(ours), last(plain)) and len(seen) == 1
    handle.remove()
    assert accelerated(ours)
    last(ours)
    assert len(seen) == 1

    ours.encoder.layer[0].attention.self.query = nn.Bilinear(64, 64, 64)
    assert "query is Bilinear" in str(bert_fast.report(ours))
    with pytest.warns(UserWarning, match="own forward runs: query is"):
        explained = bert_fast.explain(_fixed_query(ours), {"input_ids": ids(2, 4)})
    assert any("query is" in why for why in explained.fallback)


def _fixed_query(model: nn.Module) -> nn.Module:
    """The model with a query that is no linear projection, yet runs."""

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model.encoder.layer[0].attention.self.query = Wrapped()
    return model


def test_other_linears_run_unfused() -> None:
    """LoRA, quantised and subclassed projections: their own forward, on packed tokens."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    plain, mask = tiny(), masks(4, 11)["right"]
    first, second = plain.encoder.layer
    first.attention.self.query = Twice(64, 64).to(DEVICE)
    first.intermediate.dense = Twice(64, 37).to(DEVICE)
    second.attention.output.dense = Twice(64, 64).to(DEVICE)
    second.output.dense = Twice(37, 64).to(DEVICE)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = last(ours, ids(4, 11), attention_mask=mask)[mask.bool()]
    expected = last(plain, ids(4, 11), attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "query unfused" in str(bert_fast.report(ours))


def test_monte_carlo_dropout_in_eval_mode() -> None:
    ours = bert_fast.accelerate(tiny(hidden_dropout_prob=0.5))
    assert torch.equal(last(ours), last(ours))
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(last(ours), last(ours))


def test_what_cannot_be_accelerated_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear contains no transformers model"):
        bert_fast.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="decoder"):
        bert_fast.accelerate(tiny(is_decoder=True))

    class Mine(BertModel):
        pass

    model = Mine(tiny().config)
    with pytest.raises(ValueError, match="subclass with code of its own"):
        bert_fast.accelerate(model)
    assert type(model) is Mine


def test_backend_is_checked_and_forced() -> None:
    with pytest.raises(ValueError, match="no backend 'warp9'"):
        bert_fast.accelerate(tiny(), backend="warp9")
    with pytest.raises(ValueError, match="no op 'softmax'"):
        bert_fast.accelerate(tiny(), backend={"softmax": "auto"})
    expected = last(tiny())
    reference = bert_fast.accelerate(tiny(), backend="reference")
    torch.testing.assert_close(last(reference), expected, rtol=1e-5, atol=1e-5)
    explained = bert_fast.explain(reference, {"input_ids": ids(2, 4)})
    assert {c.kernel for c in explained.choices} == {"reference"}
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"backend 'cuda' cannot run"):
            last(bert_fast.accelerate(tiny(), backend={"attention": "cuda"}))


def test_explain_lists_every_op_and_the_padding() -> None:
    model = bert_fast.accelerate(tiny(BertForMaskedLM))
    explained = bert_fast.explain(
        model, {"input_ids": ids(4, 11), "attention_mask": masks(4, 11)["right"]}
    )
    assert explained.tokens == 3 + 5 + 7 + 9 and explained.padded_tokens == 44
    assert {c.op for c in explained.choices} == {
        *("embed_layernorm", "qkv_linear", "attention", "linear", "add_layernorm"),
        *("feed_forward", "pad"),
    }
    assert all(c.reasons for c in explained.choices)
    assert "padding spared" in str(explained) and "not cuda" in str(explained)
    plain = bert_fast.explain(tiny(), {"input_ids": ids(2, 3)})
    assert plain.fallback == ["the model is not accelerated"]


def test_names_that_other_code_matches_on() -> None:
    model = bert_fast.accelerate(tiny())
    assert isinstance(model, hf.BertModel) and type(model).__name__ == "BertModel"
    assert set(BertModel._no_split_modules) <= set(model._no_split_modules)


def test_copies_of_weights_outlive_a_move_to_where_the_model_is() -> None:
    model = bert_fast.accelerate(tiny())
    weight, inputs = model.encoder.layer[0].attention.self.query.weight, {"input_ids": ids(2, 9)}

    def copies() -> dict[str, Any]:
        with torch.inference_mode():
            model(**inputs)
        return dict(_copies[weight])

    kept = copies()
    assert kept
    model.to(weight.device).float().eval()
    assert all(copies()[kind] is copy for kind, copy in kept.items())
    model.half()
    assert weight not in _copies
    model.float()
    copies()
    model.train()
    assert weight not in _copies


FORKED = """
import os, torch, bert_fast
from transformers import BertConfig, BertForSequenceClassification
torch.set_num_threads(2)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
config = BertConfig(vocab_size=99, **sizes)
model = bert_fast.accelerate(BertForSequenceClassification(config).eval())
child = os.fork()
if child == 0:
    with torch.inference_mode():
        model(torch.arange(60).view(3, 20))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_server_may_fork_after_accelerate() -> None:
    """Threads of OpenMP do not follow: none may have been used."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
