"""Copies made of weights (three packed into one, reordered for oneDNN), kept while they are true.

A copy lives beside the user's weight, which is never changed, for as long as that tensor lives and
nothing writes to it: address, version and layout tell, and on the CPU sixteen elements of each
tensor, because a write through `.data` (as EMA code does) leaves the version as it was. These are
read in every forward, from memory that other weights have pushed out of the caches, so not of a
tensor that a copy only refers to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .backends import extension_missing

# Called for every weight in every forward: without a frame of Python each.
_version, _trained = attrgetter("_version"), attrgetter("requires_grad")


class _Copy(NamedTuple):
    stamp: tuple[Any, ...]
    copied: list[int]  # which of the weights; kept here themselves, they would live for ever
    elements: Any
    value: Any


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_held = threading.local()


@contextmanager
def holding_copies() -> Iterator[list[Any]]:
    """A list that takes every copy which this thread uses meanwhile: for a graph that is recorded
    of it, and recorded anew where a weight changes."""
    copies: list[Any] = []
    _held.copies = copies
    try:
        yield copies
    finally:
        _held.copies = None


def copy_of(
    weights: Sequence[Tensor | None],
    kind: str,
    make: Callable[[], Any],
    referred: Callable[[Any], Iterable[Tensor]] = lambda value: (),
) -> Any:
    """`make()`, or what it gave before for these weights and this kind of copy.

    referred: the tensors in a copy that may share a weight's memory: there, a write is seen anyway.
        Detached, or a hook on a weight that refers to its model would keep that for ever.
    """
    given = [w for w in weights if w is not None]
    held = getattr(_held, "copies", None)
    if held is None and given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return make()  # in somebody's graph, which would replay the copy of today's weights
    try:
        stamp = (
            *map(id, given),
            *map(Tensor.data_ptr, given),
            *map(_version, given),
            *map(Tensor.is_contiguous, given),  # a transpose given to `.data` has the same address
        )
    except RuntimeError:  # an inference tensor has no version to tell when a copy is stale
        return make()
    kinds = _copies.get(given[0])
    if kinds is None:
        kinds = _copies[given[0]] = {}
    found = kinds.get(kind)
    if (
        found is None
        or found.stamp != stamp
        or found.elements != _fingerprint([given[i] for i in found.copied])
    ):
        # Not as inference tensors: a copy may be the source of another copy.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        shared = set(map(Tensor.data_ptr, referred(value)))
        copied = [i for i, w in enumerate(given) if w.data_ptr() not in shared]
        found = _Copy(stamp, copied, _fingerprint([given[i] for i in copied]), value)
        if given[0].is_cuda and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(given[0].device).synchronize()  # others may read it now
        kinds[kind] = found
    if held is not None:
        held.append(found.value)
    return found.value


def _fingerprint(weights: list[Tensor]) -> Any:
    """Of elements along a diagonal: one at least of each head's rows and columns, to 16 heads."""
    if not weights or weights[0].device.type != "cpu":
        return None  # reading a GPU's tensor would stall its queue
    if not extension_missing():
        return torch.ops.bert_fast_cpu.fingerprint(weights)
    at = torch.arange(1, 32, 2)
    samples = [w.detach()[tuple(at * n // 32 for n in w.shape)] for w in weights if w.numel()]
    return b"".join(sample.view(torch.uint8).numpy().tobytes() for sample in samples)


def reasons_against_copies(*weights: Tensor) -> list[str]:
    """Why no copy of these weights can be kept."""
    found = []
    if torch.is_grad_enabled() and any(map(_trained, weights)):
        found.append("the weight is being trained, so a reordered copy would be stale each step")
    if any(map(Tensor.is_inference, weights)):
        found.append("the weight is an inference tensor: it has no version to keep a copy by")
    return found


def forget(weight: Tensor) -> None:
    """Drops the copies of which `weight` is the first source."""
    _copies.pop(weight, None)
