"""Where kernels come from: the C++ extension (CPU by ISA, CUDA), Triton; each says why it cannot.

Nothing here imports Triton or loads the extension before a kernel of theirs is considered.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .registry import Kernel

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ISAS = {"avx512": 2, "avx2": 1, "generic": 0}
VNNI, BF16, AMX = 4, 5, 6  # "avx512" is the best of 3 (AVX-512 alone) and these, each with more

Limits = Callable[..., list[str]]


def no_limits(*args: Any) -> list[str]:
    return []


@functools.cache
def extension_missing() -> list[str]:
    """Why the compiled extension cannot be used (empty: it is loaded)."""
    try:
        extension()
    except ImportError as error:
        return [f"the C++ extension is not built or does not load ({error})"]
    return []


@functools.cache
def extension() -> Any:
    """The compiled extension; raises ImportError where it is not there, or older than this."""
    found = importlib.import_module("bert_fast._C")
    if not hasattr(found, "unchanged"):
        raise ImportError("it was built from other sources: build it anew")
    return found


def addresses(objects: tuple[Any, ...], dicts: tuple[dict[str, Any], ...]) -> Any:
    """Those of the objects' types and of the dicts' keys and values, for `unchanged`."""
    if not extension_missing():
        return extension().addresses(objects, dicts)
    inside = [[len(one), *map(id, chain.from_iterable(one.items()))] for one in dicts]
    return [id(type(one)) for one in objects], inside


def unchanged(objects: tuple[Any, ...], dicts: tuple[dict[str, Any], ...], known: Any) -> bool:
    """Whether each object has the type, and each dict the items, that it had when `addresses` gave
    this: the very same ones, as long as somebody kept them alive, in the same order.

    It is asked in every forward, of hundreds of dicts that a model's weights have pushed out of the
    caches: C++ reads them once.
    """
    if not extension_missing():
        return bool(extension().unchanged(objects, dicts, known))
    return bool(addresses(objects, dicts) == known)


@functools.cache
def cuda_missing() -> list[str]:
    if extension_missing():
        return extension_missing()
    if not hasattr(torch.ops.bert_fast_cuda, "add_layernorm_forward"):
        return ["the extension was built without CUDA (torch without CUDA, or no nvcc)"]
    return []


@functools.cache
def triton_missing() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    if importlib.util.find_spec("bert_fast._triton") is None:
        return ["bert_fast's Triton kernels are not beside it: it is not installed"]
    return []


@functools.cache
def triton_module(name: str) -> Any:
    """`bert_fast._triton.<name>`, imported at its first use."""
    return importlib.import_module(f"bert_fast._triton.{name}")


@functools.cache
def triton_interprets() -> bool:
    """Triton's interpreter runs kernels on CPU tensors; it is chosen before triton is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def has_isa(isa: int) -> bool:
    """Whether the C++ kernels numbered so run here; the numbers are those of `cpu/dispatch.h`."""
    return not extension_missing() and bool(torch.ops.bert_fast_cpu.has_isa(isa))


@functools.cache
def best_isa() -> int:
    """The first of ISAS that runs here; 0 without the extension."""
    return next((isa for isa in ISAS.values() if has_isa(isa)), 0)


