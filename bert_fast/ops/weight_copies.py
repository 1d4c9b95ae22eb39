"""Copies made of weights (three packed into one, reordered for oneDNN), kept while they are true.

A copy lives beside the user's weight, which is never changed, for as long as that tensor lives and
nothing writes to it: version, address and layout tell, and on the CPU sixteen elements of each
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
from .locks import OneAtATime

# Called for every weight in every forward: without a frame of Python each.
_version, _trained = attrgetter("_version"), attrgetter("requires_grad")


class Stamp(NamedTuple):
    """What tells that weights are still the same.

    copied: which of them a copy does not share memory with; kept here themselves, they would live
        for ever.
    """

    ids: list[int]
    copied: list[int]
    versions: list[int]
    memory: Any

    def holds(self, weights: list[Tensor]) -> bool:
        return (
            self.ids == list(map(id, weights))
            and self.versions == [weights[i]._version for i in self.copied]
            and self.memory == _memory(weights, self.copied)
        )


class Begun(NamedTuple):
    """What weights were when the making of a copy began."""

    versions: list[int]
    places: Any


def begin(weights: list[Tensor]) -> Begun:
    """Raises: RuntimeError for an inference tensor, which has no version."""
    return Begun(list(map(_version, weights)), _memory(weights, []))


def stamp_of(weights: list[Tensor], begun: Begun, referred: Iterable[Tensor]) -> Stamp:
    """Of a copy that refers to some tensors. It never holds where another thread has meanwhile
    moved the weights or given them another dtype."""
    shared = set(map(Tensor.data_ptr, referred))
    copied = [i for i, w in enumerate(weights) if w.data_ptr() not in shared]
    versions = [begun.versions[i] for i in copied]
    ids = list(map(id, weights)) if begun.places == _memory(weights, []) else []
    return Stamp(ids, copied, versions, _memory(weights, copied))


class _Copy(NamedTuple):
    stamp: Stamp
    value: Any


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_held = threading.local()
_making = OneAtATime()  # a server's first requests come together, and need one copy


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
    found = _kept(given, kind)
    if found is None:
        try:
            begun = begin(given)
        except RuntimeError:  # an inference tensor has none to tell when a copy is stale
            return make()
        with _making:
            found = _kept(given, kind) or _made(given, begun, kind, make, referred)
    if held is not None:
        held.append(found.value)
    return found.value


def _kept(given: list[Tensor], kind: str) -> _Copy | None:
    found = _copies.get(given[0], {}).get(kind)
    return found if found is not None and found.stamp.holds(given) else None


def _made(
    given: list[Tensor],
    begun: Begun,
    kind: str,
    make: Callable[[], Any],
    referred: Callable[[Any], Iterable[Tensor]],
) -> _Copy:
    # Not as inference tensors: a copy may be the source of another copy.
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    found = _Copy(stamp_of(given, begun, referred(value)), value)
    if given[0].is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(given[0].device).synchronize()  # others may read it now
    _copies.setdefault(given[0], {})[kind] = found
    return found


def _memory(weights: list[Tensor], read: list[int]) -> Any:
    """Where weights are and how they lie there (a transpose given to `.data` has the same address)
    and, on the CPU, elements of those at `read`, along a diagonal: one at least of each head's rows
    and columns, to 16 heads."""
    if not extension_missing():
        return torch.ops.bert_fast_cpu.fingerprint(weights, read)
    places = [(w.device, w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights]
    at = torch.arange(1, 32, 2)
    some = [weights[i].detach() for i in read]  # a GPU's are not read: that would stall its queue
    picked = [w for w in some if w.device.type == "cpu" and w.numel()]
    samples = [w[tuple(at * n // 32 for n in w.shape)] for w in picked]
    return places, b"".join(one.view(torch.uint8).numpy().tobytes() for one in samples)


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
