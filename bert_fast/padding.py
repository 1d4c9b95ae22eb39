"""From a padded batch to packed tokens and back: unpad once, pad once.

A padded batch [B, S] keeps its real tokens only, one sequence after the other, as [T]. The
attention kernels find the sequences by `cu_seqlens`; everything else never sees padding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops.backends import on_device_of, triton_missing, triton_module
from .ops.modes import tracing, valueless
from .ops.registry import Chooser


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch [batch, length] stand once packed.

    indices: [T] int64 rows of the flattened batch that are kept; None when all are.
    cu_seqlens: [B + 1] int32, where each sequence starts, and T.
    key_start: [B] int32, the first row of each sequence that is a key; None: the sequence's first.
    max_seqlen: an upper bound of the longest sequence.
    real: [B, S] bool, or None; tokens that are packed but not real (see `pack_traced`) are False.
    place: [B, S] int32, the packed row of each token or -1, or None where nobody has counted it.
    """

    batch: int
    length: int
    indices: Tensor | None
    cu_seqlens: Tensor
    key_start: Tensor | None
    max_seqlen: int
    real: Tensor | None = None
    place: Tensor | None = None

    def unpad(self, x: Tensor, backend: str | Chooser = "auto") -> Tensor:
        """[B, S, H] -> [T, H]."""
        flat = x.reshape(self.batch * self.length, x.shape[-1])
        return flat if self.indices is None else ops.unpad(flat, self.indices, backend)

    def unpad_ids(self, ids: Tensor) -> Tensor:
        """[B, S] (or [1, S], shared by the batch) -> [T]."""
        if ids.shape[0] != self.batch:
            ids = ids.expand(self.batch, self.length)
        flat = ids.reshape(-1)
        return flat if self.indices is None else flat[self.indices]

    def starts(self) -> Tensor:
        """[B] int64, where column 0 of every batch row is packed."""
        return self.cu_seqlens[: self.batch].long()

    def labels(self, labels: Tensor, ignored: int) -> Tensor:
        """[B, S] -> [T]; `ignored` where a packed token is not real."""
        if self.real is not None:
            labels = labels.masked_fill(~self.real, ignored)
        return self.unpad_ids(labels)

    def pad(self, x: Tensor, backend: str | Chooser = "auto") -> Tensor:
        """[T, H] -> [B, S, H], padded rows zero."""
        if self.indices is not None:
            x = ops.pad(x, self.indices, self.batch * self.length, backend)
        x = x.reshape(self.batch, self.length, x.shape[-1])
        if self.real is not None:
            return x.masked_fill(~self.real.unsqueeze(-1), 0.0)
        # Not as a view: one that is made without gradients cannot be written to with them.
        return x if torch.is_grad_enabled() or tracing() else x.data


def progression(
    shape: tuple[int, ...], first: int, step: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """first, first + step, ... in this shape; kept for the next call, so not to be written to."""
    on_gpu, stream = device.type == "cuda", 0
    if tracing() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        make = _progression.__wrapped__
    else:
        make = _progression
        if on_gpu:  # another stream could read it before it is written
            stream = torch.cuda.current_stream(device).cuda_stream
    return make(shape, first, step, dtype, device, stream)


@functools.lru_cache(256)
def _progression(
    shape: tuple[int, ...],
    first: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
) -> Tensor:
    with torch.inference_mode(False):  # it may be needed where gradients are recorded
        numbers = torch.arange(math.prod(shape), dtype=dtype, device=device)
        return (numbers * step + first).view(shape)


def pack_full(batch: int, length: int, device: torch.device) -> Packing:
    """A batch without padding: every token is kept where it stands."""
    bounds = progression((batch + 1,), 0, length, torch.int32, device)
    return Packing(batch, length, None, bounds, None, length)


def pack_mask(mask: Tensor) -> Packing:
    """A 2D mask [B, S]: any non-zero value keeps its token.

    Column 0 is kept as a query even where it is masked, because the pooler and the [CLS] heads
    read it; `key_start` then excludes it from the keys.
    """
    batch, length = mask.shape
    if valueless(mask):
        return pack_traced(mask.bool())
    if mask.is_cuda and mask.numel() and not tracing() and not triton_missing():
        return pack_scanned(mask)
    # On a GPU, asking about values would stall the launch queue: without Triton every mask is taken
    # as ragged there, and the only wait is the one for the number of tokens.
    on_host = mask.device.type == "cpu"
    if not mask.numel() or (on_host and bool(mask.all())):
        return pack_full(batch, length, mask.device)
    keep = mask.bool()
    hidden_first = ~keep[:, 0]
    any_hidden_first = not on_host or bool(hidden_first.any())
    if any_hidden_first:
        keep = keep.clone()
        keep[:, 0] = True
    lengths = keep.sum(1, dtype=torch.int32)
    bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if on_host and batch else length
    key_start = (bounds[:-1] + hidden_first.int()) if any_hidden_first else None
    indices = keep.flatten().nonzero().flatten()
    return Packing(batch, length, indices, bounds, key_start, longest)


def pack_scanned(mask: Tensor) -> Packing:
    """`pack_mask` of a mask that is not empty, by a kernel or two and one wait for their counts.

    A dozen of torch's own kernels took longer to launch than a small model takes to run.
    """
    batch, length = mask.shape
    if mask.is_floating_point():
        mask = mask.bool()
    with on_device_of(mask):
        place, indices, bounds, key_start, counts = triton_module("pack").scan(mask)
    tokens, hidden_first = counts.cpu().tolist()
    if tokens == batch * length and not hidden_first:
        return pack_full(batch, length, mask.device)
    starts = key_start if hidden_first else None
    return Packing(batch, length, indices[:tokens], bounds, starts, length, place=place)


def pack_traced(keep: Tensor) -> Packing:
    """`pack_mask` for torch.compile and torch.export, whose graphs have no sizes that depend on
    values: every row stays, the real ones in front.

    The padding of each batch row follows as a sequence of its own that has no keys: attention
    skips it, and only the GEMMs and norms run over it.
    """
    batch, length = keep.shape
    hidden_first = (~keep[:, 0]).int()
    real = keep | (torch.arange(length, device=keep.device) == 0)
    lengths = real.sum(1, dtype=torch.int32)
    bounds = F.pad(torch.cat((lengths, length - lengths)).cumsum(0, dtype=torch.int32), (1, 0))
    key_start = torch.cat((bounds[:batch] + hidden_first, bounds[batch + 1 :]))
    order = (~real).flatten().to(torch.int8).argsort(stable=True)
    return Packing(batch, length, order, bounds, key_start, length, real)