@functools.cache
def openmp() -> bool:
    """Whether torch's threads on the CPU are OpenMP's: all shares of a section run at once."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def wrong_device(lead: Tensor, device: str) -> list[str]:
    return [] if lead.device.type == device else [f"tensors are on {lead.device}, not {device}"]


def widest_row(hidden: int, lead: int = 0) -> Limits:
    """The limit of kernels that hold a whole row [H] in registers."""

    def limit(*args: Any) -> list[str]:
        width = args[lead].shape[-1]
        return [] if 1 <= width <= hidden else [f"hidden size is {width}, not 1 to {hidden}"]

    return limit


def wrong_dtype(lead: Tensor) -> list[str]:
    return [] if lead.dtype in FLOATS else [f"{lead.dtype} is not fp32, bf16 or fp16"]


def cpu_reasons(lead: Tensor, name: str, isa: int) -> list[str]:
    """Why C++ code for instruction set `isa` cannot take this tensor."""
    found = wrong_device(lead, "cpu") or extension_missing()
    if not found and isa > best_isa():
        found = [f"this CPU has no {name}"]
    return found or wrong_dtype(lead)


@contextmanager
def out_of_range() -> Iterator[None]:
    """What C++ says of an id that is out of range (cpu/dispatch.cpp), as IndexError, which torch's
    own ops raise."""
    try:
        yield
    except RuntimeError as error:  # the one kind that C++ raises
        if ", expected 0 <= value < " in str(error):
            raise IndexError(str(error)) from None
        raise


def cpu_kernels(op: str, lead: int = 0, limits: Limits = no_limits) -> tuple[Kernel, ...]:
    """The C++ CPU kernel of `op`, once per instruction set, best first."""
    return tuple(_cpu_kernel(op, lead, limits, *item) for item in ISAS.items())


def _cpu_kernel(op: str, lead: int, limits: Limits, name: str, isa: int) -> Kernel:
    def why_not(*args: Any) -> list[str]:
        return cpu_reasons(args[lead], name, isa) or limits(*args)

    def forward(*args: Any, save: bool) -> tuple[Tensor, ...]:
        with out_of_range():
            return _tuple(getattr(torch.ops.bert_fast_cpu, f"{op}_forward")(*args, save, isa))

    def backward(*args: Any, needs: list[bool]) -> tuple[Tensor, ...]:
        return _tuple(getattr(torch.ops.bert_fast_cpu, f"{op}_backward")(*args, needs, isa))

    return Kernel(name, forward, backward, why_not, device="cpu")


def cuda_kernel(
    op: str, lead: int = 0, limits: Limits = no_limits, has_backward: bool = True
) -> Kernel:
    """The CUDA C++ kernel of `op` (built where torch has CUDA and nvcc is found)."""

    def why_not(*args: Any) -> list[str]:
        found = wrong_device(args[lead], "cuda") or cuda_missing()
        return found or wrong_dtype(args[lead]) + limits(*args)

    def forward(*args: Any, save: bool) -> tuple[Tensor, ...]:
        return _tuple(getattr(torch.ops.bert_fast_cuda, f"{op}_forward")(*args, save))

    def backward(*args: Any, needs: list[bool]) -> tuple[Tensor, ...]:
        return _tuple(getattr(torch.ops.bert_fast_cuda, f"{op}_backward")(*args, needs))

    return Kernel("cuda", forward, backward if has_backward else None, why_not, device="cuda")


def triton_kernel(op: str, lead: int = 0, limits: Limits = no_limits) -> Kernel:
    """The Triton kernel of `op`, in module `bert_fast._triton.<op>`, imported at its first use."""

    def why_not(*args: Any) -> list[str]:
        found = list(triton_missing())
        if not found and not args[lead].is_cuda and not triton_interprets():
            found = [f"tensors are on {args[lead].device}, Triton runs on a GPU"]
        return found or wrong_dtype(args[lead]) + limits(*args)

    def forward(*args: Any, save: bool) -> tuple[Tensor, ...]:
        with on_device_of(args[lead]):
            return _tuple(triton_module(op).forward(*args, save=save))

    def backward(*args: Any, needs: list[bool]) -> tuple[Tensor, ...]:
        with on_device_of(args[0]):
            return _tuple(triton_module(op).backward(*args, needs=needs))

    return Kernel("triton", forward, backward, why_not)


def with_tritons_backward(kernel: Kernel, op: str) -> Kernel:
    """A CUDA kernel with the backward of the Triton kernel, whose residuals are the same, where
    Triton is installed."""
    if triton_missing():
        return kernel
    return replace(kernel, backward=triton_kernel(op).backward, backward_by="triton")


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)
