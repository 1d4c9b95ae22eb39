"""Where a GPU's time goes in a forward of bert_fast: by kernel, and what is spent between them.

    python -m bench.profile [--model bert-base] [--workload squad/256] [--dtype int8] [--no-graphs]
    python -m bench.profile --training base [--side sdpa] --host   # a step of pre-training

Times are of a mean forward, or step. "back to back" is the time from one call to the next while
calls follow each other, "alone" from idle to idle; what the kernels' sum lacks of the first, the
GPU waited for. Kernels that a CUDA graph replays are counted too. `--host` tells what the processor
does meanwhile, op by op, slower than without a profiler.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bert_fast

from . import workloads
from .models import load
from .peers_torch import LastHidden
from .training_cases import SIDES, SIZES, batch_of, mlm_batches
from .training_gpu import Side

WARM_UPS, TIMED, PROFILED = 5, 20, 3
NAME = 90  # characters of a kernel's name that are shown


def wall_us(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(back to back, alone) of a call."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(WARM_UPS):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        run()
    synchronize()
    together = (time.perf_counter() - start) / TIMED
    alone = []
    for _ in range(TIMED):
        start = time.perf_counter()
        run()
        synchronize()
        alone.append(time.perf_counter() - start)
    return together * 1e6, sorted(alone)[TIMED // 2] * 1e6


def kernels(
    run: Callable[[], Any], device: torch.device, host: bool = False
) -> dict[str, tuple[float, float]]:
    """By name, how often in a call and for how many us in all; on a CPU, or `host`, ATen's ops."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(PROFILED):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    shown = on_gpu and not host
    kind = DeviceType.CUDA if shown else DeviceType.CPU
    count, total = Counter[str](), Counter[str]()
    for event in found.events():
        # A GPU's events have the spans of `record_function` too, which kernels fill.
        if event.device_type == kind and not (shown and event.is_user_annotation):
            count[event.name] += 1
            total[event.name] += (
                event.time_range.elapsed_us() if shown else event.self_cpu_time_total
            )
    return {name: (count[name] / PROFILED, us / PROFILED) for name, us in total.most_common()}


def encoder(name: str, dtype: str | None, graphs: bool, device: torch.device) -> LastHidden:
    model = load(workloads.MODELS[name]).to(device)
    found = LastHidden(model, "sdpa", torch.bfloat16 if device.type == "cuda" else torch.float32)
    bert_fast.accelerate(found, dtype=dtype, graphs=graphs)
    return found


def forward_of(options: argparse.Namespace, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """What a forward is called, and the forward."""
    workload = workloads.named(options.workload)
    texts = workloads.spread(workload.quantiles, workload.batch)
    shape = workloads.MODELS[options.model]
    batch = {k: v.to(device) for k, v in workloads.padded(shape.vocab, texts).items()}
    model = encoder(options.model, options.dtype, not options.no_graphs, device)

    def run() -> None:
        with torch.inference_mode():
            model(**batch)

    return f"{options.model} {options.dtype or ''} {workload.name}, {sum(texts)} tokens", run


def step_of(size: str, name: str, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """What a step of pre-training is called, and the step."""
    (batch,) = mlm_batches("wiki512", batch_of(size, "wiki512"), 1, SIZES[size].vocab)
    batch = {k: v.to(device) for k, v in batch.items()}
    side = Side(name, device, torch.bfloat16)
    side.prepare(size, [batch])
    tokens = workloads.real_tokens(batch)
    return f"training {size} by {name}, {tokens} tokens", partial(side.step, batch)


def show(rows: Mapping[str, tuple[float, float]], most: int, what: str, title: str) -> None:
    table = Table("us", "times", "us each", what)
    for name, (times, us) in list(rows.items())[:most]:
        table.add_row(f"{us:,.1f}", f"{times:.1f}", f"{us / times:,.2f}", name[:NAME])
    print(title)  # above the table: as its title it would be broken to the table's width
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--model", default="bert-base", choices=workloads.MODELS)
    parser.add_argument(
        "--workload", default="squad/256", help="of bench.workloads, /texts a batch"
    )
    parser.add_argument("--dtype", choices=("int8", "fp8"), help="of products with weights")
    parser.add_argument("--no-graphs", action="store_true", help="small batches run eagerly too")
    parser.add_argument("--rows", type=int, default=20, help="kernels that are shown (20)")
    parser.add_argument("--training", choices=SIZES, help="a step of training a model of this size")
    parser.add_argument("--side", default="bert_fast", choices=SIDES, help="who trains it")
    parser.add_argument("--host", action="store_true", help="what the processor does, too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.training:
        name, run = step_of(options.training, options.side, device)
    else:
        name, run = forward_of(options, device)
    together, alone = wall_us(run, device)
    rows = kernels(run, device)
    busy = sum(us for _, us in rows.values())
    title = (
        f"{name} on {device}: {together:,.0f} us back to back, {alone:,.0f} alone, "
        f"{busy:,.0f} in kernels"
    )
    show(rows, options.rows, "kernel", title)
    if options.host:
        found = kernels(run, device, host=True)
        busy = sum(us for _, us in found.values())
        show(found, options.rows, "op", f"the processor: {busy:,.0f} us")


if __name__ == "__main__":
    main()
