"""Every CUDA C++ kernel, on the samples of its op, under NVIDIA's compute-sanitizer.

    python -m bench.sanitizer [--tools memcheck,racecheck,...] [--ops attention,...] [--seconds N]
        [--out FILE.json]

The tools run at once, each in a process of its own, and look at our kernels alone. With initcheck
goes `control`, calls on memory that nobody wrote: unless they are reported, nothing was looked at.
Where a tool itself breaks down in an op, `--ops` has it look at the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, is_tensor

from bert_fast.ops import OPS
from bert_fast.ops.backends import FLOATS, cuda_kernel
from bert_fast.ops.registry import Kernel, Op

from .results import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CUDA_BIN = "/usr/local/cuda/bin"
FILTER = "kns=bert_fast"  # the namespace, which is in the mangled name of every kernel of ours
LARGEST = 2_000_000  # elements of a tensor: under a tool, samples of more would take minutes


def own_kernel(op: Op, backend: str) -> Kernel | None:
    """The op's kernel, with its own backward even where Triton's is the one that trains."""
    kernel = next((k for k in op.kernels if k.backend == backend), None)
    if kernel is None or kernel.backward_by is None:
        return kernel
    has = hasattr(torch.ops.bert_fast_cuda, f"{op.name}_backward")
    return replace(kernel, backward=cuda_kernel(op.name).backward if has else None)


def calls(op: Op, kernel: Kernel, args: list[Any]) -> int:
    """Calls the kernel for inference and for training; returns how often."""
    named = zip(args, op.names, strict=True)
    leaves = [a.requires_grad_() for a, n in named if n in op.differentiable and a is not None]
    with torch.no_grad():
        op(*args, backend=lambda *_: kernel).cpu()  # a copy, so that initcheck sees gaps in y
    y = op(*args, backend=lambda *_: kernel)
    y.detach().cpu()
    if kernel.backward is not None:
        torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype).to(y.device))
    if y.is_cuda:
        torch.cuda.synchronize()
    return 2 + (kernel.backward is not None)


def inside(
    which: str, device: str = "cuda", backend: str = "cuda", chosen: Sequence[str] = ()
) -> int:
    """Runs the kernels in this process; returns 1 if there is one that no sample ran."""
    ops = {op: kernel for op in chosen or OPS if (kernel := own_kernel(OPS[op], backend))}
    counts, skipped = dict.fromkeys(ops, 0), 0
    # Made on the host, and contiguous there: initcheck sees no writes of PyTorch's kernels, which
    # the filter leaves out, and would take for garbage what they made.
    move = torch.empty_like if which == "control" else Tensor.to
    for op in ["add_layernorm"] if which == "control" else ops:
        for s, dtype in ((s, d) for d in FLOATS for s in OPS[op].samples(torch.device("cpu"), d)):
            small = all(a.numel() <= LARGEST for a in s.args if is_tensor(a))
            args = [move(a.contiguous(), device=device) if is_tensor(a) else a for a in s.args]
            fits = small and not ops[op].why_not(*args)
            if fits:
                print(f"calling {op}, {s.name}, {dtype}", flush=True)  # the last may be its death
                counts[op] += calls(OPS[op], ops[op], args)
            skipped += not fits
    print(f"checked {sum(counts.values())} calls: {counts}; skipped {skipped} samples", flush=True)
    return 0 if counts and (which == "control" or all(counts.values())) else 1


def check(sanitizer: str, name: str, seconds: float, ops: str = "") -> dict[str, Any]:
    """What a tool, or the control, found; `failed` is why that is no pass, or None."""
    line = f"timeout -s KILL {seconds} {sanitizer} --kernel-name {FILTER} --error-exitcode 99"
    line += f" --tool {'initcheck' if name == 'control' else name} --show-backtrace device"
    # All run at once, and are slow to start. Of torch's calls of the driver some fail, by design.
    line += f" --port {49_152 + 16 * [*TOOLS, 'control'].index(name)} --launch-timeout 120"
    line += " --report-api-errors no" if name == "memcheck" else ""
    line += f" {sys.executable} -m bench.sanitizer --inside {name}"
    line += f" --ops {ops}" if ops and name != "control" else ""
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has ends of its own
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out:  # a pipe waits for all that hold it
        code = subprocess.run(line.split(), cwd=ROOT, env=env, stdout=out, stderr=out).returncode
        out.seek(0)
        told, took = out.read(), time.monotonic() - start
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+).*", told)
    called = re.search(r"^checked (\d+) calls", told, re.MULTILINE)
    calling = re.findall(r"^calling (.*)", told, re.MULTILINE)
    found = bool(summary and int(summary[1]))
    seen = "Uninitialized __global__" in told  # by a kernel; a copy has other words
    reasons = {
        f"stopped after {seconds:g} s": took >= seconds,
        "did not run to its end": not (summary and called) or "Internal Sanitizer Error" in told,
        "what was planted is not seen": name == "control" and not (found and seen),
        "found errors": name != "control" and (found or code != 0),
    }
    failed = next((why for why, holds in reasons.items() if holds), None)
    number, said = int(called[1]) if called else 0, summary[0] if summary else None
    return {"failed": failed, "exit_code": code, "summary": said, "seconds": round(took, 1),
            "calls": number, "died_in": None if called or not calling else calling[-1],
            "output": told if failed else ""}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitizer", description=__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help="with commas between them")
    parser.add_argument("--ops", default="", help="these alone, with commas between them")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each tool (240)")
    parser.add_argument("--out", type=Path, help="a JSON file with what is printed")
    parser.add_argument("--inside", nargs="?", const="all", help="without a tool, in this process")
    options = parser.parse_args(arguments)
    chosen = options.ops.split(",") if options.ops else []
    if not set(chosen) <= set(OPS):
        parser.error(f"--ops is {options.ops}, expected some of {', '.join(OPS)}")
    if options.inside:
        code = inside(options.inside, chosen=chosen)
        # All is done and told. Under a tool the destructors of static objects may find a thread
        # that still runs, and abort: an exit code that no kernel has earned.
        sys.stdout.flush()
        os._exit(code)
    names = options.tools.split(",")
    if not set(names) <= set(TOOLS):
        parser.error(f"--tools is {options.tools}, expected some of {', '.join(TOOLS)}")
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA_BIN}")
    if sanitizer is None:
        parser.exit(1, f"compute-sanitizer is neither on PATH nor in {CUDA_BIN} (CUDA toolkit)\n")
    names += ["control"] if "initcheck" in names else []
    with ThreadPoolExecutor(len(names)) as pool:
        run = functools.partial(check, sanitizer, seconds=options.seconds, ops=options.ops)
        rows = list(pool.map(run, names))
    for name, row in zip(names, rows, strict=True):
        short = {**row, "output": row["output"][-4_000:]}  # the whole of it is in the file
        print(f"{name}:", *(f"{key} {value};" for key, value in short.items()))
    if options.out:
        options.out.write_text(json.dumps(dict(zip(names, rows, strict=True)), indent=1) + "\n")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
