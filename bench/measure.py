"""How ops are measured: medians, ceilings of the machine, error against fp64."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.ops.products import has_native
from bert_fast.ops.registry import Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEDIANS = 5  # that a ceiling is the best of


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Clock:
    """Times calls on a device; `quick` gives each a quarter of the time."""

    device: torch.device
    quick: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median_ms(self, run: Callable[[], Any]) -> float:
        """The median time of one call."""
        return statistics.median(self.times_ms({"": run})[""])

    def times_ms(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Times of single calls; on a GPU by events, with the L2 cache flushed before each.

        On a CPU in turns, as what disturbs one disturbs its neighbours: each until it had its share
        of time, three times at least, 50 at most.
        """
        if self.device.type == "cuda":
            return {name: self._by_events(run) for name, run in runs.items()}
        share = 60.0 if self.quick else 250.0  # ms
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        waiting = dict(runs)
        while waiting:
            for name, run in list(waiting.items()):
                found = times[name]
                found.append(self.once_ms(run))
                if len(found) == 50 or (len(found) >= 3 and sum(found) > share):
                    del waiting[name]
        return times

    def _by_events(self, run: Callable[[], Any]) -> list[float]:
        flush = torch.empty(1 << 28, dtype=torch.int8, device=self.device)
        for _ in range(3):
            run()
        pairs = []
        for _ in range(5 if self.quick else 25):
            # A millisecond of writes: behind it the host is ahead of the GPU, or what Python takes
            # to launch a short kernel would be measured in its place.
            for _ in range(16):
                flush.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def once_ms(self, run: Callable[[], Any]) -> float:
        """The time of a call, from idle to idle."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3

    def ceilings(self, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
        """This machine's copy bandwidth (reads and writes counted) and matmul rate by dtype.

        A dtype that the CPU has no instructions for is computed in fp32, whose rate is its ceiling.
        The best of a few medians: a ceiling that was measured while others computed is too low.
        """

        def best_ms(run: Callable[[], Any]) -> float:
            return min(self.median_ms(run) for _ in range(MEDIANS))

        on_gpu = self.device.type == "cuda"
        elements, size = (1 << 30, 8192) if on_gpu else (1 << 27, 1536)
        source = torch.randint(-128, 127, (elements,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        copy = best_ms(lambda: target.copy_(source))
        found = {"copy_gb_per_s": 2 * elements / copy / 1e6}
        products: dict[torch.dtype, float] = {}
        for dtype in dtypes:
            inside = dtype if on_gpu or has_native(dtype) else torch.float32
            if inside not in products:
                a, b = (torch.randn(size, size, device=self.device).to(inside) for _ in range(2))
                products[inside] = best_ms(functools.partial(torch.matmul, a, b))
            found[f"matmul_{short(dtype)}_tflop_per_s"] = 2 * size**3 / products[inside] / 1e9
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


def widened(argument: Any) -> Any:
    """An op's argument in fp64."""
    if isinstance(argument, list):
        return [widened(one) for one in argument]
    floats = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floats else argument


class Yardstick:
    """The exact results of one op on some arguments, and those of the reference in its dtype."""

    def __init__(self, op: Op, args: tuple[Any, ...], backward: bool) -> None:
        self.op, self.args, self.backward = op, args, backward
        wide = tuple(map(widened, args))
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

    def step(self, run: Callable[..., Tensor]) -> Callable[[], Any]:
        """What is timed: the call, with the gradients of its output where there is a backward."""
        if not self.backward:
            return lambda: run(*self.args)
        leaves = self.leaves(self.args)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return lambda: torch.autograd.grad(run(*leaves), inputs, self.dy)

    def check(self, run: Callable[..., Tensor]) -> dict[str, Errors]:
        """Errors of the "output" of `run`, then of every gradient, by the argument's name."""
        found = self._results(run, self.args, self.dy)
        leaves = zip(self.op.names, self.leaves(self.args), strict=True)
        wanted = [n for n, a in leaves if isinstance(a, Tensor) and a.requires_grad]
        results = zip(["output", *wanted], found, self.exact, self.plain, strict=True)
        return {
            name: compare(got, exact, plain, 2.0 if name == "output" else 3.0)
            for name, got, exact, plain in results
        }

    def _results(self, run: Callable[..., Tensor], args: tuple[Any, ...], dy: Tensor) -> list[Any]:
        if not self.backward:
            with torch.inference_mode():
                return [run(*args)]
        leaves = self.leaves(args)
        y = run(*leaves)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]
