"""Every family of the table against Hugging Face's own model, and the families beside it."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    EsmConfig,
    GPT2Config,
    MegatronBertConfig,
    ModernBertConfig,
    RobertaPreLayerNormConfig,
)

import bert_fast
from bert_fast.families import FAMILIES, Family
from bert_fast.ops.backends import best_isa

from .against_hf import compare
from .models import accelerated, ids, masks, read_rows
from .parity import DEVICE, DTYPES

BATCH, LENGTH = 4, 11
ROWS = {family.model: family for family in FAMILIES}


def small(family: Family, **changes: Any) -> nn.Module:
    cls = getattr(importlib.import_module(family.module), family.model)
    config = cls.config_class(
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 40,
            "pad_token_id": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "hidden_dim": 37,
            "embedding_size": 48,
            "num_hidden_groups": 1,
            "pronunciation_vocab_size": 128,
            "shape_vocab_size": 128,
            **changes,
        }
    )
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.to(DEVICE)


def inputs_of(family: Family, mask: Tensor | None) -> dict[str, Any]:
    tokens = ids(BATCH, LENGTH, 126) + 2
    tokens[1, 2] = 1  # the padding id as a token: RoBERTa's kin do not count it
    found: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if "bbox" in family.extra:
        found["bbox"] = ids(BATCH, LENGTH, 500).unsqueeze(-1).repeat(1, 1, 4).cumsum(-1) // 4
    for name in ("input_shape_ids", "input_pronunciation_ids"):
        if name in family.extra:
            found[name] = ids(BATCH, LENGTH, 100)
    return found


@pytest.mark.skipif(best_isa() == 0, reason="8-bit products of models need AVX2")
@pytest.mark.parametrize("name", ROWS)
def test_int8(name: str) -> None:
    """Every family's layers run in 8 bits, near what they are."""
    family, model = ROWS[name], small(ROWS[name]).cpu()
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="int8")
    given = {k: v.cpu() for k, v in inputs_of(family, masks(BATCH, LENGTH)["right"]).items()}
    with torch.inference_mode():
        assert any("int8" in choice.on for choice in bert_fast.explain(ours, given).choices)
        found, expected = (m(**given).last_hidden_state for m in (ours, model))
    real = given["attention_mask"].bool()
    assert 1e-4 < (found - expected)[real].norm() / expected[real].norm() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    on_cpu = ("none", "right", "left", "holes", "first_hidden")
    cases = []
    for kind in on_cpu if DEVICE.type == "cpu" else ("right", "first_hidden"):
        mask = masks(BATCH, LENGTH)[kind]
        rows = read_rows(mask, BATCH, LENGTH)
        if kind == "first_hidden":
            rows[1, 0] = "LM" not in name  # their own masks are finite: a masked query differs
        cases.append((inputs_of(ROWS[name], mask), rows))
    model = small(ROWS[name])
    if ROWS[name].bias is not None:
        model.encoder.relative_attention_bias.requires_grad_(False)
    compare(model, dtype, *cases)


@pytest.mark.parametrize("name", ROWS)
def test_packed_is_what_runs_and_restore_undoes_it(name: str) -> None:
    model, mask = small(ROWS[name]), masks(BATCH, LENGTH)["right"]
    inputs = inputs_of(ROWS[name], mask)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model(**inputs)
        found = bert_fast.accelerate(model)(**inputs)
        assert type(found) is type(before) and found.keys() == before.keys()
        assert not found.last_hidden_state[~mask.bool()].any()  # zeros: it did run packed
        again = pickle.loads(pickle.dumps(model))  # weights of inference mode: other kernels
        assert accelerated(again)
        torch.testing.assert_close(again(**inputs)[0], found[0], rtol=1e-4, atol=1e-5)
        asked = model(**inputs, output_hidden_states=True).hidden_states
        states = bert_fast.restore(model)(**inputs, output_hidden_states=True).hidden_states
        for a, b in zip(asked, states, strict=True):
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**inputs)[0], before[0])
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys


@pytest.mark.parametrize("given", ["inputs_embeds", "position_ids", "return_dict"])
@pytest.mark.parametrize("name", ROWS)
def test_other_arguments(name: str, given: str) -> None:
    plain, inputs = small(ROWS[name]), inputs_of(ROWS[name], None)
    if given == "inputs_embeds":
        width = plain.embeddings.word_embeddings.weight.shape[1]
        tokens = inputs.pop("input_ids")
        inputs[given] = torch.randn(*tokens.shape, width, device=DEVICE)
        if name == "RoCBertModel":
            pytest.skip("roc_bert's own embedding of shapes needs the ids")
    elif given == "position_ids":
        inputs[given] = ids(1, LENGTH, 40)
    else:
        inputs[given] = False
    with torch.inference_mode():
        expected, found = plain(**inputs), bert_fast.accelerate(copy.deepcopy(plain))(**inputs)
    assert isinstance(found, tuple) or given != "return_dict"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "MPNetModel"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "first_hidden"])
def test_padded_rows_are_zeros(name: str, kind: str) -> None:
    mask = masks(BATCH, LENGTH)[kind]
    model = bert_fast.accelerate(small(ROWS[name]))
    with torch.inference_mode():
        last = model(**inputs_of(ROWS[name], mask)).last_hidden_state
    assert not last[~read_rows(mask, BATCH, LENGTH)].any()


