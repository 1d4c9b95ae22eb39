"""Sizes beyond every block of a kernel, where its loops go round again; and one gradient alone."""

from __future__ import annotations

from collections.abc import Sequence
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


def biased(d: Draw, *shape: int, skip: Sequence[int] = ()) -> tuple[Any, ...]:
    """Attention with a bias of this shape; the sequences are 40 and 35 long."""
    args = list(d.attention((40, 35), 16, skip=skip))
    args[3] = d(*shape)
    return tuple(args)


def beyond_all(d: Draw) -> tuple[Any, ...]:
    """Attention over more keys than any kernel takes at once (the C++ one: 256), with all else."""
    args = list(d.attention((300,), 16, p=0.25))
    args[3] = d(1, 2, 300, 300)
    return tuple(args)


def without_residual(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0], None, None, *args[3:]


def narrower(d: Draw) -> tuple[Any, ...]:
    """Attention in bf16 with a bias in fp32."""
    args = list(d.attention((20, 7), 16))
    args[0], args[3] = args[0].bfloat16(), d(2, 2, 20, 20)
    return tuple(args)


def descending(d: Draw) -> tuple[Any, ...]:
    """Attention whose first keys have by far the largest scores."""
    args = d.attention((40, 35), 16)
    qkv = args[0]
    qkv[:, :2] *= 12.0
    qkv[32:40, 1] *= 0.01
    qkv[72:, 1] *= 0.01
    return args


def tails(d: Draw, activation: str, least: float = -60.0) -> tuple[Any, ...]:
    return torch.linspace(least, 12.0, 512, device=DEVICE).view(8, 64), None, activation


# Twice round the loops of what is interpreted, whose blocks are of 32 keys and 4,096 columns at
# most; and what is far from 0.
AGAIN = {
    "dropout": ("attention", lambda d: d.attention((40, 35), 16, p=0.25)),
    "dropout_and_a_block_of_hidden_keys": (
        "attention", lambda d: d.attention((70, 35), 16, p=0.25, skip=(37, 1))
    ),
    "dropout_and_hidden_keys": (
        "attention", lambda d: d.attention((20, 13), 16, p=0.25, skip=(1, 2))
    ),
    "first_sequence_without_keys": (
        "attention", lambda d: d.attention((20, 30), 16, skip=(20, 0))
    ),
    "dropout_and_bias_beyond_a_block": ("attention", beyond_all),
    "bias_of_another_dtype": ("attention", narrower),
    "bias": ("attention", lambda d: biased(d, 2, 2, 40, 40)),
    "bias_of_each_sequence": ("attention", lambda d: biased(d, 2, 1, 40, 40)),
    "bias_of_each_head": ("attention", lambda d: biased(d, 1, 2, 40, 40)),
    "bias_wider_than_the_longest": ("attention", lambda d: biased(d, 2, 2, 43, 43)),
    "bias_and_hidden_keys": ("attention", lambda d: biased(d, 2, 2, 40, 40, skip=(1, 0))),
    "largest_scores_first": ("attention", descending),
    "parts": ("add_layernorm", lambda d: d.rows(140, 16)),
    "wide_rows": ("add_layernorm", lambda d: d.rows(9, 4104)),
    "wide_dropout": ("add_layernorm", lambda d: d.rows(3, 1031, 0.1)),
    "dropout_alone": ("add_layernorm", lambda d: without_residual(d.rows(3, 8, 0.3))),
    "wide_tables": ("embed_layernorm", lambda d: d.embeddings(5, 4104, 0.1)),
    "tiles": ("bias_gelu", lambda d: (d(41, 1031), d(1031), "gelu")),
    "gelu_tanh": ("bias_gelu", lambda d: tails(d, "gelu_tanh")),
    "relu": ("bias_gelu", lambda d: tails(d, "relu")),
    "silu": ("bias_gelu", lambda d: tails(d, "silu", -120.0)),
    "split_sum": ("linear", lambda d: d.linear(520, 16, 24)),
    "rows_of_tiles": ("linear", lambda d: d.linear(300, 16, 40)),
    "wide_means": ("pool", lambda d: (d(9, 301), bounds(4, 5), "mean", False)),
    "small_norms": ("pool", lambda d: (d(9, 32, scale=1e-9), bounds(4, 5), "mean", True)),
    "no_norms": ("pool", lambda d: (d(9, 32, scale=1e-13), bounds(4, 5), "mean", True)),
    "wide_copies": ("unpad", lambda d: (d(5, 1031), torch.tensor([0, 2, 4], device=DEVICE))),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "backend"), [(c, b) for c, (op, _) in AGAIN.items() for o, b in BACKENDS if o == op]
)
def test_round_again(case: str, backend: str) -> None:
    name, make = AGAIN[case]
    if interpreted(backend) and make is beyond_all:
        pytest.skip("it would take half a minute")
    args = make(Draw(torch.float32))
    skip_unless_willing(name, backend, args)
    expected, op = truth_of(OPS[name], args), OPS[name]
    some = trainable(op, backend, args)
    found = results(op, lambda *a: op(*a, backend=backend), args, expected.dy, some)
    assert not violations(expected, found, some)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("backend", [b for op, b in BACKENDS if op == "bias_gelu"])
def test_nan_stays_nan(backend: str, activation: str) -> None:
    op = OPS["bias_gelu"]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[torch.nan, 1.0, -1.0, 0.0]], device=DEVICE, dtype=dtype)
        skip_unless_willing("bias_gelu", backend, (x, None, activation))
        given, expected = (x.clone().requires_grad_() for _ in range(2))
        found = op(given, None, activation, backend=backend)
        truth = op.reference(expected, None, activation)
        found.sum().backward()
        truth.sum().backward()
        assert torch.equal(found.isnan(), truth.isnan())
        assert torch.equal(given.grad.isnan(), expected.grad.isnan())


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
