"""Products in 8 bits: what a model gets of them, where they are not taken, what they leave."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

import bert_fast
from bert_fast import ops, verification
from bert_fast.cli import app
from bert_fast.modeling import encode
from bert_fast.ops import backends
from bert_fast.ops import linear_int8 as public
from bert_fast.ops.backends import ISAS, best_isa, extension_missing, has_isa
from bert_fast.ops.encoder import LAYER, attends_in_bf16, layers_of
from bert_fast.ops.linear_int8 import OP, _rounded_weight, rotated
from bert_fast.structure import structure_of

from .models import ids, masks, tiny
from .tiny import save

FAST = pytest.mark.skipif(best_isa() == 0, reason="8-bit products of models need AVX2")
INPUTS = {"input_ids": ids(3, 30), "attention_mask": masks(3, 30)["right"]}


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the kernel for GPUs would run where a CPU's cannot."""
    monkeypatch.setattr(backends, "triton_interprets", lambda: False)


def real(output: Any) -> Tensor:
    return output.last_hidden_state[INPUTS["attention_mask"].bool()]


def runs_in_int8(model: Any) -> bool:
    with torch.inference_mode():
        choices = bert_fast.explain(model, INPUTS).choices
    return any(c.op == "encoder" and "int8" in c.on for c in choices)


# -- the op -----------------------------------------------------------------------------------


def test_rounding_is_near() -> None:
    """About a hundredth of the result, and no worse with an outlier of 40 standard deviations."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 384, generator=generator) for n in (64, 256))
    for outlier in (0.0, 40.0):
        x[:, 7] += outlier
        exact = x.double() @ weight.double().t()
        error = (public(x, weight, None) - exact).norm() / exact.norm()
        assert error < 0.02


def test_the_rotation_keeps_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    turned = rotated(x).flatten(1) @ rotated(y).flatten(1).t() / 128
    torch.testing.assert_close(turned, x @ y.t())


def test_gradient_is_that_of_the_rounded_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 150, generator=generator).requires_grad_()
    weight, dy = torch.randn(40, 150, generator=generator), torch.randn(6, 40, generator=generator)
    public(x, weight, None).backward(dy)
    back = rotated(_rounded_weight(weight).flatten(1)).flatten(1)[:, :150]
    torch.testing.assert_close(x.grad, dy @ back)
    with pytest.raises(ValueError, match="8 bits are for inference"):
        public(x, weight.requires_grad_(), None)


@pytest.mark.skipif(bool(extension_missing()), reason="needs the C++ extension")
@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 5, 6])
def test_every_instruction_set_rounds_alike(level: int) -> None:
    """The integers are the same; only the order of fp32 sums over groups may differ."""
    if not has_isa(level):
        pytest.skip("this CPU lacks the instructions")
    cpu = torch.ops.bert_fast_cpu
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(rows, 768, generator=generator) for rows in (4096, 16)]
    many = (*draw, None, "none")  # values enough that some are a last bit from being halves
    for args in (*(s.args for s in OP.samples(torch.device("cpu"), torch.float32)), many):
        x, weight, bias, activation = args
        x, weight = x.contiguous(), weight.contiguous()
        packed = cpu.pack_weight(weight, True, 0, level)
        found = cpu.linear_forward(x, packed, bias, weight.shape[0], activation, level)
        wide = None if bias is None else bias.double()
        expected = OP.reference(x.double(), weight.double(), wide, activation)
        # One level off in one value would be 1e-3 and more; sums of 768 in fp32 are 1e-5 off.
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "best"])
def test_not_a_number_stays_one(backend: str) -> None:
    name = backend if backend != "best" else OP.choose((torch.ones(1, 8),) * 2).backend
    for value in (torch.nan, torch.inf, -torch.inf):
        x, weight = torch.ones(4, 130), torch.ones(3, 130)
        x[2, 129] = value
        y = public(x, weight, None, backend=name)
        assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()
        x[2, 129], weight[1, 0] = 1.0, value
        y = public(x, weight, None, backend=name)
        assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


# -- the model --------------------------------------------------------------------------------


@FAST
# Few, product by product; many, in blocks, the inner states in slices, of which one is narrower.
@pytest.mark.parametrize(("tokens", "inner"), [(41, 37), (400, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_has_the_bits_of_its_ops(dtype: torch.dtype, tokens: int, inner: int) -> None:
    model = tiny(intermediate_size=inner).to(dtype)
    isa = next(name for name, level in ISAS.items() if level <= best_isa())
    ours = bert_fast.accelerate(copy.deepcopy(model))
    plain = structure_of(ours, ours.bert_fast_family).plain
    assert plain is not None
    bounds = torch.tensor([0, 11, 40, tokens], dtype=torch.int32)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [w.detach() for w in plain.weights]
    found = ops.encoder(x, bounds, tokens, weights, plain.heads, plain.eps, int8=True, backend=isa)
    h = x
    for w in layers_of(weights):
        q, k, v, *biases = (w[name] for name in LAYER[:6])
        qkv = public(h, torch.cat((q, k, v)), torch.cat(biases), backend=isa)
        qkv = qkv.view(tokens, 3, plain.heads, -1)
        if attends_in_bf16(x):
            qkv = qkv.bfloat16()
        context = ops.attention(qkv, bounds, tokens, qkv.shape[3] ** -0.5, backend=isa).flatten(1)
        out = public(context.to(dtype), w["out"], None, backend=isa)
        norm = (w["out_norm"], w["out_norm_bias"], plain.eps)
        h = ops.add_layernorm(out, w["out_bias"], h, *norm, backend=isa)
        states = public(h, w["up"], w["up_bias"], "gelu", backend=isa)
        down = public(states, w["down"], None, backend=isa)
        norm = (w["down_norm"], w["down_norm_bias"], plain.eps)
        h = ops.add_layernorm(down, w["down_bias"], h, *norm, backend=isa)
    assert torch.equal(found, h)


@FAST
def test_a_model_in_int8() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="int8")
    assert runs_in_int8(ours) and not runs_in_int8(bert_fast.accelerate(copy.deepcopy(model)))
    assert "products of the layers in int8" in str(bert_fast.report(ours))
    with torch.inference_mode():
        found, expected = real(ours(**INPUTS)), real(model(**INPUTS))
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05
        every = ours(**INPUTS, output_hidden_states=True)
        assert torch.equal(real(every), found) and len(every.hidden_states) == 3
        bounds = torch.tensor([0, 30, 60, 90], dtype=torch.int32)
        given = (INPUTS["input_ids"].flatten(), bounds, 30)
        some = encode(model, *given, rows=torch.tensor([3, 70]), dtype="int8")
        assert torch.equal(some, encode(model, *given, dtype="int8")[[3, 70]])
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    assert not runs_in_int8(bert_fast.restore(ours))


@FAST
@pytest.mark.parametrize("reason", ["", "single ops", "wide heads"])
def test_verify_fails_where_they_do_not_run(reason: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 288, "num_attention_heads": 2} if reason == "wide heads" else {}
    line = ["verify", str(save(tmp_path, **wide)), "--dtype", "int8"]
    line += ["--backend", "avx2"] if reason == "single ops" else []
    result = CliRunner().invoke(app, line)
    assert result.exit_code == bool(reason), result.output


@FAST
def test_a_head_gets_int8_states() -> None:
    """The last layer's rows, the pooler and the head are as ever."""
    model = tiny(BertForSequenceClassification)
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="int8")
    in_fp32 = bert_fast.accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        found, expected, other = (m(**INPUTS).logits for m in (ours, model, in_fp32))
    assert (found - expected).abs().max() < 0.05 and not torch.equal(found, other)


