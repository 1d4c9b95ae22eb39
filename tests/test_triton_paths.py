"""Paths of the Triton kernels that only sizes or a GPU choose, taken with small inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert_fast.ops import OPS
from bert_fast.ops.backends import triton_interprets, triton_missing, triton_module

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
    holds(name, (draw.rows if name == "add_layernorm" else draw.embeddings)(67, 16, 0.1))


def test_several_rows_a_program_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, x = triton_module("linear_fp8").quantize, Draw(torch.float32)(13, 37)
    q, scale, _ = quantize(x)
    monkeypatch.setattr(triton_module("tiles"), "MANY_ROWS", 8)
    again, same, _ = quantize(x)
    assert torch.equal(q.float(), again.float()) and torch.equal(scale, same)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tiles are put in for the interpreter's")
def test_tiles_of_256_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = triton_module("linear")
    tiles = dict.fromkeys(("large", "medium", "small"), (32, 256, 32, 8, 1))
    monkeypatch.setitem(linear.HALF, "interpreter", tiles)
    linear.config.cache_clear()
    try:
        holds("linear", Draw(torch.float32).linear(20, 16, 300))
    finally:
        linear.config.cache_clear()


def test_descriptors_want_lines_of_16_bytes() -> None:
    fits, half = triton_module("linear_tma").fits, torch.bfloat16
    flat = torch.zeros(80 * 96 + 8, dtype=half, device=DEVICE)
    weight = torch.zeros(80, 96, dtype=half, device=DEVICE)
    x, y = flat[: 80 * 96].view(80, 96), torch.zeros(80, 80, dtype=half, device=DEVICE)
    assert fits("sm90", x, weight.t(), y)
    assert not fits("sm90", flat[1 : 1 + 80 * 96].view(80, 96), weight.t(), y)
    assert not fits("sm90", torch.zeros(80, 97, dtype=half, device=DEVICE)[:, :96], weight.t(), y)
