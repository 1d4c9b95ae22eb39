"""Triton's interpreter stands in for a GPU; it must be chosen before triton is imported."""

import os

import pytest
import torch

from bert_fast.notice import warn_once

# What deterministic algorithms ask of cuBLAS, before CUDA starts; it warns of every GEMM otherwise.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores between them
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh floating-point memory holds NaN, so that an element nobody wrote is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def told_anew():
    """What an earlier test of this process was told is said again: it may be an error here."""
    warn_once.cache_clear()
