"""Compiles every Triton kernel for GPUs that need not be present, and refuses spills.

    python -m bert_fast.aot [--quick] [--targets sm90,gfx942] [--dtypes bf16] [--json OUT]

Each op's own launch code is run on meta tensors (the `samples` of its kernels reach every shipped
config) under a stand-in driver that names the target, so what is compiled here is what a launch
there would compile. The table tells registers, spilled bytes (registers on AMD) and shared memory;
the exit status is 1 if a kernel spills more than SLACK or wants more shared memory than the target
has. `--quick` is for CI: every kernel for sm90, in bf16 at two of the main shapes and in fp32 at
one, and for gfx942 in bf16 at one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from rich.progress import track

from .console import log

# tf32 is float32 with torch's own permission to round the factors of a product
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32"}
# name: (backend, arch, threads of a warp, shared memory of a block in bytes)
TARGETS = {
    "sm80": ("cuda", 80, 32, 166912),
    "sm90": ("cuda", 90, 32, 232448),
    "sm100": ("cuda", 100, 32, 232448),
    "sm120": ("cuda", 120, 32, 101376),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
# Which of a kernel's main samples a quick run compiles; the last has the largest tiles.
QUICK = {
    ("sm90", "bf16"): (0, -1),
    ("sm90", "fp32"): (-1,),
    ("gfx942", "bf16"): (-1,),
}
# Spilled bytes (registers on AMD) that are no fault: ptxas parks a value or two in order to end on
# a register count that lets one more block run, which it deems the better bargain.
SLACK = 32


@dataclass(frozen=True)
class Unit:
    """What one process compiles at a time."""

    module: str
    target: str
    dtype: str
    full: bool  # every sample, or the main ones
    only: tuple[int, ...] = ()  # some of those


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    target: str
    dtype: str
    kernel: str  # module.function
    config: str
    sample: str
    registers: int
    spills: int
    shared: int
    milliseconds: int
    binary: str  # hash of source, signature and options

    def faults(self) -> list[str]:
        limit = TARGETS[self.target][3]
        found = []
        if self.spills > SLACK:
            found.append(f"spills {self.spills}")
        if self.shared > limit:
            found.append(f"wants {self.shared} B of shared memory, {self.target} has {limit}")
        return found


class _Driver:
    """Tells Triton's launcher which GPU it would be launching on."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[name][:3])
        self.index = list(TARGETS).index(name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index  # launch caches are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def modules() -> list[str]:
    """The modules of `bert_fast._triton`."""
    import bert_fast._triton as package

    return sorted(found.name for found in pkgutil.iter_modules(package.__path__))


def _record(unit: Unit) -> list[tuple[str, Any, dict[str, Any]]]:
    """(sample, kernel, compile arguments) of every launch of a module's samples, once each."""
    import torch
    import triton

    from bert_fast._triton import tiles

    module = importlib.import_module(f"bert_fast._triton.{unit.module}")
    if not hasattr(module, "forward"):
        return []
    jobs: dict[Any, tuple[str, Any, dict[str, Any]]] = {}
    launches: list[tuple[Any, Any, dict[str, Any]]] = []

    def hook(*, key: Any, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        launches.append(((fn.name, str(key)), fn.jit_function, compile))
        return True  # recorded: neither compile nor launch

    dtype, device = getattr(torch, DTYPES[unit.dtype]), torch.device("meta")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if unit.dtype == "tf32" else "ieee"
    triton.runtime.driver.set_active(_Driver(unit.target))
    triton.knobs.runtime.jit_cache_hook = hook
    tiles.family.cache_clear()
    samples = list(module.samples(dtype, device, unit.full))
    if unit.only:
        samples = [samples[i] for i in unit.only if samples]
    for label, args in samples:
        y, *residuals = module.forward(*args, save=True)
        if unit.module == "attention":
            residuals = [y, *residuals]  # its backward takes the output too
        if hasattr(module, "backward"):
            module.backward(torch.empty_like(y), *args, *residuals, needs=[True] * len(args))
        for key, kernel, found in launches:
            jobs.setdefault(key, (label, kernel, found))
        launches.clear()
    triton.knobs.runtime.jit_cache_hook = None
    return list(jobs.values())


def _compile(unit: Unit) -> list[Row]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    target = GPUTarget(*TARGETS[unit.target][:3])
    rows = []
    for sample, kernel, found in _record(unit):
        options = {name: found[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        source = ASTSource(kernel, found["signature"], found["constants"], found["configs"][0])
        begin = time.perf_counter()
        compiled = triton_compile(source, target=target, options=options)
        milliseconds = int(1e3 * (time.perf_counter() - begin))
        registers, spills = _resources(compiled.asm)
        names = [kernel.arg_names[path[0]] for path in found["constants"]]
        constants = zip(names, found["constants"].values(), strict=True)
        config = [f"{name}={value}" for name, value in constants if name.isupper()]
        config += [f"{name}={options[name]}" for name in ("num_warps", "num_stages")]
        row = Row(
            target=unit.target,
            dtype=unit.dtype,
            kernel=f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}",
            config=" ".join(config),
            sample=sample,
            registers=registers,
            spills=spills,
            shared=compiled.metadata.shared,
            milliseconds=milliseconds,
            binary=compiled.hash,
        )
        rows.append(row)
    return rows


def _resources(asm: Any) -> tuple[int, int]:
    """(registers, spilled bytes or registers) of a compiled kernel."""
    import triton

    if "amdgcn" in asm:
        numbers = {
            name: int(value)
            for name, value in re.findall(r"\.((?:vgpr|sgpr)_\w+):\s+(\d+)", asm["amdgcn"])
        }
        return numbers["vgpr_count"], numbers["vgpr_spill_count"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def table(units: list[Unit], processes: int) -> list[Row]:
    """Compiles the units; one row for each binary."""
    # the longest first, so that no process is left alone with one at the end
    units = sorted(units, key=lambda unit: (unit.module != "attention", -len(unit.only)))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            done = track(pool.imap_unordered(_compile, units), "compiling", len(units), console=log)
            rows = [row for found in done for row in found]
    unique = {(row.target, row.binary): row for row in reversed(rows)}
    return sorted(unique.values(), key=lambda row: (row.target, row.kernel, row.dtype, row.config))


def quick(targets: list[str], names: list[str]) -> list[Unit]:
    """What CI compiles."""
    return [
        Unit(name, target, dtype, full=False, only=only)
        for (target, dtype), only in QUICK.items()
        if target in targets
        for name in names
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bert_fast.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the part of the matrix CI compiles")
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", metavar="OUT", help="also write the table there")
    options = parser.parse_args(argv)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process")
    begin = time.perf_counter()
    targets, dtypes = options.targets.split(","), options.dtypes.split(",")
    names = modules()
    units = [Unit(name, *cell, full=True) for cell in product(targets, dtypes) for name in names]
    rows = table(quick(targets, names) if options.quick else units, options.processes)
    for row in rows:
        print(
            f"{row.target:7}{row.dtype:5}{row.kernel:33}{row.registers:4} regs {row.spills:4} spill"
            f"{row.shared:7} B {row.milliseconds:6} ms  {row.config}  ({row.sample})",
            *(f"<-- {fault}" for fault in row.faults()),
        )
    bad = sum(bool(row.faults()) for row in rows)
    print(
        f"{len(rows)} kernels, {bad} at fault, triton {triton.__version__}, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
