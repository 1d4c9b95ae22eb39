"""Where a GPU's time goes in a forward of bert_fast: by kernel, and what is spent between them.

    python -m bench.profile [--model bert-base] [--workload squad/256] [--dtype int8] [--no-graphs]

Times are of a mean forward. "back to back" is the time from one call to the next while calls follow
each other, "alone" from idle to idle; what the kernels' sum lacks of the first, the GPU waited for.
Kernels that a CUDA graph replays are counted too.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
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


def kernels(run: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, float]]:
    """By name, how often in a call and for how many us in all; on a CPU the ops of ATen."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(PROFILED):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    count, total = Counter[str](), Counter[str]()
    for event in found.events():
        if event.device_type == kind:
            count[event.name] += 1
            total[event.name] += (
                event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            )
    return {name: (count[name] / PROFILED, us / PROFILED) for name, us in total.most_common()}


def encoder(name: str, dtype: str | None, graphs: bool, device: torch.device) -> LastHidden:
    model = load(workloads.MODELS[name]).to(device)
    found = LastHidden(model, "sdpa", torch.bfloat16 if device.type == "cuda" else torch.float32)
    bert_fast.accelerate(found, dtype=dtype, graphs=graphs)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--model", default="bert-base", choices=workloads.MODELS)
    parser.add_argument(
        "--workload", default="squad/256", help="of bench.workloads, /texts a batch"
    )
    parser.add_argument("--dtype", choices=("int8", "fp8"), help="of products with weights")
    parser.add_argument("--no-graphs", action="store_true", help="small batches run eagerly too")
    parser.add_argument("--rows", type=int, default=20, help="kernels that are shown (20)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = workloads.named(options.workload)
    texts = workloads.spread(workload.quantiles, workload.batch)
    shape = workloads.MODELS[options.model]
    batch = {k: v.to(device) for k, v in workloads.padded(shape.vocab, texts).items()}
    model = encoder(options.model, options.dtype, not options.no_graphs, device)
    with torch.inference_mode():
        together, alone = wall_us(lambda: model(**batch), device)
        rows = kernels(lambda: model(**batch), device)
    busy = sum(us for _, us in rows.values())
    title = (
        f"{options.model} {options.dtype or ''} {workload.name}, {sum(texts)} tokens on {device}: "
        f"{together:,.0f} us back to back, {alone:,.0f} alone, {busy:,.0f} in kernels"
    )
    table = Table("us", "times", "us each", "kernel", title=title)
    for name, (times, us) in list(rows.items())[: options.rows]:
        table.add_row(f"{us:,.1f}", f"{times:.1f}", f"{us / times:,.2f}", name[:NAME])
    Console().print(table)


if __name__ == "__main__":
    main()
