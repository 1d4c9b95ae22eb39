"""What users put inside a model, around it or into its place: it runs, or they are told."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, pipeline
from transformers.models.bert import modeling_bert as hf
from transformers.models.mpnet import modeling_mpnet

import bert_fast
from bert_fast.ops import weight_copies

from .models import ids, masks, small, tiny
from .parity import DEVICE
from .tiny import save

ESM = "transformers.models.esm.modeling_esm"
IDS, MASK = ids(3, 20), masks(3, 20)["right"]


def last(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK, **inputs)[0]


def real(states: Tensor) -> Tensor:
    assert MASK is not None
    return states[MASK.bool()]


# -- inside ------------------------------------------------------------------------------------


class Halved(hf.BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 0.5, weights


class Negated(hf.BertOutput):
    def forward(self, *args: Any) -> Tensor:
        return -super().forward(*args)


class Doubled(hf.BertEmbeddings):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Backwards(hf.BertEncoder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.layer = self.layer[::-1]
        return super().forward(*args, **kwargs)


PLACES = {
    "attention.self": lambda model: (model.encoder.layer[1].attention, "self", Halved),
    "output": lambda model: (model.encoder.layer[0], "output", Negated),
    "embeddings": lambda model: (model, "embeddings", Doubled),
    "encoder": lambda model: (model, "encoder", Backwards),
}


def put(model: Any, place: str) -> None:
    parent, name, kind = PLACES[place](model)
    theirs = kind(model.config).to(DEVICE).eval()
    theirs.load_state_dict(getattr(parent, name).state_dict())
    setattr(parent, name, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_code_of_their_own_inside_runs(place: str) -> None:
    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    last(ours)
    put(plain, place)
    put(ours, place)  # after a forward
    if place == "embeddings":  # which run as they are
        torch.testing.assert_close(real(last(ours)), real(last(plain)))
        bert_fast.accelerate(plain)
        return
    with pytest.warns(UserWarning, match="own forward runs: a .* is not transformers'"):
        found = last(copy.deepcopy(ours))
    torch.testing.assert_close(found, last(copy.deepcopy(plain)))
    with pytest.raises(ValueError, match="is not transformers'"):
        bert_fast.accelerate(plain)


@pytest.mark.parametrize("name", ["encoder", "embeddings"])
def test_another_child_in_its_place_is_seen(name: str) -> None:
    ours, other = bert_fast.accelerate(tiny()), tiny(seed=1)
    before = last(ours)
    plain = bert_fast.restore(copy.deepcopy(ours))
    setattr(ours, name, getattr(other, name))
    setattr(plain, name, getattr(other, name))
    torch.testing.assert_close(real(last(ours)), real(last(plain)))
    assert (last(ours) - before).abs().max() > 0.01


def test_another_layout_is_refused_and_falls_back() -> None:
    class Longer(nn.Module):
        def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
            return h, None

    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        model.encoder.layer[0].attention.self = Longer()
    with pytest.warns(UserWarning, match="another layout"):
        torch.testing.assert_close(last(ours), last(plain))
    with pytest.raises(ValueError, match="another layout"):
        bert_fast.accelerate(plain)


def test_attention_dropout_is_switched_as_transformers_switches_it() -> None:
    mpnet = small(modeling_mpnet.__name__, "MPNetModel")
    for model, by_dropout in ((tiny(), False), (mpnet, True)):
        ours = bert_fast.accelerate(model)
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        attention = [layer.attention for layer in ours.encoder.layer]
        inner = [getattr(a, "self", None) or a.attn for a in attention]
        tokens = ids(2, 9) % 50
        with torch.no_grad():
            still = ours(tokens)[0]
            for one in inner:
                one.dropout.p = 0.5
                one.dropout.training = True
            assert torch.equal(ours(tokens)[0], still) is not by_dropout
            for one in inner:
                one.training, one.dropout.training = True, False
            assert torch.equal(ours(tokens)[0], still) is by_dropout


# -- around ------------------------------------------------------------------------------------


def test_restore_under_a_forward_that_somebody_kept() -> None:
    plain = tiny(BertForSequenceClassification)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    AcceleratorState._reset_state(True)  # of a training test that ran before in this process
    ours = Accelerator(mixed_precision="bf16", cpu=DEVICE.type == "cpu").prepare(ours)
    assert "forward" in ours.__dict__
    bert_fast.restore(ours)
    torch.testing.assert_close(last(ours), last(plain), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_a_forward_replaced_before_is_told(cls: type) -> None:
    model = tiny(cls)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if cls is BertModel:
        with pytest.warns(UserWarning, match="its forward was replaced before"):
            bert_fast.accelerate(model)
    else:
        bert_fast.accelerate(model)
    assert "replaced" in str(bert_fast.report(model).skipped[cls.__name__])


def test_a_pipeline_is_taken(tmp_path: Path) -> None:
    classify = pipeline("text-classification", model=str(save(tmp_path)), device=DEVICE)
    expected = classify("the cat ran")
    assert bert_fast.accelerate(classify) is classify
    assert bert_fast.report(classify).swapped and "accelerated (" in str(bert_fast.report(classify))
    found = classify("the cat ran")
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    assert not bert_fast.report(bert_fast.restore(classify)).swapped
    with pytest.raises(TypeError, match="got a str, expected a module or a pipeline"):
        bert_fast.accelerate("bert-base")


@pytest.mark.parametrize("how", ["asked", "colbert", "pylate"])
def test_padding_is_kept_for_who_reads_it(how: str) -> None:
    class Queries(nn.Module):
        def __init__(self, model: nn.Module, attend: bool) -> None:
            super().__init__()
            self.model = model
            if how == "pylate":
                self.do_query_expansion, self.attend_to_expansion_tokens = True, attend
            else:
                self.query_expansion = {"strategy": "fixed", "attend": attend, "length": 20}

    plain = tiny()
    ours = copy.deepcopy(plain)
    if how == "asked":
        bert_fast.accelerate(ours, keep_padding=True)
    else:
        bert_fast.accelerate(nn.Sequential(Queries(ours, attend=False)))
    torch.testing.assert_close(last(ours), last(plain))
    attended = bert_fast.accelerate(Queries(copy.deepcopy(plain), attend=True))
    assert MASK is not None and not last(attended.model)[~MASK.bool()].any()


def test_a_torchscript_trace_is_transformers_own() -> None:
    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    full = torch.ones_like(IDS)
    with torch.no_grad(), pytest.warns(UserWarning, match="TorchScript or ONNX"):
        traced = torch.jit.trace(ours, (IDS, full), strict=False, check_trace=False)
        found = traced(IDS, MASK)["last_hidden_state"]
    torch.testing.assert_close(real(found), real(last(plain)))


def test_copies_of_a_head_are_dropped_with_the_encoders() -> None:
    plain = tiny(BertForMaskedLM, tie_word_embeddings=False)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    last(ours)
    for model in (plain, ours):  # through .data, in a row that the fingerprint does not look at
        model.cls.predictions.transform.dense.weight.data[0] += 5
    ours.train()
    ours.eval()
    torch.testing.assert_close(real(last(ours)), real(last(plain)))
    kept = {id(p) for p in ours.parameters()}
    assert any(id(w()) in kept for w in weight_copies._copies.data) or DEVICE.type != "cpu"
    bert_fast.accelerate(ours, dtype="int8")
    bert_fast.restore(ours)
    assert not any(id(w()) in kept for w in weight_copies._copies.data)


# -- heads that read more than transformers' ----------------------------------------------------


class Mixed(nn.Linear):
    """Reads all states: the mean [B, H] -> [B, C], or, of spans, each and the mean -> [B, S, C]."""

    def forward(self, states: Tensor, **ignored: Any) -> Tensor:
        y = super().forward(states)
        return y + y.mean(1, keepdim=True) if self.out_features == 2 else y.mean(1)


ROBERTA = "transformers.models.roberta.modeling_roberta"
READERS = {
    "a classifier's pooler": ("BertForSequenceClassification", "bert.pooler", 64, 64),
    "pre-training's pooler": ("BertForPreTraining", "bert.pooler", 64, 64),
    "roberta's classifier": ("RobertaForSequenceClassification", "classifier", 32, 3),
    "of spans": ("BertForQuestionAnswering", "qa_outputs", 64, 2),
}


@pytest.mark.filterwarnings("ignore:bert_fast")  # where transformers' own forward runs
@pytest.mark.parametrize("how", ["class", "hook"])
@pytest.mark.parametrize("reader", READERS)
def test_who_reads_all_states_gets_them(reader: str, how: str) -> None:
    name, at, width, outputs = READERS[reader]
    plain = small(ROBERTA, name) if "Roberta" in name else tiny(getattr(transformers, name))
    torch.manual_seed(0)
    theirs, ours = Mixed(width, outputs).to(DEVICE), copy.deepcopy(plain)
    bert_fast.accelerate(ours)
    assert bert_fast.report(ours).skipped == {}
    seen: list[Tensor] = []
    for model in (plain, ours):
        if how == "class":
            parent, _, child = at.rpartition(".")
            setattr(model.get_submodule(parent), child, theirs)
        else:
            model.get_submodule(at).register_forward_pre_hook(
                lambda module, args: seen.append(args[0].clone())
            )
    tokens = IDS % 90 + 2
    with torch.inference_mode():
        found, expected = (m(tokens).to_tuple() for m in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if how == "hook":
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert bert_fast.report(ours).skipped


# -- families that take the attention alone -----------------------------------------------------


def test_attention_alone_outlives_a_pickle(tmp_path: Path) -> None:
    model = bert_fast.accelerate(small(ESM, "EsmModel"))
    tokens = ids(2, 9) % 50 + 2
    expected = model(tokens)[0].detach()
    (tmp_path / "model").write_bytes(pickle.dumps((model.cpu(), tokens.cpu(), expected.cpu())))
    code = (
        "import pickle, sys, torch\n"
        "model, tokens, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)\n"
        "import bert_fast; bert_fast.restore(model)\n"
        "assert model.config._attn_implementation == 'sdpa'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)


def test_attention_alone_gives_its_probabilities() -> None:
    model = small(ESM, "EsmModel")
    tokens = ids(3, 12) % 50 + 2
    mask = masks(3, 12)["right"]
    model.set_attn_implementation("eager")
    expected = model(tokens, attention_mask=mask, output_attentions=True)
    bert_fast.accelerate(model)
    found = model(tokens, attention_mask=mask, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 2
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(found[0], expected[0])


def test_attention_alone_says_what_does_not_apply() -> None:
    model = small(ESM, "EsmModel")
    with pytest.warns(UserWarning, match="attention alone: backend, checkpoint"):
        bert_fast.accelerate(model, backend="reference")
    with pytest.raises(ValueError, match="EsmModel takes the attention alone"):
        bert_fast.explain(model, {"input_ids": IDS % 50})


# -- calls -------------------------------------------------------------------------------------


def test_inputs_that_torch_broadcasts_or_widens() -> None:
    plain = tiny()
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    length = IDS.shape[1]
    types, positions = torch.zeros_like(IDS), torch.arange(length, device=DEVICE).flip(0)
    for given in (
        {"input_ids": IDS, "token_type_ids": types, "position_ids": positions},
        {"inputs_embeds": plain.embeddings.word_embeddings(IDS).half()},
    ):
        torch.testing.assert_close(ours(**given)[0], plain(**given)[0])
    model = tiny(BertForMaskedLM)
    expected = model(IDS, labels=IDS.flatten()).loss
    torch.testing.assert_close(
        bert_fast.accelerate(model)(IDS, labels=IDS.flatten()).loss, expected
    )


def test_arguments_twice_or_too_many_are_type_errors() -> None:
    ours = bert_fast.accelerate(tiny())
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        ours(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match="too many positional arguments"):
        ours(*[None] * 30)
