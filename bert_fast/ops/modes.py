"""Modes that a call may be in: traced, recorded into a graph, under autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor


def tracing() -> bool:
    """Whether calls are being recorded, on tensors that may have no values."""
    # A non-empty dispatch-mode stack means FakeTensor, make_fx or a counter is watching: such
    # modes see dispatcher calls only, so a direct kernel call would escape them.
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def valueless(x: torch.Tensor) -> bool:
    """Whether it stands for any values, so that none can be asked for."""
    return torch.compiler.is_compiling() or (tracing() and isinstance(x, FakeTensor))


@contextmanager
def without_autocast(kind: str) -> Iterator[None]:
    """Autocast off for this type of device, where nothing is traced: by its switch, as
    `torch.autocast` takes as long as many a launch."""
    before = torch.is_autocast_enabled(kind)
    try:  # Ctrl-C may come in between
        torch.set_autocast_enabled(kind, False)
        yield
    finally:
        torch.set_autocast_enabled(kind, before)


class _Recording(threading.local):
    soon = False


_recording = _Recording()


@contextmanager
def for_a_recording() -> Iterator[None]:
    """Around what warms up for a CUDA graph's recording: it chooses the same kernels."""
    before, _recording.soon = _recording.soon, True
    try:
        yield
    finally:
        _recording.soon = before


def recorded() -> bool:
    """Whether calls go into a CUDA graph, or are about to: Python's time to launch is no cost."""
    return _recording.soon or torch.cuda.is_current_stream_capturing()
