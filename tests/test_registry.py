"""The op contract itself: schemas, refusals, the dropout generator, bad arguments."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from bert_fast import ops
from bert_fast.ops import OPS, onednn
from bert_fast.ops.backends import best_isa
from bert_fast.ops.encoder import preferred
from bert_fast.ops.registry import Kernel
from bert_fast.ops.rng import draw_seeds, keep_mask, philox, threshold

from .parity import DEVICE, leaves_of, results, smallest_sample, trainable, truth

NATIVE = [(op, k.backend) for op in OPS for k in OPS[op].kernels]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), NATIVE)
def test_opcheck(name: str, backend: str) -> None:
    """torch.library's own checks: schema, no aliasing, autograd and fakes registered, AOT.

    In bf16, where residuals are of another dtype than the output, or else in fp32: the contract is
    the same in every dtype.
    """
    op = OPS[name]
    for dtype in (torch.bfloat16, torch.float32):
        expected = truth(name, smallest_sample(name), dtype)
        why = dict(op.reasons(expected.args))[backend]
        if not why:
            break
    else:
        pytest.skip("; ".join(why))
    leaves = leaves_of(op, expected.args, trainable(op, backend, expected.args))
    packet = getattr(torch.ops.bert_fast, name)
    torch.library.opcheck(packet, (*leaves, backend, True))
    if backend == op.choose(expected.args).backend:  # what is not saved, no kernel decides
        torch.library.opcheck(packet, (*expected.args, backend, False))


@pytest.mark.skipif(best_isa() == 0, reason="there are no kernels of ours to stand before")
def test_who_multiplies_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN where it does as it is, as no machine of these tests may; nothing else is its."""
    monkeypatch.setattr(onednn, "has_native", lambda dtype: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight = torch.ones(4, 8, dtype=dtype), torch.ones(16, 8, dtype=dtype)
        its = dtype == torch.float16
        assert (OPS["linear"].choose((x, weight, None)).backend == "onednn") == its
        assert (OPS["linear_gelu"].choose((x, weight, None, "gelu")).backend == "onednn") == its
        assert preferred(x) != its  # all layers in one call


def test_forced_backend_says_why_not() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bert_fast.bias_gelu: backend 'avx512' cannot run"):
        ops.bias_gelu(x, None, backend="avx512")
    with pytest.raises(ValueError, match="no such backend for this op"):
        ops.bias_gelu(x, None, backend="warp9")
    assert OPS["bias_gelu"].choose((x, None, "gelu")).backend == "reference"


def test_every_kernel_states_a_reason_or_runs() -> None:
    for op in OPS.values():
        for dtype in (torch.float32, torch.float64):
            args = next(iter(op.samples(DEVICE, dtype))).args
            reasons = op.reasons(args)
            assert [name for name, _ in reasons] == [k.backend for k in op.kernels]
            assert reasons[-1] == ("reference", [])
            for backend in (name for name, why in reasons if not why):
                assert op(*args, backend=backend).isfinite().all(), (op.name, backend)


def test_a_kernel_leads_where_it_says() -> None:
    """Before those that stand before it, unless it cannot run; a forced one is not asked."""
    aten, triton, last = OPS["linear_gelu"].kernels[-3:]
    assert triton.leads is not None and aten.leads is None
    leading = replace(last, leads=lambda x, *rest: x.shape[0] < 5)

    def chosen(rows: int, kernel: Kernel, backend: str = "auto") -> str:
        op = copy.copy(OPS["linear_gelu"])
        op.kernels = (aten, kernel)
        return op.choose((torch.randn(rows, 8), torch.randn(16, 8), None, "gelu"), backend).backend

    assert chosen(4, leading) == "reference" and chosen(8, leading) == "aten"
    assert chosen(4, leading, "aten") == "aten"
    assert chosen(4, replace(leading, why_not=lambda *args: ["not today"])) == "aten"


def test_op_costs_are_positive() -> None:
    for op in OPS.values():
        flops, moved = op.cost(*next(iter(op.samples(DEVICE, torch.float32))).args)
        assert flops >= 0 and moved > 0


def test_philox_known_answers() -> None:
    """Of the Random123 library (Salmon et al., SC 2011): counters and key of zeros."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox(zero, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_keep_mask_rate_and_determinism() -> None:
    seed = draw_seeds(1, DEVICE)
    rows = torch.arange(300, device=DEVICE).unsqueeze(1)
    cols = torch.arange(301, device=DEVICE)
    kept = keep_mask(seed, rows, cols, 0.3)
    assert torch.equal(kept, keep_mask(seed, rows, cols, 0.3))
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert kept.float().mean(0).std() > 0  # columns differ
    assert not torch.equal(kept, keep_mask(seed + 1, rows, cols, 0.3))
    assert threshold(0.5) == 2**31


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_dropout_masks_are_the_same_everywhere(backend: str) -> None:
    """The mask is read off the output: with x = 0, residual = 0 a dropped element differs."""
    x = torch.full((5, 37), 3.0, device=DEVICE)
    residual = torch.randn(5, 37, device=DEVICE)
    weight, bias = torch.ones(37, device=DEVICE), torch.zeros(37, device=DEVICE)
    seed = torch.tensor([2**40 + 17], device=DEVICE)
    args = (x, None, residual, weight, bias, 1e-12, 0.4, seed)
    why = dict(OPS["add_layernorm"].reasons(args)).get(backend)
    if why:
        pytest.skip("; ".join(why))
    y = ops.add_layernorm(*args, backend=backend)
    rows, cols = torch.arange(5, device=DEVICE).unsqueeze(1), torch.arange(37, device=DEVICE)
    z = torch.where(keep_mask(seed, rows, cols, 0.4), 5.0, 0.0) + residual
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (37,)))


@pytest.mark.parametrize("name", ["add_layernorm", "bias_gelu", "attention", "embed_layernorm"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    """The C++ kernels at sizes that are worth several threads: output and gradients."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(50, (700,), generator=generator)
    bounds = torch.tensor([0, 300, 310, 700], dtype=torch.int32)
    args = {
        "add_layernorm": (draw(700, 384), draw(384), draw(700, 384), draw(384), draw(384), 1e-12,
                          0.1, torch.tensor([5])),
        "bias_gelu": (draw(700, 384), draw(384), "gelu"),
        "attention": (draw(700, 3, 4, 32), bounds, None, None, 390, 0.2, 0.1, torch.tensor([5])),
        "embed_layernorm": (tokens, None, tokens, draw(50, 384), draw(50, 384), None, draw(384),
                            draw(384), 1e-12, -1, 0.0, None),
    }[name]  # fmt: skip
    op, found, before = OPS[name], [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        dy = torch.ones_like(op(*args))
        found.append(results(op, op, args, dy))
    torch.set_num_threads(before)
    for one, several in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert (one is None and several is None) or torch.equal(one, several)


def test_a_gradient_of_a_gradient_raises() -> None:
    """Of a sum too, whose own gradient is a constant: nothing else tells autograd."""
    x = torch.randn(3, 8, requires_grad=True)
    for loss in (ops.bias_gelu(x, None).sum(), ops.bias_gelu(x, None).square().sum()):
        with pytest.raises(RuntimeError, match=r"bias_gelu: there is no gradient of a gradient"):
            torch.autograd.grad(loss, x, create_graph=True)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "wrong hidden": (
        {"weight": torch.ones(9)},
        ValueError,
        r"weight has shape \(9,\), expected \(8,\)",
    ),
    "mixed dtypes": (
        {"weight": torch.ones(8).double()},
        TypeError,
        "weight is torch.float64, x is torch.float32",
    ),
    "on another device": (
        {"weight": torch.ones(8, device="meta")},
        ValueError,
        "weight is on meta, x on cpu",
    ),
    "not a tensor": ({"bias": 3.0}, TypeError, "bias is 3.0, expected a Tensor"),
    "bad p": ({"p": 1.5}, ValueError, "p is 1.5, expected 0 <= p < 1"),
    "all dropped": (
        {"p": 1.0, "seed": torch.tensor([3])},
        ValueError,
        "p is 1.0, expected 0 <= p < 1",
    ),
    "no seed": ({"p": 0.5}, ValueError, "p is 0.5 but seed is None"),
    "seed of int32": (
        {"p": 0.5, "seed": torch.tensor([3]).int()},
        TypeError,
        "seed is torch.int32, expected int64",
    ),
    "two seeds": (
        {"p": 0.5, "seed": torch.tensor([3, 4])},
        ValueError,
        r"seed has shape \(2,\), expected \(1,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changes, error, message = BAD[case]
    given = {"weight": torch.ones(8), "bias": torch.zeros(8), "eps": 1e-12, **changes}
    with pytest.raises(error, match=f"add_layernorm: {message}"):
        ops.add_layernorm(torch.randn(3, 8), None, None, **given)


def test_autocast_is_on_after_a_call_that_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="bias has shape"):
            ops.bias_gelu(torch.randn(2, 3), torch.randn(4))
        assert torch.is_autocast_enabled("cpu")


def test_bad_arguments_of_other_ops() -> None:
    x, bounds = torch.randn(3, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="activation is 'mish', expected one of"):
        ops.bias_gelu(x, None, "mish")
    with pytest.raises(ValueError, match="pool: mode is 'max'"):
        ops.pool(x, bounds, "max")
    with pytest.raises(TypeError, match=r"pool: cu_seqlens is torch\.int64, expected int32"):
        ops.pool(x, bounds.long(), "cls")
    with pytest.raises(ValueError, match=r"attention: qkv has shape \(3, 2, 1, 8\)"):
        ops.attention(torch.randn(3, 2, 1, 8), bounds, 3, 1.0)
    with pytest.raises(ValueError, match=r"linear: weight has shape \(4, 9\), expected \(N, 8\)"):
        ops.linear(x, torch.randn(4, 9), None)
    word, norm = torch.randn(10, 8), (torch.ones(8), torch.zeros(8), 1e-12)
    for wrong in (torch.int16, torch.uint8, torch.bool, torch.float32):
        some = torch.zeros(3, dtype=wrong)
        with pytest.raises(TypeError, match=rf"input_ids is {wrong}, expected int32 or int64"):
            ops.embed_layernorm(some, None, some.long(), word, word, None, *norm)
    with pytest.raises(TypeError, match=r"indices is torch\.float64, expected int64"):
        ops.unpad(x, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"indices is torch\.int32, expected int64"):
        ops.unpad(x, torch.tensor([0], dtype=torch.int32))


def test_ids_outside_a_table_raise_on_the_cpu() -> None:
    word, norm = torch.randn(10, 8), (torch.ones(8), torch.zeros(8), 1e-12)
    ids, zeros = torch.tensor([3, 10]), torch.tensor([0, 0])
    with pytest.raises((IndexError, RuntimeError), match="10"):
        ops.embed_layernorm(ids, None, zeros, word, word, None, *norm)
    with pytest.raises((IndexError, RuntimeError), match="-1"):
        ops.embed_layernorm(zeros, None, zeros - 1, word, word, None, *norm)