@FAST
def test_a_weight_of_both_products() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64), torch.randn(40, 64)
    ops.linear(x, weight, None)
    torch.testing.assert_close(
        public(x, weight, None), public(x, weight, None, backend="reference"), rtol=0.02, atol=0.02
    )


@FAST
def test_a_weight_written_to_is_packed_again() -> None:
    ours = bert_fast.accelerate(tiny(), dtype="int8")
    with torch.inference_mode():
        before = real(ours(**INPUTS))
    ours.encoder.layer[0].output.dense.weight.data.neg_()
    with torch.inference_mode():
        assert (real(ours(**INPUTS)) - before).abs().max() > 0.01


@FAST
@pytest.mark.parametrize("reason", ["gradients", "layers", "single ops", "generic"])
def test_where_not_says_why(reason: str) -> None:
    model, backend, told = tiny(), "auto", "records gradients"
    if reason == "layers":
        model.encoder.layer[0].output.LayerNorm.eps, told = 0.1, "settings that differ"
    elif reason == "single ops":
        backend, told = {"attention": "reference"}, "backends of single ops"
    elif reason == "generic":
        backend, told = {"encoder": "generic"}, "slow without AVX2"
    plain = bert_fast.accelerate(copy.deepcopy(model))
    ours = bert_fast.accelerate(copy.deepcopy(model), backend, dtype="int8")
    with torch.set_grad_enabled(reason == "gradients"):
        if reason == "generic":
            with pytest.raises(ValueError, match=told):
                ours(**INPUTS)
            return
        with pytest.warns(UserWarning, match=f"not in 8 bits: .*{told}"):
            found = ours(**INPUTS)
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            ours(**INPUTS)
        expected = plain(**INPUTS)
    torch.testing.assert_close(real(found), real(expected))


@FAST
def test_verify_and_explain_by_the_command_line(tmp_path: Path, monkeypatch: Any) -> None:
    folder = save(tmp_path)
    line = ["verify", str(folder), "--dtype", "int8"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0 and "in int8 on" in result.output, result.output
    assert "near the truth" in result.output and "over" not in result.output
    result = CliRunner().invoke(app, ["explain", str(folder), "--dtype", "int8"])
    assert result.exit_code == 0 and "float32 in int8 x1" in result.output
    monkeypatch.setattr(verification, "SENTENCE", 0.99999999)
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1 and "NOT near the truth" in result.output


def test_refuses() -> None:
    with pytest.raises(ValueError, match="dtype is 'int4', expected None, 'int8' or 'fp8'"):
        bert_fast.accelerate(tiny(), dtype="int4")
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        public(x, weight, None, "tanh")
    with pytest.raises(ValueError, match=r"expected \(N, 8\)"):
        public(x, torch.ones(3, 9), None)
