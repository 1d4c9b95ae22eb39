"""Compiles every Triton kernel for GPUs that need not be present, and refuses spills.

    python -m bert_fast.aot [--quick] [--targets sm90,gfx942] [--dtypes bf16] [--json OUT]

Each op's own launch code is run on meta tensors (its `samples`, one per shipped config) under a
stand-in driver that names the target, so what is compiled here is what a launch there would
compile. The table tells registers, spilled bytes and shared memory; the exit status is 1 if a
kernel spills or wants more shared memory than the target has.
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
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# name: (backend, arch, threads of a warp, shared memory of a block in bytes)
TARGETS = {
    "sm80": ("cuda", 80, 32, 166912),
    "sm90": ("cuda", 90, 32, 232448),
    "sm100": ("cuda", 100, 32, 232448),
    "sm120": ("cuda", 120, 32, 101376),
    "gfx942": ("hip", "gfx942", 64, 65536),
}


@dataclass
class Row:
    """One compiled kernel."""

    kernel: str  # module.function
    config: str
    sample: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    milliseconds: int

    def faults(self) -> list[str]:
        limit = TARGETS[self.target][3]
        found = []
        if self.spills:
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


def _record(module_name: str, target: str, dtype: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(sample, kernel, compile arguments) of all launches of a module's samples, without repeats."""
    import torch
    import triton

    from bert_fast._triton import tiles

    module = importlib.import_module(f"bert_fast._triton.{module_name}")
    if not hasattr(module, "forward"):
        return []
    jobs: dict[Any, tuple[str, Any, dict[str, Any]]] = {}
    label = ""

    def hook(*, key: Any, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        kernel = fn.jit_function
        jobs.setdefault((kernel.__name__, str(key)), (label, kernel, compile))
        return True  # recorded; do not compile and launch

    triton.runtime.driver.set_active(_Driver(target))
    triton.knobs.runtime.jit_cache_hook = hook
    tiles.family.cache_clear()
    try:
        for label, args in module.samples(getattr(torch, DTYPES[dtype]), torch.device("meta")):
            y, *residuals = module.forward(*args, save=True)
            if module_name == "attention":
                residuals = [y, *residuals]  # its backward takes the output too
            module.backward(torch.empty_like(y), *args, *residuals, needs=[True] * len(args))
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return list(jobs.values())


def _compile(module: str, target: str, dtype: str) -> list[Row]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    rows = []
    for sample, kernel, found in _record(module, target, dtype):
        options = {name: found[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        source = ASTSource(kernel, found["signature"], found["constants"], found["configs"][0])
        begin = time.perf_counter()
        compiled = triton_compile(source, target=GPUTarget(*TARGETS[target][:3]), options=options)
        spent = int(1e3 * (time.perf_counter() - begin))
        registers, spills = _resources(compiled.asm)
        names = [kernel.arg_names[path[0]] for path in found["constants"]]
        constants = dict(zip(names, found["constants"].values(), strict=True))
        config = " ".join(
            [f"{k}={v}" for k, v in constants.items() if k.isupper()]
            + [f"{k}={options[k]}" for k in ("num_warps", "num_stages")]
        )
        name = f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"
        shared = compiled.metadata.shared
        rows.append(Row(name, config, sample, dtype, target, registers, spills, shared, spent))
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


def _work(unit: tuple[str, str, str]) -> list[Row]:
    return _compile(*unit)


def table(units: list[tuple[str, str, str]], processes: int) -> list[Row]:
    """Compiles (module, target, dtype) units; one row for each kernel and config."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes) as pool:
            found = [row for rows in pool.imap_unordered(_work, units) for row in rows]
    rows: dict[tuple[str, ...], Row] = {}
    for row in found:
        rows.setdefault((row.target, row.dtype, row.kernel, row.config, row.sample), row)
    return [rows[key] for key in sorted(rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bert_fast.aot", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--modules", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(argv)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process")
    begin = time.perf_counter()
    units = [
        (module, target, dtype)
        for target in options.targets.split(",")
        for dtype in options.dtypes.split(",")
        for module in (options.modules.split(",") if options.modules else modules())
    ]
    rows = table(units, options.processes)
    for row in rows:
        print(
            f"{row.target:7}{row.dtype:5}{row.kernel:36}{row.registers:4} regs {row.spills:4} spill"
            f"{row.shared:7} B {row.milliseconds:6} ms  {row.config}  ({row.sample})"
            + "".join(f"  <-- {fault}" for fault in row.faults())
        )
    bad = sum(bool(row.faults()) for row in rows)
    print(f"{len(rows)} kernels in {time.perf_counter() - begin:.0f} s, {bad} at fault")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
