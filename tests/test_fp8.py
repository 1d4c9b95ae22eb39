"""Products in e4m3: how they round, what a model gets of them, where they are not taken."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

import bert_fast
from bert_fast import ops
from bert_fast.cli import app
from bert_fast.explanation import Choice, Explanation
from bert_fast.modeling import encode
from bert_fast.ops import OPS, backends
from bert_fast.ops import linear_fp8 as public
from bert_fast.ops.bias_gelu import activate
from bert_fast.ops.checks import ACTIVATIONS
from bert_fast.ops.feed_forward_fp8 import inner_powers, reach_of
from bert_fast.ops.linear_fp8 import E4M3, OP, quantized
from bert_fast.verification import SENTENCE, Verification

from .models import ids, masks, tiny
from .parity import DEVICE, sample_names, truth, violations
from .tiny import save

HALF = torch.ones(1, 16, dtype=torch.bfloat16, device=DEVICE)
WILLING = not dict(OP.reasons((HALF, HALF, None)))["triton"]
FAST = pytest.mark.skipif(not WILLING, reason="no kernel for e4m3 runs here")
INPUTS = {"input_ids": ids(3, 20), "attention_mask": masks(3, 20)["right"]}


def real(output: Any) -> Tensor:
    return output.last_hidden_state[INPUTS["attention_mask"].bool()].float()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


# -- the op -----------------------------------------------------------------------------------


def test_rounding_is_near() -> None:
    """Each factor is 2.5 % off in the mean; what is beside an outlier no more than that."""
    x, weight = normal(64, 384), normal(256, 384)
    for outlier in (0.0, 384.0):  # both are in e4m3 as they are
        x[:, 7] = outlier
        exact = x.double() @ weight.double().t()
        exact -= exact.mean(0)  # the outlier's share is alike in all rows
        found = public(x, weight, None).double()
        assert 0.02 < (found - found.mean(0) - exact).norm() / exact.norm() < 0.05


def test_scales_are_powers_of_two_that_round_nothing() -> None:
    x = normal(40, 100) * torch.logspace(-3, 3, 40, device=DEVICE).unsqueeze(1)
    q, scale = quantized(x)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    greatest = q.float().abs().amax(1)
    assert (greatest >= 128).all() and (greatest <= 256).all()
    for power in (2.0**-20, 2.0**20):
        again, more = quantized(x * power)
        assert torch.equal(again.float(), q.float()) and torch.equal(more, scale * power)
    some = torch.tensor([[1.0, -0.5, 0.0, 2.0**-20]], device=DEVICE)
    q, scale = quantized(some)
    assert torch.equal(q.float() * scale, torch.tensor([[1.0, -0.5, 0, 0]], device=DEVICE))


def test_gradient_is_that_of_the_rounded_weight() -> None:
    x, weight, dy = normal(6, 150).requires_grad_(), normal(40, 150), normal(6, 40)
    public(x, weight, None).backward(dy)
    p, scale = quantized(weight)
    torch.testing.assert_close(x.grad, dy @ (p.float() * scale))
    with pytest.raises(ValueError, match="8 bits are for inference"):
        public(x, weight.requires_grad_(), None)


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_rounds_as_torch(dtype: torch.dtype) -> None:
    from bert_fast._triton.linear_fp8 import quantize

    ada = DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0)
    if ada and dtype == torch.float32:
        pytest.skip("before Hopper, Triton rounds fp32 to e4m3 by way of fp16")
    x = normal(50, 200) * torch.logspace(-6, 3, 50, device=DEVICE).unsqueeze(1)
    x[:, 3] *= 40.0
    x[7], x[8] = 0.0, 1e-40
    x[9, 5], x[10, 6], x[11, 0] = torch.nan, torch.inf, -torch.inf
    reach = torch.tensor([1.5, 0.25], device=DEVICE)
    q, scale, inner = quantize(x.to(dtype), reach)
    expected, other = quantized(x.to(dtype))
    assert q.dtype == E4M3 and torch.equal(scale.isnan(), other.isnan())
    fine = ~scale.isnan().flatten()
    assert not fine[9:12].any() and fine[:9].all()
    assert torch.equal(q.float()[fine], expected.float()[fine])
    assert torch.equal(scale[fine], other[fine])
    assert torch.equal(inner[fine], inner_powers(x.to(dtype), reach)[fine])
    assert inner[9:12].isnan().all()


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_rounds_an_activation_as_torch(activation: str) -> None:
    from bert_fast._triton.bias_gelu_fp8 import forward

    u, bias = normal(9, 150), normal(150)
    powers = torch.logspace(-6, 2, 9, 2.0, device=DEVICE).unsqueeze(1)
    expected = (activate(u + bias, activation) / powers).to(E4M3).float()
    (found,) = forward(u, bias, activation, powers, save=False)
    same = found.float() == expected
    # The last bit of fp32 may decide between two neighbours.
    assert found.dtype == E4M3 and same.float().mean() > 0.99
    torch.testing.assert_close(found.float(), expected, rtol=0.13, atol=2**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "best"])
def test_not_a_number_stays_one(backend: str) -> None:
    x, weight = (HALF.repeat(n, 2) for n in (4, 16))
    name = backend if backend != "best" else OP.choose((x, weight, None)).backend
    for value in (torch.nan, torch.inf, -torch.inf):
        x[2, 31] = value
        y = public(x, weight, None, backend=name)
        assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()
        x[2, 31], weight[1, 0] = 1.0, value
        y = public(x, weight, None, backend=name)
        assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()
        weight[1, 0] = 1.0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the parity tests run it")
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="this torch has one scale a matrix on CPUs")
@pytest.mark.parametrize(
    ("name", "sample"),
    [(op, sample) for op in ("linear_fp8", "feed_forward_fp8") for sample in sample_names(op)],
)
def test_scaled_mm_is_called_rightly(name: str, sample: str) -> None:
    """Not a kernel for a CPU, but torch has the same call there."""
    expected = truth(name, sample, torch.bfloat16)
    x, weight, *_ = args = tuple(a.contiguous() if isinstance(a, Tensor) else a
                                 for a in expected.args)  # fmt: skip
    if not x.shape[0] or x.shape[1] % 16 or weight.shape[0] % 16:
        pytest.skip("sizes that it does not take")
    (kernel,) = (kernel for kernel in OPS[name].kernels if kernel.backend == "scaled_mm")
    (y,) = kernel.forward(*args, save=False)
    assert not violations(expected, [y, *expected.plain[1:]], ())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inner_states_stay_under_their_bound(activation: str) -> None:
    """Also where a row of x lies along the longest row of U, which makes the bound an equality."""
    x, up, bias = normal(40, 96), normal(80, 96) / 9, normal(80)
    x[3], bias[7] = 3 * up[up.norm(dim=1).argmax()], 9.0
    powers = inner_powers(x, reach_of(up, bias))
    inner = (activate(x @ up.t() + bias, activation) / powers).abs()
    assert inner.max() < 256 and inner[3].max() > 64
    assert inner.amax(1).min() > 8  # nor is it so far off that e4m3 would run out of small numbers


def test_gradient_of_the_feed_forward_network() -> None:
    x, up, down, dy = normal(6, 48).requires_grad_(), normal(32, 48), normal(48, 32), normal(6, 48)
    ops.feed_forward_fp8(x, up, None, down, "relu").backward(dy)
    wide = [q.float() * scale for q, scale in map(quantized, (up, down))]
    q, scale = quantized(x.detach())
    slope = (q.float() * scale) @ wide[0].t() > 0
    torch.testing.assert_close(x.grad, (dy @ wide[1] * slope) @ wide[0])
    with pytest.raises(ValueError, match="down wants a gradient; 8 bits are for inference"):
        ops.feed_forward_fp8(x, up, None, down.requires_grad_())


@pytest.mark.gpu
@FAST
def test_a_bias_written_to_is_taken() -> None:
    x, up, down = (normal(*shape).bfloat16() for shape in ((6, 64), (80, 64), (64, 80)))
    bias = torch.zeros(80, dtype=torch.bfloat16, device=DEVICE)
    for value in (0.0, 500.0):
        bias.fill_(value)
        found, expected = (
            ops.feed_forward_fp8(x, up, bias, down, backend=name).float()
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.std().item())


# -- the model --------------------------------------------------------------------------------


@pytest.mark.gpu
@FAST
def test_a_model_in_fp8() -> None:
    model = tiny(num_hidden_layers=1).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="fp8")
    assert "products of the layers in fp8" in str(bert_fast.report(ours))
    with torch.inference_mode():
        choices = bert_fast.explain(ours, INPUTS).choices
        calls = {c.op: c.calls for c in choices}
        assert calls["linear_fp8"] == 2 and calls["feed_forward_fp8"] == 1
        assert not {"linear", "qkv_linear", "feed_forward", "encoder"} & set(calls)
        found, expected = real(ours(**INPUTS)), real(model(**INPUTS))
        assert 1e-3 < (found - expected).norm() / expected.norm() < 0.15
        bounds = torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=DEVICE)
        given = (INPUTS["input_ids"].flatten(), bounds, 20)
        rows = torch.tensor([3, 50], device=DEVICE)
        some = encode(model, *given, rows=rows, dtype="fp8")
        torch.testing.assert_close(some, encode(model, *given, dtype="fp8")[rows])
        ours.encoder.layer[0].output.dense.weight.neg_()
        assert (real(ours(**INPUTS)) - found).abs().max() > 0.01
        ours.encoder.layer[0].output.dense.weight.neg_()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    bert_fast.restore(ours)


@pytest.mark.gpu
@FAST
def test_a_head_gets_fp8_states() -> None:
    model = tiny(BertForSequenceClassification, num_hidden_layers=1).bfloat16()
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="fp8")
    in_bf16 = bert_fast.accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        found, expected, other = (m(**INPUTS).logits for m in (ours, model, in_bf16))
    assert (found - expected).abs().max() < 0.1 and not torch.equal(found, other)


@pytest.mark.parametrize("reason", ["device", "gradients", "layers", "reference"])
def test_where_not_says_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend, told = tiny(), "auto", "records gradients"
    if reason == "layers":
        model.encoder.layer[0].output.LayerNorm.eps, told = 0.1, "settings that differ"
    elif reason == "reference":
        backend, told = {"linear_fp8": "reference"}, "the reference of linear_fp8"
    elif reason == "device":
        if DEVICE.type != "cpu":
            pytest.skip("this machine has a GPU")
        told = "scaled_mm: cpu has no arithmetic in 8-bit floats"
        monkeypatch.setattr(backends, "triton_interprets", lambda: False)
    ours = bert_fast.accelerate(copy.deepcopy(model), backend, dtype="fp8")
    plain = bert_fast.accelerate(copy.deepcopy(model))
    with torch.set_grad_enabled(reason == "gradients"):
        with pytest.warns(UserWarning, match=f"not in 8 bits: .*{told}"):
            found = ours(**INPUTS)
        torch.testing.assert_close(real(found), real(plain(**INPUTS)))


@FAST
def test_verify_by_the_command_line(tmp_path: Path) -> None:
    folder, out = save(tmp_path, num_hidden_layers=1), tmp_path / "found.json"
    line = ["verify", str(folder), "--dtype", "fp8", "--json", str(out)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0 and "near the truth" in result.output, result.output
    assert "linear_fp8" in result.output and "over" not in result.output
    found = json.loads(out.read_text())
    assert found["passed"] and SENTENCE <= found["cosine"] < 1


def test_verify_fails_where_they_do_not_run() -> None:
    """Nor where they do and a text is turned by too much."""
    choice = Choice("linear_fp8", "triton", "reference", "", {})
    told = Verification("Bert", "fp8", 1, [], None, 1.0, 1.0, None, Explanation(choices=[choice]))
    assert told.passed
    assert not replace(told, cosine=0.99).passed and not replace(told, token_cosine=0.9).passed
    assert not replace(told, explanation=Explanation()).passed
