"""Every kernel of every op at named shapes: checked against fp64, then timed.

The baselines are in the same table: "reference" is eager PyTorch, "torch.compile" the reference
compiled. A rate is put beside the ceiling that was measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bert_fast.ops import OPS
from bert_fast.ops.backends import ISAS
from bert_fast.ops.registry import Op

from .cases import Case
from .measure import Clock, Yardstick, short
from .noise import spread_of_median, undisturbed
from .results import OpEntry, Run

COMPILED = "torch.compile"
IN_8_BITS = ("_int8", "_fp8")  # how such an op's name ends
Runner = Callable[..., Tensor]


def runners(op: Op, args: tuple[Any, ...], clock: Clock) -> dict[str, Runner | list[str]]:
    """By kernel: how to call it on these arguments, or why it cannot run."""
    found: dict[str, Runner | list[str]] = {}
    for kernel in op.kernels:
        why = kernel.why_not(*args)
        if kernel.backend == "triton" and clock.device.type == "cpu":
            why = ["Triton's interpreter is not timed"]
        name = kernel.backend
        if name in ISAS and any(better in ISAS and callable(found[better]) for better in found):
            why = why or ["the kernel of a better instruction set is timed"]
        found[name] = why or (lambda *values, name=name: op(*values, backend=name))
    return found


def bench_op(
    run: Run, case: Case, dtype: torch.dtype, clock: Clock, backward: bool, compiled: bool
) -> list[OpEntry]:
    """Checks, then times every kernel of one op at one shape, forward and with its backward."""
    op, args = OPS[case.op], case.make()
    flop, moved = op.cost(*args)
    entries: list[OpEntry] = []
    if clock.device.type == "cuda" and all(kernel.why_not(*args) for kernel in op.kernels[:-1]):
        return entries  # an op of CPUs
    for step in ("forward", "forward_backward")[: 1 + backward]:
        try:
            yardstick = Yardstick(op, args, step != "forward")
        except Exception as error:  # the memory may not suffice for fp64
            entry = OpEntry(op.name, case.name, short(dtype), "reference", step, flop, moved)
            entries.append(_failed(run, entry, error))
            continue
        ready = runners(op, yardstick.leaves(args), clock)
        if compiled and step == "forward" and op.name not in ("attention", "pool"):
            # Those two loop over sequences in the reference: a graph for every batch.
            torch._dynamo.reset()
            ready[COMPILED] = torch.compile(op.reference, dynamic=False)
        timed = {}
        for name, call in ready.items():
            entry = OpEntry(op.name, case.name, short(dtype), name, step, flop, moved)
            entries.append(entry)
            if isinstance(call, list):
                entry.failed = "; ".join(call)
                continue
            try:
                _check(entry, yardstick, call)
            except Exception as error:
                _failed(run, entry, error)
            if not entry.failed:
                timed[name] = yardstick.step(call)
        here = [e for e in entries if e.step == step and e.kernel in timed]
        try:
            with torch.inference_mode(step == "forward"):
                times = undisturbed(partial(clock.times_ms, timed))
        except Exception as error:
            for entry in here:
                _failed(run, entry, error)
        else:
            for entry in here:
                entry.ms = statistics.median(times[entry.kernel])
                entry.spread = spread_of_median(times[entry.kernel])
                if step == "forward":
                    _rates(run, entry)
    return entries


def _failed(run: Run, entry: OpEntry, error: Exception) -> OpEntry:
    wrong = isinstance(error, WrongError)
    entry.failed = f"{'wrong' if wrong else type(error).__name__}: {error}"[:300]
    run.failed.append(entry.failure)
    return entry


class WrongError(Exception):
    """A result is off by more than is allowed."""


def _check(entry: OpEntry, yardstick: Yardstick, call: Runner) -> None:
    """Raises: WrongError, which names what is off: the output, or the gradient of an argument."""
    errors = yardstick.check(call)
    entry.error, entry.budget = errors["output"].error, errors["output"].budget
    off = [
        f"{name} has error {e.error:.2e} over budget {e.budget:.2e}"
        for name, e in errors.items()
        if not e.holds
    ]
    # The compiled reference is a peer, not ours: its rounding is its own.
    if off and entry.kernel != COMPILED:
        raise WrongError(", ".join(off))


def _rates(run: Run, entry: OpEntry) -> None:
    assert entry.ms is not None
    entry.gb_per_s = entry.bytes / entry.ms / 1e6
    entry.tflop_per_s = entry.flop / entry.ms / 1e9
    copy = run.ceilings.get("copy_gb_per_s")
    matmul = run.ceilings.get(f"matmul_{entry.dtype}_tflop_per_s")
    # There is no ceiling of 8-bit products.
    if copy and matmul and not entry.op.endswith(IN_8_BITS):
        least_ms = max(entry.bytes / copy / 1e6, entry.flop / matmul / 1e9)
        entry.share = least_ms / entry.ms


def bench_ops(
    run: Run,
    cases: Iterable[tuple[Case, torch.dtype, bool]],
    clock: Clock,
    seconds: float,
    compiled: bool,
    tell: Callable[[str], None],
) -> Iterable[None]:
    """Fills `run.ops` case by case until the time is up; yields after each."""
    deadline = time.monotonic() + seconds
    for case, dtype, backward in cases:
        if time.monotonic() > deadline:
            run.missing.setdefault("ops", "the time was up: the last cases were left out")
            return
        entries = bench_op(run, case, dtype, clock, backward, compiled)
        run.ops += entries
        tell(told(entries))
        yield


def told(entries: list[OpEntry]) -> str:
    """One line for one op at one shape."""
    if not entries:
        return "no kernel of ours"
    first, cells = entries[0], []
    for e in entries:
        step = "" if e.step == "forward" else "+bwd"
        if e.ms is not None:
            share = f" ({e.share:.0%})" if e.share else ""
            cells.append(f"{e.kernel}{step} {e.ms * 1e3:,.0f}us{share}")
        elif e.failed and e.failed.startswith("wrong"):
            cells.append(f"{e.kernel}{step} WRONG")
    return f"{first.op:16} {first.case:26} {first.dtype}  " + "  ".join(cells)
