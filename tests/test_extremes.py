"""NaN, and numbers near the end of their range: what PyTorch makes of them, the kernels make too.

A NaN that a kernel drops hides a fault: GradScaler, for one, skips a step by what it finds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast import ops
from bert_fast.ops import OPS
from bert_fast.ops.backends import ISAS

from .parity import DEVICE, leaves_of, results, smallest_sample, trainable
from .test_parity import BACKENDS, skip_unless_willing

# Of 8 bits a NaN spreads over its row or its block: `test_int8`, `test_row_int8` and `test_fp8`.
EXACT = [(op, backend) for op, backend in BACKENDS if not op.endswith(("_int8", "_fp8"))]
# Of the tokens that these leave out, PyTorch's products have 0 * NaN.
SPARSE = ("masked_lm_loss", "splade")
# On a GPU in 16 bits the gradients of small tables are products: see `ops.embed_layernorm`.
TABLES = ("word", "position", "token_type")


def nans(found: list[Tensor | None]) -> list[Tensor]:
    return [torch.tensor(False, device=DEVICE) if one is None else one.isnan() for one in found]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), EXACT)
def test_nan_goes_where_it_goes_in_pytorch(name: str, backend: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    (args,) = (s.args for s in op.samples(DEVICE, dtype) if s.name == smallest_sample(name))
    skip_unless_willing(name, backend, args)
    wanted, seen = trainable(op, backend, args), False
    for i, argument in enumerate(args):
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            continue
        middle, row = argument.numel() // 2, argument[:1].numel()
        for at in (middle, middle + row // 2):  # of attention, a query and a key
            planted = argument.clone()
            planted.view(-1)[at] = torch.nan
            given: tuple[Any, ...] = (*args[:i], planted, *args[i + 1 :])
            dy = torch.ones_like(op.reference(*given))
            if dy.dim():
                dy[::2] = 0.0  # of rows that no loss reads
            theirs = nans(results(op, op.reference, given, dy, wanted))
            ours = nans(results(op, lambda *a, g=backend: op(*a, backend=g), given, dy, wanted))
            seen |= any(mask.any() for mask in theirs)
            for what, found, expected in zip(("y", *op.differentiable), ours, theirs, strict=True):
                wrong = found ^ expected
                if name in SPARSE:  # but what the result shows is in the gradient of its cause
                    hidden = what == op.names[i] and ours[0].any() and not found.any()
                    wrong = found & ~expected | hidden
                elif what in TABLES and DEVICE.type == "cuda" and dtype != torch.float32:
                    wrong = expected & ~found
                assert not wrong.any(), f"{what}, of a NaN in {op.names[i]}"
    assert seen


@pytest.mark.parametrize("backend", [*ISAS, "reference"])  # on a GPU there is no such care
@pytest.mark.parametrize("width", [32, 64])
def test_scores_beyond_two_to_the_thirty(backend: str, width: int) -> None:
    """Their rounding alone is more than an exponent can hold; the largest wins all the same."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, 3, 2, width, generator=generator)
    qkv[:, :2] *= 3e5
    cu_seqlens = torch.tensor([0, 24], dtype=torch.int32)
    args = (qkv, cu_seqlens, None, None, 24, width**-0.5, 0.0, None)
    skip_unless_willing("attention", backend, args)
    (leaf, *_) = leaves = leaves_of(OPS["attention"], args, ("qkv",))
    found = OPS["attention"](*leaves, backend=backend)
    found.sum().backward()
    q, k, v = qkv.double().unbind(1)
    best = torch.einsum("inw,jnw->inj", q, k).argmax(-1)  # [T, N]
    expected = torch.stack([v[best[:, n], n] for n in range(2)], 1)
    torch.testing.assert_close(found.detach(), expected.float())
    assert leaf.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [6, 64, 160])
def test_scores_beyond_fp16_before_they_are_scaled(width: int, dtype: torch.dtype) -> None:
    """Of whatever kernel takes heads of this width; eager PyTorch has infinities there."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, 3, 2, width, generator=generator).to(DEVICE, dtype)
    qkv[:, :2] += (9e4 / width) ** 0.5
    bounds = torch.tensor([0, 24], dtype=torch.int32, device=DEVICE)
    leaf = qkv.clone().requires_grad_()
    exact = qkv.double().requires_grad_()
    found = ops.attention(leaf, bounds, 24, width**-0.5)
    expected = OPS["attention"].reference(exact, bounds, None, None, 24, width**-0.5, 0.0, None)
    found.sum().backward()
    expected.sum().backward()
    assert found.dtype == dtype and leaf.grad.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
    grads = leaf.grad[:, 2].double(), exact.grad[:, 2]  # of v
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 1e-7, 5e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [b for op, b in BACKENDS if op == "bias_gelu"])
def test_a_sum_is_rounded_as_by_pytorch(backend: str, dtype: torch.dtype, scale: float) -> None:
    """To the nearest, of two as near to the even one; fp16 has subnormals, and ends at 65,504."""
    generator = torch.Generator().manual_seed(0)
    x, bias = (
        (torch.rand(*shape, generator=generator) * scale).to(DEVICE, dtype)
        for shape in ((50, 80), (80,))
    )
    skip_unless_willing("bias_gelu", backend, (x, bias, "relu"))
    assert torch.equal(ops.bias_gelu(x, bias, "relu", backend=backend), (x + bias).relu())


@pytest.mark.parametrize("backend", [b for op, b in BACKENDS if op == "bias_gelu" and b in ISAS])
def test_gelu_far_below_0(backend: str) -> None:
    x = torch.linspace(-6.0, -5.0, 64)[None]
    skip_unless_willing("bias_gelu", backend, (x, None, "gelu"))
    expected = torch.nn.functional.gelu(x.double())
    found = ops.bias_gelu(x, None, "gelu", backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.0)
