"""Products in int8 with a scale a row: how they round, what a model on a GPU gets of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import bert_fast
from bert_fast.modeling import encode
from bert_fast.ops import linear_row_int8 as public
from bert_fast.ops.linear_row_int8 import GROUP, OP, quantized, rotated
from bert_fast.verification import IN_8_BITS

from .models import ids, masks, tiny
from .parity import DEVICE

ONES = torch.ones(2, 8, device=DEVICE)
FAST = pytest.mark.skipif(
    bool(dict(OP.reasons((ONES, ONES, None, "none")))["triton"]), reason="Triton does not run here"
)
INPUTS = {"input_ids": ids(3, 20), "attention_mask": masks(3, 20)["right"]}
# On a GPU it is what "auto" takes; on a CPU it has to be named before the C++ encoder.
BACKEND: Any = "auto" if DEVICE.type == "cuda" else {"linear_row_int8": "triton"}


def real(output: Any) -> Tensor:
    return output.last_hidden_state[INPUTS["attention_mask"].bool()].float()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


# -- the op -----------------------------------------------------------------------------------


def test_rounding_is_near() -> None:
    """About a hundredth of the result; an outlier of 40 standard deviations costs a third more."""
    x, weight = normal(64, 384), normal(256, 384)
    for outlier, most in ((0.0, 0.015), (40.0, 0.02)):
        x[:, 7] += outlier
        exact = x.double() @ weight.double().t()
        assert 0.005 < (public(x, weight, None) - exact).norm() / exact.norm() < most


def test_the_rotation_keeps_products() -> None:
    x, y = normal(5, 200).double(), normal(9, 200).double()
    turned = rotated(x).flatten(1) @ rotated(y).flatten(1).t() / GROUP
    torch.testing.assert_close(turned, x @ y.t())
    spike = torch.zeros(1, GROUP, device=DEVICE)
    spike[0, 77] = 1.0
    assert (rotated(spike).abs() == 1).all()  # an outlier is spread over all


def test_scales() -> None:
    x = normal(40, 100) * torch.logspace(-3, 3, 40, device=DEVICE).unsqueeze(1)
    q, scale = quantized(x)
    assert q.dtype == torch.int8 and (q.int().abs().amax(1) == 127).all()
    error = q.float() * scale - rotated(x).flatten(1)
    assert (error.abs() <= scale * 0.5001).all()


def test_gradient_is_that_of_the_rounded_weight() -> None:
    x, weight, dy = normal(6, 150).requires_grad_(), normal(40, 150), normal(6, 40)
    public(x, weight, None).backward(dy)
    p, scale = quantized(weight, GROUP)
    back = rotated(p.float() * scale).flatten(1)[:, :150]
    torch.testing.assert_close(x.grad, dy @ back)
    with pytest.raises(ValueError, match="linear_row_int8: weight wants a gradient; 8 bits are"):
        public(x, weight.requires_grad_(), None)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="linear_row_int8: activation is 'tanh'"):
        public(ONES, ONES, None, "tanh")
    with pytest.raises(ValueError, match=r"linear_row_int8: .*expected \(N, 8\)"):
        public(ONES, torch.ones(3, 9, device=DEVICE), None)


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(50, 200), (250, 130), (20, 520), (3, 37), (2, 7000)], ids=str)
def test_triton_rounds_as_torch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Scales to 1e-6 of themselves; of 1,000 integers one may be off, by one."""
    from bert_fast._triton.linear_row_int8 import quantize

    rows, columns = shape
    x = normal(rows, columns) * torch.logspace(-6, 2, rows, device=DEVICE).unsqueeze(1)
    x[:, 3] *= 40.0
    if rows > 12:
        x[7], x[8] = 0.0, 1e-40
        x[9, 5], x[10, 6], x[11, 0] = torch.nan, torch.inf, -torch.inf
    q, scale = quantize(x.to(dtype))
    expected, other = quantized(x.to(dtype))
    fine = ~other.isnan().flatten()
    assert torch.equal(fine, ~scale.isnan().flatten()) and fine.sum() == rows - 3 * (rows > 12)
    assert q.dtype == torch.int8 and q.shape == (rows, columns + -columns % GROUP)
    off = (q[fine].int() - expected[fine].int()).abs()
    assert off.max() <= 1 and off.sum() <= off.numel() // 1000
    if rows > 12:
        assert not q[7:9].any() and scale[7] == 0
        fine[8] = False  # its scale is subnormal, and times zeros only
    torch.testing.assert_close(scale[fine], other[fine], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "best"])
