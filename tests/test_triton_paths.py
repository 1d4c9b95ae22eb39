"""Paths of the Triton kernels that only sizes or a GPU choose, taken with small inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert_fast.ops import OPS
from bert_fast.ops.backends import triton_interprets, triton_missing, triton_module

from .guard import guarded_allocations
from .parity import DEVICE, results, truth_of, violations
from .test_large import Draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        bool(triton_missing()) or not (DEVICE.type == "cuda" or triton_interprets()),
        reason="Triton does not run here",
    ),
]


def holds(name: str, args: tuple[Any, ...]) -> None:
    op = OPS[name]
    expected = truth_of(op, args)
    found = results(op, lambda *a: op(*a, backend="triton"), args, expected.dy)
    assert not violations(expected, found)


@pytest.mark.parametrize("name", ["add_layernorm", "embed_layernorm"])
def test_several_rows_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module("tiles"), "MANY_ROWS", 8)
    draw = Draw(torch.float32)
    args = (draw.rows if name == "add_layernorm" else draw.embeddings)(67, 16, 0.1)
    holds(name, args)
    with guarded_allocations() as made:
        triton_module(name).forward(*args, save=True)
    assert not made.broken()


def test_several_rows_a_program_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, x = triton_module("linear_fp8").quantize, Draw(torch.float32)(13, 37)
    reach = torch.tensor([1.0, 0.0], device=DEVICE)
    expected = quantize(x, reach)
    monkeypatch.setattr(triton_module("tiles"), "MANY_ROWS", 8)
    with guarded_allocations() as made:
        found = quantize(x, reach)
    assert not made.broken()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tiles are put in for the interpreter's")
def test_tiles_of_256_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = triton_module("linear")
    tiles = dict.fromkeys(("large", "medium", "small"), (32, 256, 32, 8, 1))
    monkeypatch.setitem(linear.HALF, "interpreter", tiles)
    linear.config.cache_clear()
    try:
        args = Draw(torch.float32).linear(20, 16, 300)
        holds("linear", args)
        holds("linear_gelu", (*args, "gelu"))
    finally:
        linear.config.cache_clear()


def test_descriptors_want_lines_of_16_bytes() -> None:
    fits, half = triton_module("linear_tma").fits, torch.bfloat16
    flat = torch.zeros(80 * 96 + 8, dtype=half, device=DEVICE)
    weight = torch.zeros(80, 96, dtype=half, device=DEVICE)
    x, y = flat[: 80 * 96].view(80, 96), torch.zeros(80, 80, dtype=half, device=DEVICE)
    assert fits("sm90", x, weight.t(), y)
    assert not fits("sm90", x, weight[:70].t(), torch.zeros(80, 70, dtype=half, device=DEVICE))
    assert not fits("sm90", flat[1 : 1 + 80 * 96].view(80, 96), weight.t(), y)
    assert not fits("sm90", torch.zeros(80, 97, dtype=half, device=DEVICE)[:, :96], weight.t(), y)


def test_only_what_allows_it_is_multiplied_in_tf32() -> None:
    precision, matmul = triton_module("tiles").precision, torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            matmul.fp32_precision = allowed
            assert precision(torch.float32) == allowed
            assert precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_scores_are_scaled_by_more_than_0(scale: float) -> None:
    qkv, bounds, *_ = Draw(torch.float32).attention((5, 3), 16)
    with pytest.raises(ValueError, match="scale is"):
        OPS["attention"](qkv, bounds, None, None, 5, scale, 0.0, None, backend="triton")
