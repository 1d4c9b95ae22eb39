"""What only large inputs reach of a GPU's kernels: tiles and loops that no sample of an op has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.ops import OPS

from .parity import DEVICE, results, trainable, truth_of, violations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="Triton's interpreter would take minutes"),
]


class Draw:
    """Random arguments, the same in every run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)
        self.seed = torch.tensor([31337 << 20], device=DEVICE)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator) * scale
        return drawn.to(DEVICE, self.dtype)

    def attention(
        self,
        lengths: Sequence[int],
        width: int,
        p: float = 0.0,
        skip: Sequence[int] = (),
        biased: bool = False,
    ) -> tuple[Any, ...]:
        """skip: of each sequence, how many first rows are no keys.

        biased: with a bias that forbids some keys, all of one query, and hides all of another by
            numbers that are finite.
        """
        bounds = torch.tensor((0, *lengths), device=DEVICE).cumsum(0)
        starts = None
        if skip:
            starts = (bounds[:-1] + torch.tensor(skip, device=DEVICE)).int()
        qkv, bias = self(sum(lengths), 3, 2, width), None
        if biased:
            bias = self(len(lengths), 2, max(lengths), max(lengths))
            bias[bias > 1.0] = -torch.inf
            bias[:, :, 1], bias[:, :, 2] = -torch.inf, torch.finfo(self.dtype).min
        seed = self.seed if p else None
        return qkv, bounds.int(), starts, bias, max(lengths), width**-0.5, p, seed

    def rows(self, count: int, width: int, p: float = 0.0) -> tuple[Any, ...]:
        """Of add_layernorm."""
        x, residual = self(count, width), self(count, width)
        bias, weight, shift = (self(width) for _ in range(3))
        return x, bias, residual, weight, shift, 1e-12, p, self.seed if p else None

    def embeddings(self, count: int, width: int, p: float) -> tuple[Any, ...]:
        ids = torch.randint(50, (3, count), generator=self.generator).to(DEVICE)
        tables = (self(50, width), self(50, width), self(2, width))
        norm = (self(width), self(width), 1e-12)
        return ids[0], ids[1] % 2, ids[2], *tables, *norm, 0, p, self.seed

    def linear(self, rows: int, depth: int, cols: int) -> tuple[Any, ...]:
        return self(rows, depth), self(cols, depth, scale=depth**-0.5), self(cols)


CASES = {
    "attention of two tiles": ("attention", lambda d: d.attention((150, 20), 64)),
    # Enough for 32 query rows a warp; of some tiles only the first rows are there.
    "attention of many": ("attention", lambda d: d.attention((150, 20, 129, 70, 64) * 8, 64)),
    "attention of many, narrow": (
        "attention", lambda d: d.attention((150, 20, 256, 1) * 9, 32, skip=(1, 0, 130, 0) * 9)),
    "attention of wide heads": ("attention", lambda d: d.attention((140, 3), 128)),
    "attention with dropout": ("attention", lambda d: d.attention((200, 70), 64, p=0.1)),
    "attention with dropout, wide": ("attention", lambda d: d.attention((200, 70), 128, p=0.1)),
    "attention with hidden keys": (
        "attention", lambda d: d.attention((150, 90, 1), 32, p=0.25, skip=(1, 0, 1))),
    "attention with a bias": ("attention", lambda d: d.attention((150, 90), 64, biased=True)),
    "attention with a bias, wide": (
        "attention", lambda d: d.attention((150, 90), 128, skip=(1, 0), biased=True)),
    "attention with a bias and dropout": (
        "attention", lambda d: d.attention((150, 90), 64, p=0.1, biased=True)),
    "add_layernorm of few, wide rows": ("add_layernorm", lambda d: d.rows(130, 1000)),
    "add_layernorm of wide rows": ("add_layernorm", lambda d: d.rows(9, 4104)),
    "add_layernorm of many rows": ("add_layernorm", lambda d: d.rows(4100, 64, p=0.1)),
    "embed_layernorm of many rows": ("embed_layernorm", lambda d: d.embeddings(4100, 64, p=0.1)),
    "add_layernorm by streams": ("add_layernorm", lambda d: d.rows(2500, 768)),
    "add_layernorm by streams, wide": ("add_layernorm", lambda d: d.rows(2500, 1024, p=0.1)),
    "add_layernorm by streams, wide and many": ("add_layernorm", lambda d: d.rows(16_500, 1024)),
    "embed_layernorm by streams": ("embed_layernorm", lambda d: d.embeddings(2500, 1024, p=0.1)),
    "embed_layernorm of more than 30 rows a warp": (
        "embed_layernorm", lambda d: d.embeddings(70_000, 768, p=0.1)),
    "linear": ("linear", lambda d: d.linear(4096, 512, 2304)),
    "linear_gelu": ("linear_gelu", lambda d: (*d.linear(4096, 512, 2304), "gelu")),
    "linear_gelu of few rows": ("linear_gelu", lambda d: (*d.linear(500, 768, 3072), "gelu")),
    "linear_gelu of fewer": ("linear_gelu", lambda d: (*d.linear(70, 768, 3072), "gelu")),
    "linear_fp8": ("linear_fp8", lambda d: d.linear(4096, 512, 2304)),
    "linear_row_int8": ("linear_row_int8", lambda d: (*d.linear(4096, 512, 2304), "gelu")),
    "feed_forward_fp8": ("feed_forward_fp8", lambda d: (
        *d.linear(4096, 512, 2048), d(512, 2048, scale=0.02), "gelu")),
}  # fmt: skip


IN_FP32 = [name for name in CASES if "by streams" in name]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in CASES]
    + [(case, torch.float32) for case in IN_FP32],
    ids=str,
)
def test_large(case: str, dtype: torch.dtype) -> None:
    name, make = CASES[case]
    op, args = OPS[name], make(Draw(dtype))
    expected = truth_of(op, args)
    for backend in (kernel.backend for kernel in op.kernels if not kernel.why_not(*args)):
        wanted = trainable(op, backend, args)
        found = results(op, lambda *a, b=backend: op(*a, backend=b), args, expected.dy, wanted)
        assert not violations(expected, found, wanted), backend
