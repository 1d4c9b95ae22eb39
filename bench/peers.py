"""The contenders of the model benchmark: bert_fast, and what else runs a BERT on a CPU.

Every one takes a Hugging Face BertModel and the same padded batches, uses torch's number of threads
within an op and one between ops, and gives back last_hidden_state. `pip install
--no-build-isolation -e '.[peers]'` brings those that are not PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bert_fast.ops.backends import best_isa, triton_missing
from bert_fast.verification import IN_8_BITS

from . import peers_exported as exported
from . import peers_torch as inside
from .peers_torch import Batch, Forward

ABOUT = {
    "bert_fast": "this package: Hugging Face's model after bert_fast.accelerate; on a GPU with "
    "CUDA graphs",
    "hf_eager": "Hugging Face transformers, attention written out in PyTorch",
    "hf_sdpa": "Hugging Face transformers as it comes, on PyTorch's fused attention",
    "torch_compile": "hf_sdpa compiled by torch.compile, with its weights frozen and shapes left "
    "open; on a GPU in mode max-autotune, with CUDA graphs",
    "onnxruntime": "ONNX Runtime on the exported graph, after its own BERT fusions",
    "openvino": "Intel OpenVINO, shapes left open",
    "openvino_static": "Intel OpenVINO, compiled for the largest batch; smaller ones are padded",
    "ctranslate2": "CTranslate2, which drops padding too",
}
# Of all but the products that a precision names.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    "fp8": torch.bfloat16,
}


@dataclass(frozen=True)
class Peer:
    """A contender in one precision.

    missing(): why it cannot run here, None if it can. Imports nothing heavy.
    build(model, folder, batches): a function of {"input_ids", "attention_mask"}, both int64 [B, S]
        and padded on the right, that returns last_hidden_state [B, S, H]; rows of padding hold
        anything. `model` is a BertModel in fp32 and evaluation, and stays as it is. `folder` keeps
        what is exported of that model. `batches` are those to come: a static shape is the largest
        of them.
        Raises RuntimeError where the library would run in another precision.
    lasting: built once for all workloads of a model, as that takes longer than timing it. The
        others are built anew, so that memory they never give back is counted where it is taken.
    """

    name: str
    precision: str
    missing: Callable[[], str | None]
    build: Callable[[nn.Module, Path, Sequence[Batch]], Forward]
    lasting: bool = False


def packages_missing(*names: str) -> str | None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    how = "pip install --no-build-isolation -e '.[peers]'"
    return f"no {', '.join(absent)} ({how})" if absent else None


def compiler_missing() -> str | None:
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if any(name and shutil.which(name) for name in compilers):
        return None
    return "torch.compile needs a C++ compiler, and there is no g++ or clang++"


def _never_missing() -> str | None:
    return None


def _bert_fast_missing(precision: str) -> str | None:
    there = torch.cuda.is_available()
    if precision == "int8" and there and triton_missing():
        return "8-bit products need Triton on a GPU"
    if precision == "int8" and not there and best_isa() == 0:
        return "8-bit products need a processor with AVX2, and the C++ extension"
    if precision == "fp8" and not (there and torch.cuda.get_device_capability() >= (8, 9)):
        return "8-bit floats need an NVIDIA GPU of compute capability 8.9 or more"
    return None


def _openvino_missing(precision: str) -> str | None:
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        return "OpenVINO needs a processor with AVX-512 BF16 for bf16"
    return packages_missing("openvino", *(("nncf",) if precision == "int8" else ()))


def _bert_fast(precision: str) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        narrow = precision if precision in IN_8_BITS else None
        return inside.build_bert_fast(model, batches, DTYPES[precision], narrow)

    return Peer("bert_fast", precision, partial(_bert_fast_missing, precision), build)


def _transformers(attention: str, precision: str) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        return inside.build_transformers(model, attention, DTYPES[precision])

    return Peer(f"hf_{attention}", precision, _never_missing, build)


def _torch_compile(precision: str) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        return inside.build_compiled(model, batches, DTYPES[precision])

    return Peer("torch_compile", precision, compiler_missing, build, lasting=True)


def _onnxruntime(precision: str) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        return exported.build_onnxruntime(model, folder, precision)

    missing = partial(packages_missing, "onnx", "onnxruntime")
    return Peer("onnxruntime", precision, missing, build)


def _openvino(precision: str, static: bool) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        return exported.build_openvino(model, folder, batches, precision, static)

    name = "openvino_static" if static else "openvino"
    return Peer(name, precision, partial(_openvino_missing, precision), build)


def _ctranslate2(precision: str) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Batch]) -> Forward:
        return exported.build_ctranslate2(model, folder, precision)

    return Peer("ctranslate2", precision, partial(packages_missing, "ctranslate2"), build)


PEERS: tuple[Peer, ...] = (
    *(_bert_fast(precision) for precision in DTYPES),
    _transformers("eager", "fp32"),
    *(_transformers("sdpa", precision) for precision in ("fp32", "bf16")),
    *(_torch_compile(precision) for precision in ("fp32", "bf16")),
    *(_onnxruntime(precision) for precision in ("fp32", "int8")),
    *(_openvino(precision, False) for precision in ("fp32", "bf16", "int8")),
    *(_openvino(precision, True) for precision in ("fp32", "bf16", "int8")),
    *(_ctranslate2(precision) for precision in ("fp32", "int8")),
)
