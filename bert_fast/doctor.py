"""What this machine has, which kernel would run for each op, and why the others would not.

Nothing here fails where Triton, the C++ extension or a GPU is missing: that is what it reports.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from . import __version__
from .ops import OPS
from .ops.backends import (
    AMX,
    BF16,
    ISAS,
    VNNI,
    best_isa,
    cuda_missing,
    extension_missing,
    has_isa,
    triton_missing,
)
from .ops.products import has_native


@dataclass(frozen=True)
class Choice:
    """For one op on one kind of device: every kernel in order, and why it would not run."""

    op: str
    device: str
    reasons: dict[str, list[str]]


NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """Versions of what matters here; importing none of it."""
    here = {"bert_fast": __version__, "python": platform.python_version()}
    return here | versions_of("torch", "transformers", "triton", "numpy")


def versions_of(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def machine() -> dict[str, str]:
    """CPU, instruction sets, threads, GPU, and whether the extension is there."""
    isa = next(name for name, level in ISAS.items() if level == best_isa())
    more = {"AMX": AMX, "BF16": BF16, "VNNI": VNNI}
    isa += next((f" with {name}" for name, level in more.items() if has_isa(level)), "")
    missing = extension_missing()
    half = [str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float16) if has_native(d)]
    gpu = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    return {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch's CPU code": torch.backends.cpu.get_cpu_capability(),
        "oneDNN natively in": ", ".join(["float32", *half]),
        "C++ extension": missing[0] if missing else f"loaded, runs {isa} here",
        "GPU": gpu,
    }


def cpu_name() -> str:
    """The processor's name, as /proc/cpuinfo has it where there is one."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def choices(dtype: torch.dtype = torch.float32) -> list[Choice]:
    """What inference would run for each op on the CPU and on a GPU, present or not."""
    found = []
    mode = FakeTensorMode()

    def on_gpu(value: Any) -> Any:
        # A tensor that has a device but no data: kernels look at its kind, sizes and dtype only.
        if not isinstance(value, Tensor):
            return value
        return FakeTensor(mode, torch.empty_like(value, device="meta"), torch.device("cuda", 0))

    with torch.no_grad():
        for name, op in OPS.items():
            args = next(iter(op.samples(torch.device("cpu"), dtype))).args
            found.append(Choice(name, "cpu", dict(op.reasons(args))))
            found.append(Choice(name, "cuda", dict(op.reasons(tuple(map(on_gpu, args))))))
    return found


def grouped(found: Iterable[Choice]) -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    """(device, reason) -> the backends and the ops it holds for: every reason once."""
    result: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for choice in found:
        for backend, why in choice.reasons.items():
            for reason in why:
                backends, names = result.setdefault((choice.device, reason), ([], []))
                backends += [backend] * (backend not in backends)
                names += [choice.op] * (choice.op not in names)
    return result


def advice() -> list[str]:
    """What is missing here that would make it faster, and how to get it."""
    told = [
        f"{name} is not installed: `pip install {name}`."
        for name, version in versions().items()
        if version == NOT_INSTALLED and name != "triton"  # which is for GPUs
    ]
    if extension_missing():
        told.append(
            "The C++ kernels are not built: with a C++20 compiler and torch installed, "
            "`pip install --no-build-isolation --no-deps -e .` in the source tree."
        )
    if torch.cuda.is_available() and triton_missing():
        told.append("There is a GPU but no Triton: `pip install 'triton>=3.6'`.")
    if torch.cuda.is_available() and not extension_missing() and cuda_missing():
        told.append(
            "The extension has no CUDA kernels: install it again with nvcc on the PATH "
            "and a torch that was built with CUDA; `pip install -v` tells what it lacked."
        )
    if not torch.cuda.is_available() and torch.version.cuda is not None:
        told.append("torch was built with CUDA but sees no GPU: check the driver (`nvidia-smi`).")
    if not torch.backends.mkldnn.is_available():
        told.append("torch was built without oneDNN: its GEMMs on the CPU will be slow.")
    return told