def test_not_a_number_stays_one(backend: str) -> None:
    x, weight = torch.ones(4, 130, device=DEVICE), torch.ones(3, 130, device=DEVICE)
    name = backend if backend != "best" else OP.choose((x, weight, None, "none")).backend
    for value in (torch.nan, torch.inf, -torch.inf):
        x[2, 129] = value
        y = public(x, weight, None, backend=name)
        assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()
        x[2, 129], weight[1, 0] = 1.0, value
        y = public(x, weight, None, backend=name)
        assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()
        weight[1, 0] = 1.0


# -- the model --------------------------------------------------------------------------------


@pytest.mark.gpu
@FAST
def test_a_model_in_int8() -> None:
    model = tiny(num_hidden_layers=1).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = bert_fast.accelerate(copy.deepcopy(model), BACKEND, dtype="int8")
    with torch.inference_mode():
        choices = bert_fast.explain(ours, INPUTS).choices
        calls = [c.calls for c in choices if c.op == "linear_row_int8"]
        assert sum(calls) == 4 and any(map(IN_8_BITS["int8"], choices))
        assert not {"linear", "qkv_linear", "feed_forward"} & {c.op for c in choices}
        found, expected = real(ours(**INPUTS)), real(model(**INPUTS))
        assert 1e-3 < (found - expected).norm() / expected.norm() < 0.05
        bounds = torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=DEVICE)
        given = (model, INPUTS["input_ids"].flatten(), bounds, 20)
        rows = torch.tensor([3, 50], device=DEVICE)
        some = encode(*given, rows=rows, backend=BACKEND, dtype="int8")
        every = encode(*given, backend=BACKEND, dtype="int8")
        torch.testing.assert_close(some, every[rows])
        ours.encoder.layer[0].output.dense.weight.neg_()
        assert (real(ours(**INPUTS)) - found).abs().max() > 0.01
        ours.encoder.layer[0].output.dense.weight.neg_()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.gpu
@FAST
def test_a_head_gets_int8_states() -> None:
    model = tiny(BertForSequenceClassification, num_hidden_layers=1)
    ours = bert_fast.accelerate(copy.deepcopy(model), BACKEND, dtype="int8")
    plain = bert_fast.accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        found, expected, other = (m(**INPUTS).logits for m in (ours, model, plain))
    assert (found - expected).abs().max() < 0.05 and not torch.equal(found, other)


@pytest.mark.parametrize("reason", ["gradients", "weights", "reference", "wide"])
def test_where_not_says_why(reason: str) -> None:
    sizes, backend = {"num_hidden_layers": 2}, BACKEND
    if reason == "reference":
        backend, told = {"linear_row_int8": "reference"}, "asked for"
    elif reason == "wide":
        sizes, told = {"num_hidden_layers": 1, "intermediate_size": 8200}, "hidden size is 8200"
    else:
        told = "records gradients" if reason == "gradients" else "the weight is being trained"
    model = tiny(**sizes)
    if reason == "weights":  # no state wants a gradient before the second layer
        model.requires_grad_(False)
        model.encoder.layer[1].attention.self.requires_grad_(True)
    ours = bert_fast.accelerate(copy.deepcopy(model), backend, dtype="int8")
    plain = bert_fast.accelerate(model)
    with torch.set_grad_enabled(reason in ("gradients", "weights")):
        with pytest.warns(UserWarning, match=f"not in 8 bits: .*{told}"):
            found = ours(**INPUTS)
        torch.testing.assert_close(real(found), real(plain(**INPUTS)))
    assert found.last_hidden_state.requires_grad == (reason in ("gradients", "weights"))