def test_a_trained_relative_bias_runs_in_hugging_face() -> None:
    model = bert_fast.accelerate(small(ROWS["MPNetModel"]))
    with pytest.warns(UserWarning, match="relative position bias is being trained"):
        model(ids(2, 5)).last_hidden_state.sum().backward()
    assert model.encoder.relative_attention_bias.weight.grad is not None


# -- families that are not packed ----------------------------------------------------------------

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "pad_token_id": 1,
}
OTHERS = {
    "esm": EsmConfig(**SIZES, mask_token_id=3, position_embedding_type="rotary"),
    "roberta_prelayernorm": RobertaPreLayerNormConfig(**SIZES),
    "modernbert": ModernBertConfig(**SIZES, local_attention=8, reference_compile=False),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
def test_attention_only(name: str, kind: str) -> None:
    torch.manual_seed(0)
    plain = AutoModel.from_config(OTHERS[name]).eval().to(DEVICE)
    mask = masks(BATCH, LENGTH)[kind]
    inputs = {"input_ids": ids(BATCH, LENGTH, 120) + 4, "attention_mask": mask}
    rows = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    with torch.inference_mode():
        before = plain(**inputs)[0]
        if not plain._can_set_attn_implementation():  # ModernBERT in the first 5.x
            with pytest.raises(ValueError, match="computes its attention by itself"):
                bert_fast.accelerate(plain)
            return
        assert "attention only" in str(bert_fast.report(bert_fast.accelerate(plain)))
        found = plain(**inputs)[0]
        torch.testing.assert_close(found[rows], before[rows], rtol=1e-4, atol=1e-5)
        with pytest.warns(UserWarning, match=f"{type(plain).__name__} takes the attention alone"):
            bert_fast.accelerate(plain, dtype="int8")
        assert torch.equal(bert_fast.restore(plain)(**inputs)[0], before)


@pytest.mark.parametrize("name", OTHERS)
def test_attention_alone_is_not_taken_under_who_reads_padding(name: str) -> None:
    plain = AutoModel.from_config(OTHERS[name]).eval().to(DEVICE)
    if not plain._can_set_attn_implementation():
        pytest.skip("its attention is never taken")
    before = plain.config._attn_implementation
    bert_fast.accelerate(plain)
    with pytest.raises(ValueError, match="its head reads padded positions"):
        bert_fast.accelerate(plain, keep_padding=True)
    assert plain.config._attn_implementation == before
    try:
        head = AutoModelForQuestionAnswering.from_config(OTHERS[name])
    except ValueError:
        return  # esm has no such head
    with pytest.raises(ValueError, match="its head reads padded positions"):
        bert_fast.accelerate(head)
    assert "its head reads padded positions" in str(bert_fast.report(head))


def test_refused_by_name() -> None:
    model = AutoModel.from_config(MegatronBertConfig(**SIZES))
    with pytest.raises(ValueError, match="megatron_bert normalises before each sublayer"):
        bert_fast.accelerate(model)
    with pytest.raises(ValueError, match="no transformers model of a known family"):
        bert_fast.accelerate(AutoModel.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1)))


# -- a transformers of the future ------------------------------------------------------------------

FUTURE = """
import warnings
import torch
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf
{change}
import bert_fast
torch.manual_seed(0)
model = hf.{head}(BertConfig(
    vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
)).eval()
ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
before = model(ids).logits
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert bert_fast.accelerate(model) is model
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
told = [str(w.message) for w in caught if "bert_fast" in str(w.message)]
assert len(told) == 1 and "does not know {unknown}" in told[0], told
assert type(model) is hf.{head}
if "{unknown}" == "BertModel":
    assert "does not know BertModel" in str(bert_fast.report(model))
assert bert_fast.BertModel is not None
"""
FORKS = """
import os, sys
import torch
from transformers.models.bert import modeling_bert
torch.set_num_threads(1)
for script in sys.argv[1:]:
    if not (child := os.fork()):
        exec(script, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, script
"""
# What is changed, in a model of which class, and which class that makes unknown.
CHANGES = {
    "a head": ("BertForMaskedLM", "BertForMaskedLM", """
forward = hf.BertLMPredictionHead.forward
hf.BertLMPredictionHead.forward = lambda self, h: forward(self, h * 1.01)
"""),
    "a pooler": ("BertForSequenceClassification", "BertForSequenceClassification", """
hf.BertPooler.forward = lambda self, h: self.activation(self.dense(h[:, -1]))
"""),
    "scaled": ("BertForMaskedLM", "BertModel", """
forward = hf.BertSelfOutput.forward
hf.BertSelfOutput.forward = lambda self, h, x: forward(self, h * 1.01, x)
"""),
    "renamed": ("BertForMaskedLM", "BertModel", """
init = hf.BertSelfAttention.__init__
def renamed(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.q_proj = self.query
    del self.query
hf.BertSelfAttention.__init__ = renamed
source = hf.BertSelfAttention.forward
def forward(self, *args, **kwargs):
    self.query = lambda x: self.q_proj(x)
    try:
        return source(self, *args, **kwargs)
    finally:
        del self.query
hf.BertSelfAttention.forward = forward
"""),
}  # fmt: skip


def test_an_unknown_layout_is_left_alone_with_one_warning() -> None:
    """Each change in a fork of one process that has imported what takes seconds to import."""
    scripts = [
        FUTURE.format(change=code, head=head, unknown=unknown)
        for head, unknown, code in CHANGES.values()
    ]
    subprocess.run([sys.executable, "-c", FORKS, *scripts], check=True, timeout=300)
