"""Gradients that on a GPU something else computes than what computed the forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.ops import OPS
from bert_fast.ops.backends import triton_missing
from bert_fast.ops.embed_layernorm import SMALL_TABLE, _scattered, summed_by_product

from .parity import DEVICE, truth, violations

aten = torch.ops.aten.embedding_dense_backward


def tokens(rows: int, kind: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """dz in fp64: hundreds of tokens for each row, as token types have them; none for row 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, rows, (200 * rows + 3,), generator=generator)
    dz = torch.randn(ids.shape[0], 37, generator=generator, dtype=torch.float64) + 0.5
    return dz.to(DEVICE), ids.to(DEVICE, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_product_sums_what_a_scatter_sums(kind: torch.dtype) -> None:
    dz, ids = tokens(5, kind)
    found = summed_by_product(dz, ids, 5)
    assert found.dtype == dz.dtype and not found[0].any()
    torch.testing.assert_close(found, aten(dz, ids, 5, -1, False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_rounds_its_sums_once(dtype: torch.dtype) -> None:
    """A sum kept in bf16 stops growing after a few hundred tokens."""
    exact, ids = tokens(3)
    dz = exact.to(dtype)
    exact = aten(dz.double(), ids, 3, -1, False)
    ulp = torch.finfo(dtype).eps
    found = summed_by_product(dz, ids, 3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.6 * ulp, atol=1e-4)
    assert torch.equal(found, summed_by_product(dz, ids, 3))
    if DEVICE.type == "cuda":
        assert torch.equal(found, _scattered(dz, ids, 3, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_and_no_tokens(dtype: torch.dtype) -> None:
    dz, ids = tokens(4)
    found = _scattered(dz.to(dtype), ids, 4, 2)
    assert not found[2].any() and found[1].any() and found[3].any()
    for rows in (1, SMALL_TABLE + 1):
        empty = _scattered(dz[:0].to(dtype), ids[:0], rows, -1)
        assert empty.shape == (rows, dz.shape[1]) and not empty.any()


@pytest.mark.gpu
@pytest.mark.skipif(bool(triton_missing()), reason="Triton is not installed")
@pytest.mark.parametrize("sample", ["bert", "no_bias", "plain_layernorm", "dropout"])
def test_a_norm_of_cuda_takes_tritons_backward(sample: str) -> None:
    """On a CPU, Triton's interpreter takes it from the residuals of the C++ forward."""
    op = OPS["add_layernorm"]
    cuda = next(kernel for kernel in op.kernels if kernel.backend == "cuda")
    assert cuda.backward and cuda.backward_backend == "triton"
    expected = truth(op.name, sample, torch.float32)
    forward = op.choose(expected.args)
    if forward.backend in ("triton", "reference"):
        pytest.skip("there is neither a CUDA nor a C++ kernel")
    y, *residuals = forward.forward(*expected.args, save=True)
    found = cuda.backward(expected.dy, *expected.args, *residuals, needs=[True] * 5)
    assert not violations(expected, [y, *found])
