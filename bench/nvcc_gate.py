"""Compiles every CUDA kernel for every GPU architecture we ship, and fails on register spills.

    python -m bench.nvcc_gate [--quick] [--json OUT]

It needs nvcc but no GPU and no CUDA build of torch: the sources use torch's stable headers only.
Where nvcc is missing it says so and exits with 0. The flags are those of setup.py and of torch.
`--quick` is for CI: every file for the oldest architecture, where an instruction that is too new
fails. No source asks for the architecture, so that all compile the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "csrc" / "cuda"
ARCHITECTURES: tuple[str, ...] = ("80", "90a", "100a")  # from old to new
FLAGS = ("-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")

# One kernel in the report of `ptxas -v`.
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelUse:
    """What one kernel takes on one architecture; memory in bytes, shared memory the static part."""

    source: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def find_nvcc() -> str | None:
    """The compiler on the path, or the one torch would build extensions with."""
    found = shutil.which("nvcc")
    if found is None:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists():
            found = str(Path(CUDA_HOME) / "bin" / "nvcc")
    return found


def parse(source: str, report: str) -> list[KernelUse]:
    """The kernels in a report of `ptxas -v`."""
    found = []
    for match in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            KernelUse(
                source,
                match["name"],
                match["arch"],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["stack"]),
                int(match["stores"]),
                int(match["loads"]),
            )
        )
    return found


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Readable kernel names, without namespaces and parameters; the given ones without c++filt."""
    if shutil.which("c++filt") is None or not names:
        return {name: name for name in names}
    told = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = {}
    for name, full in zip(names, told, strict=True):
        full = full.replace("(anonymous namespace)::", "").replace("bert_fast::", "")
        full = full.removeprefix("void ").split("(")[0].replace("__nv_bfloat16", "bf16")
        short[name] = full.replace("__half", "fp16").replace(" >", ">")
    return short


def compile_file(nvcc: str, source: Path, quick: bool) -> tuple[list[KernelUse], str]:
    """Compiles one file for all architectures; returns its kernels, and the errors if it fails."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    chosen = ARCHITECTURES[:1] if quick else ARCHITECTURES
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *COMMON_NVCC_FLAGS, *targets, "-Xptxas", "-v"]
        command += [f"-I{path}" for path in include_paths()]
        command += ["-c", str(source), "-o", str(Path(folder) / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [], done.stderr + done.stdout
    return parse(source.stem, done.stderr + done.stdout), ""


def compile_all(nvcc: str, quick: bool = False) -> tuple[list[KernelUse], dict[str, str]]:
    """Compiles all files, two at a time or more; returns kernels and errors by file."""
    sources = sorted(SOURCES.glob("*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda path: compile_file(nvcc, path, quick), sources))
    kernels = [kernel for found, _ in results for kernel in found]
    names = demangle([kernel.kernel for kernel in kernels])
    kernels = [KernelUse(**(asdict(k) | {"kernel": names[k.kernel]})) for k in kernels]
    errors = {path.name: text for path, (_, text) in zip(sources, results, strict=True) if text}
    return sorted(kernels, key=lambda k: (k.source, k.kernel, k.arch)), errors


def table(kernels: Sequence[KernelUse]) -> str:
    """One line per kernel and architecture."""
    width = max((len(k.kernel) for k in kernels), default=6)
    header = f"{'kernel':{width}}  {'arch':7} {'regs':>4} {'smem':>6} {'stack':>5} {'spills':>9}"
    lines = [
        f"{k.kernel:{width}}  {k.arch:7} {k.registers:4} {k.shared:6} {k.stack:5} "
        f"{k.spill_stores:4}/{k.spill_loads:<4}"
        for k in kernels
    ]
    return "\n".join([header, *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the part that CI compiles")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: nvcc not found")
        return 0
    kernels, errors = compile_all(nvcc, options.quick)
    print(table(kernels))
    for name, text in errors.items():
        print(f"\n{name} does not compile:\n{text}")
    spilling = [k for k in kernels if k.spills]
    for k in spilling:
        print(f"SPILL {k.kernel} on {k.arch}: {k.spill_stores} bytes out, {k.spill_loads} in")
    counts = {arch: sum(k.arch == f"sm_{arch}" for k in kernels) for arch in ARCHITECTURES}
    told = ", ".join(f"sm_{arch}: {count} kernels" for arch, count in counts.items())
    print(f"\n{told}; {len(spilling)} spill, {len(errors)} files fail to compile")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    return 1 if spilling or errors or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
