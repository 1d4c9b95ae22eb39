"""How ops are measured: medians, ceilings of the machine, error against fp64."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.ops.registry import Op


def short(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@dataclass(frozen=True)
class Clock:
    """Times calls on a device; `quick` runs each only a few times, to exercise the code."""

    device: torch.device
    quick: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median_ms(self, run: Callable[[], Any]) -> float:
        """The median time of one call; on a GPU by events, with the L2 cache flushed before."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            rep = 5 if self.quick else 40
            return float(do_bench(run, warmup=rep // 4, rep=rep, return_mode="median"))
        first = self.once_ms(run)
        count = 3 if self.quick else max(3, min(30, int(200 / max(first, 1e-3))))
        return statistics.median(self.once_ms(run) for _ in range(count))

    def once_ms(self, run: Callable[[], Any], calls: int = 1) -> float:
        """The mean time of `calls` calls in a row, from idle to idle."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / calls

    def ceilings(self, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
        """This machine's copy bandwidth (reads and writes counted) and matmul rate by dtype."""
        on_gpu = self.device.type == "cuda"
        elements, size = (1 << 30, 8192) if on_gpu else (1 << 27, 1536)
        if self.quick:
            elements, size = 1 << 22, 512
        source = torch.randint(-128, 127, (elements,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        copy = self.median_ms(lambda: target.copy_(source))
        found = {"copy_gb_per_s": 2 * elements / copy / 1e6}
        for dtype in dtypes:
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            product = self.median_ms(functools.partial(torch.matmul, a, b))
            found[f"matmul_{short(dtype)}_tflop_per_s"] = 2 * size**3 / product / 1e9
        return found


@dataclass(frozen=True)
class Errors:
    """Error of one result, and what is allowed, both as the largest absolute difference."""

    error: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.error <= self.budget  # false for NaN


def ulp(scale: float, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale else 0.0


def compare(found: Tensor, exact: Tensor, plain: Tensor, factor: float) -> Errors:
    """Against fp64: `factor` times the error of same-dtype PyTorch, plus one ulp of the largest."""
    if not exact.numel():
        return Errors(0.0, 0.0)
    yardstick = (plain.double() - exact).abs().max().item()
    budget = factor * yardstick + ulp(exact.abs().max().item(), found.dtype)
    return Errors((found.double() - exact).abs().max().item(), budget)


class Yardstick:
    """The exact results of one op on some arguments, and those of the reference in its dtype."""

    def __init__(self, op: Op, args: tuple[Any, ...], backward: bool) -> None:
        self.op, self.args, self.backward = op, args, backward
        wide = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        with torch.no_grad():
            shape = op.reference(*args).shape
        lead = args[op.names.index(op.lead)]
        self.dy = torch.randn(shape, device=lead.device).to(lead.dtype)
        self.exact = self._results(op.reference, wide, self.dy.double())
        self.plain = self._results(op.reference, args, self.dy)

    def leaves(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, the differentiable ones as leaves that require a gradient."""
        return tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) and name in self.wanted else a
            for name, a in zip(self.op.names, args, strict=True)
        )

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.op.differentiable if self.backward else ()

    def check(self, run: Callable[..., Tensor]) -> list[Errors]:
        """Errors of the output and of every gradient of `run`."""
        found = self._results(run, self.args, self.dy)
        return [
            compare(got, exact, plain, 3.0 if i else 2.0)
            for i, (got, exact, plain) in enumerate(zip(found, self.exact, self.plain, strict=True))
        ]

    def _results(self, run: Callable[..., Tensor], args: tuple[Any, ...], dy: Tensor) -> list[Any]:
        if not self.backward:
            with torch.inference_mode():
                return [run(*args)]
        leaves = self.leaves(args)
        y = run(*leaves)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]
