"""Steps of pre-training as a GPU takes them: rates, memory, and their share of its matmul rate.

BertForPreTraining with weights in fp32 under autocast to bf16, and a fused AdamW: as Hugging Face's
Trainer has it with `bf16=True`. The sides take turns on the same batches, after their values hold.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from . import workloads
from .measure import Clock, short
from .training_cases import COMPILED, SIDES, SIZES, batch_of, mlm_batches, step_flop, untrained

# Relative, beside the first side. The loss of an untrained model says little of its encoder; the
# gradient of the first layer has come through all of them. On a CPU those of two sides in bf16
# differ by 0.005, with 4 layers.
LOSS, GRADIENT = 2e-2, 0.1
CHECKED = "layer.0.intermediate.dense.weight"

Batch = Mapping[str, Tensor]


@dataclass
class Side:
    """held: bytes of weights and the optimizer's state; peak: the most in a step, with `held`;
    mallocs: calls of cudaMalloc and cudaFree, which wait for the GPU, in the timed steps."""

    name: str
    device: torch.device
    dtype: torch.dtype
    model: Any = None
    optimizer: Any = None
    held: int = 0
    peak: int = 0
    mallocs: int = 0
    seconds: list[float] = field(default_factory=list)
    loss: float | None = None
    gradient: Tensor | None = None
    failed: str | None = None

    def prepare(self, size: str, batches: Sequence[Batch]) -> None:
        before = self.allocated()
        self.model = SIDES[self.name](untrained(size, self.name, self.device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.check(batches[0])
        for batch in batches:  # each has a shape of its own, whose first step loads and allocates
            self.step(batch)
        self.held = self.allocated() - before

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            return self.model(**batch).loss

    def step(self, batch: Batch) -> None:
        self.forward(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, batch: Batch) -> None:
        """Finds loss and gradient without dropout."""
        if self.name == COMPILED:  # whose backward would be compiled for this alone
            self.model.eval()
            with torch.no_grad():
                self.loss = self.forward(batch).item()
            self.model.train()
            return
        rates = {m: m.p for m in self.model.modules() if isinstance(m, nn.Dropout)}
        for module in rates:
            module.p = 0.0
        loss = self.forward(batch)
        loss.backward()
        for module, p in rates.items():
            module.p = p
        (weight,) = (p for name, p in self.model.named_parameters() if name.endswith(CHECKED))
        self.loss, self.gradient = loss.item(), weight.grad.float().cpu()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, batch: Batch, clock: Clock) -> None:
        before = self.allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.mallocs -= self.asked_of_cuda()
        self.seconds.append(clock.once_ms(partial(self.step, batch)) / 1e3)
        if self.device.type == "cuda":
            self.mallocs += self.asked_of_cuda()
            above = torch.cuda.max_memory_allocated(self.device) - before
            self.peak = max(self.peak, above + self.held)

    def asked_of_cuda(self) -> int:
        stats = torch.cuda.memory_stats(self.device)
        return int(stats["num_device_alloc"] + stats["num_device_free"])

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def fail(self, why: str) -> None:
        """Its memory is for the others."""
        self.failed, self.seconds = why[:300], []
        self.model = self.optimizer = None
        gc.collect()


def measure(
    device: torch.device,
    sizes: Sequence[str],
    sides: Sequence[str],
    steps: int,
    quick: bool,
    *,
    lengths: str = "wiki512",
    batch: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterable[dict[str, Any]]:
    """One row for each size and side, of plain values; one that failed says why.

    dtype: fp32 is without autocast. batch: texts a step, `batch_of` where it is None.
    """
    clock = Clock(device, quick)
    ceiling = clock.ceilings([dtype])[f"matmul_{short(dtype)}_tflop_per_s"]
    for size in sizes:
        texts = batch or batch_of(size, lengths)
        batches = mlm_batches(lengths, texts, steps, SIZES[size].vocab)
        about = {"model": size, "lengths": lengths, "batch": texts, "steps": steps,
                 "dtype": short(dtype), "ceiling_tflop_per_s": ceiling}  # fmt: skip
        ran = [Side(name, device, dtype) for name in sides]
        _run(ran, size, [{k: v.to(device) for k, v in b.items()} for b in batches], clock)
        flop = [step_flop(SIZES[size], b) for b in batches]
        tokens = [workloads.real_tokens(b) for b in batches]
        rows = [about | _row(side, ran[0], tokens, flop, texts, ceiling) for side in ran]
        del ran  # the next size needs the memory
        gc.collect()
        yield from rows


def _run(sides: Sequence[Side], size: str, batches: Sequence[Batch], clock: Clock) -> None:
    """Builds and checks the sides, then times them in turns; who begins changes."""
    for side in sides:
        try:
            side.prepare(size, batches)
        except Exception as error:  # a side's failure is its own
            side.fail(f"{type(error).__name__}: {error}")
            continue
        if off := wrong(side, sides[0]):
            side.fail(f"wrong: {off}")
    for i, batch in enumerate(batches):
        for side in (*sides[i % len(sides) :], *sides[: i % len(sides)]):
            if side.failed:
                continue
            try:
                side.timed(batch, clock)
            except Exception as error:
                side.fail(f"{type(error).__name__}: {error}")


def wrong(side: Side, first: Side) -> str | None:
    """What of a side's values is off beside the first's; None where that has none."""
    if first.failed or first.loss is None or side.loss is None:
        return None
    if not abs(side.loss - first.loss) <= LOSS * abs(first.loss):  # NaN is wrong too
        return f"the loss is {side.loss:.4g}, that of {first.name} {first.loss:.4g}"
    if side.gradient is None or first.gradient is None:
        return None
    off = float((side.gradient - first.gradient).norm() / first.gradient.norm())
    return None if off <= GRADIENT else f"a gradient is off by {off:.2g} beside {first.name}"


def _row(
    side: Side, first: Side, tokens: Sequence[int], flop: Sequence[float], texts: int, most: float
) -> dict[str, Any]:
    """compared: whether the first had values to compare with; ratio: this side's time over the
    first's, step by step, None where that failed; share: of the matmul rate."""
    row: dict[str, Any] = {"side": side.name, "beside": first.name, "loss": side.loss,
                           "compared": first.loss is not None,
                           "failed": side.failed, "seconds": side.seconds}  # fmt: skip
    if side.failed:
        return row
    ms = 1e3 * statistics.median(side.seconds)
    rate = statistics.median(f / s for f, s in zip(flop, side.seconds, strict=True)) / 1e12
    per_s = statistics.median(n / s for n, s in zip(tokens, side.seconds, strict=True))
    ratios = [a / b for a, b in zip(side.seconds, first.seconds, strict=False)]
    row |= {"tokens": sum(tokens), "ms": ms, "tokens_per_s": per_s,
            "sequences_per_s": 1e3 * texts / ms, "tflop_per_s": rate, "share": rate / most,
            "peak_mb": side.peak / 2**20 or None, "mallocs": side.mallocs,
            "ratio": statistics.median(ratios) if ratios else None}  # fmt: skip
    return row


def told(row: Mapping[str, Any]) -> str:
    """One line for one side."""
    head = f"training {row['model']} {row['lengths']} {row['dtype']} {row['side']}: "
    return head + (f"failed: {row['failed']}" if row["failed"] else ", ".join(_cells(row)))


def _cells(row: Mapping[str, Any]) -> list[str]:
    peak = f"{row['peak_mb']:,.0f} MiB" if row["peak_mb"] else "memory not measured"
    ratio = f"{row['ratio']:.3f} of {row['beside']}'s" if row["ratio"] else "beside none"
    return [
        f"{row['ms']:.1f} ms", ratio,
        f"{row['tokens_per_s']:,.0f} tokens/s", f"{row['sequences_per_s']:,.0f} sequences/s",
        f"{row['share']:.1%} of the matmul rate", peak,
    ]  # fmt: skip


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    found = Table("model", "side", "a step", "ratio", "tokens", "sequences", "FLOPs", "peak")
    for row in rows:
        cells = [str(row["failed"])] if row["failed"] else _cells(row)
        found.add_row(row["model"], row["side"], *cells)
    return found
