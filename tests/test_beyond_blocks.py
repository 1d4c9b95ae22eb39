"""Sizes beyond every block of a kernel, where its loops go round again; and one gradient alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert_fast import ops
from bert_fast.ops import OPS

from .parity import DEVICE, results, smallest_sample, trainable, truth, truth_of, violations
from .test_large import Draw
from .test_parity import BACKENDS, interpreted, skip_unless_willing


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


# Many rows are too many for Triton's interpreter, whose blocks are smaller than those of C++.
MANY = {
    "add_layernorm": lambda d: d.rows(5000, 16),
    "bias_gelu": lambda d: (d(5000, 16), d(16), "gelu"),
    "pool": lambda d: (d(5003, 16), bounds(5000, 3), "mean", True),
}
WIDE = {
    "add_layernorm": lambda d: d.rows(3, 1031),
    "bias_gelu": lambda d: (d(3, 1031), d(1031), "gelu"),
    "pool": lambda d: (d(303, 301), bounds(300, 3), "mean", True),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), [one for one in BACKENDS if one[0] in MANY])
@pytest.mark.parametrize("make", [MANY, WIDE], ids=["many", "wide"])
def test_beyond_a_block(make: dict[str, Any], op: str, backend: str) -> None:
    if interpreted(backend) and make is MANY:
        pytest.skip("it would take minutes")
    args = make[op](Draw(torch.float32))
    skip_unless_willing(op, backend, args)
    expected = truth_of(OPS[op], args)
    found = results(OPS[op], lambda *a: OPS[op](*a, backend=backend), args, expected.dy)
    assert not violations(expected, found)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_each_gradient_alone(name: str, backend: str) -> None:
    """As where all else is frozen: of biases only, for one."""
    expected, op = truth(name, smallest_sample(name), torch.float32), OPS[name]
    skip_unless_willing(name, backend, expected.args)
    dy = expected.dy.clone()
    for wanted in trainable(op, backend, expected.args):
        if expected.args[op.names.index(wanted)] is None:
            continue
        found = results(op, lambda *a: op(*a, backend=backend), expected.args, dy, (wanted,))
        assert not violations(expected, found, (wanted,)), wanted
    assert torch.equal(dy, expected.dy)  # autograd may hand the same one to others


def test_a_bias_that_was_written_to_is_seen() -> None:
    """By the copy that q, k and v are packed into."""
    draw = Draw(torch.float32)
    x, *weights = draw(3, 16), draw(8, 16), draw(8, 16), draw(8, 16), draw(8), draw(8), draw(8)
    for backend in (None, *(b for op, b in BACKENDS if op == "qkv_linear")):
        use = "auto" if backend is None else backend
        if backend and dict(OPS["qkv_linear"].reasons((x, *weights)))[backend]:
            continue
        before = ops.qkv_linear(x, *weights, backend=use)
        for i, bias in enumerate(weights[3:]):
            bias.add_(1.0)
            found = ops.qkv_linear(x, *weights, backend=use)
            change = (found - before).view(3, 3, 8).mean((0, 2))
            torch.testing.assert_close(change, (torch.arange(3, device=DEVICE) == i).float())
            before = found
