"""The packed class of Hugging Face's heads that read a part of what their encoder returns.

Their forward is Hugging Face's own; it only tells the encoder what will be read:

- each sequence's first token (classification, multiple choice): the last layer computes nothing
  else after its attention, exact, and three quarters of that layer saved;
- real tokens (spans, without labels in evaluation): padding is spared, and gets the least logit
  there is. With labels or in training it is computed: Hugging Face's loss is taken over it too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from .families import READING_HEADS
from .packed import FIRST_ONLY, REAL_ONLY, Packed, arguments, takes_word


class ReadingHead:
    """What these heads share."""

    bert_fast_original: ClassVar[type]
    bert_fast_reads: ClassVar[str]
    bert_fast_arguments: ClassVar[tuple[str, ...]]


@functools.cache
def reading_head(original: type) -> type:
    """The packed class of a head class in `families.READING_HEADS`."""
    reads = READING_HEADS[original.__module__, original.__name__]
    run = {"first tokens": _first_tokens, "real tokens": _real_tokens}[reads]

    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(original.forward, self)  # type: ignore[attr-defined]
        told = takes_word(getattr(self, self.base_model_prefix))
        return run(self, own, args, kwargs) if told else own(*args, **kwargs)

    return type(
        original.__name__,
        (ReadingHead, original),
        {
            "__module__": __name__,
            "__doc__": f"transformers' {original.__name__}; its encoder computes what it reads.",
            "forward": forward,
            "bert_fast_original": original,
            "bert_fast_reads": reads,
            "bert_fast_arguments": tuple(signature(original.forward).parameters)[1:],  # type: ignore
        },
    )


def _first_tokens(model: Any, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return own(*args, **kwargs, **{FIRST_ONLY: True})


def _real_tokens(model: Any, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = arguments(model, args, kwargs)
    labelled = given.get("start_positions") is not None or given.get("end_positions") is not None
    mask = given.get("attention_mask")
    if model.training or labelled or not isinstance(mask, Tensor) or mask.dim() != 2:
        return own(*args, **kwargs)
    found = own(*args, **kwargs, **{REAL_ONLY: True})
    if isinstance(found, tuple):
        start, end, *rest = found
        return (_least_at_padding(start, mask), _least_at_padding(end, mask), *rest)
    found.start_logits = _least_at_padding(found.start_logits, mask)
    found.end_logits = _least_at_padding(found.end_logits, mask)
    return found


def _least_at_padding(logits: Tensor, mask: Tensor) -> Tensor:
    """As transformers has it where it masks spans itself (Splinter): never the best, no NaN."""
    return logits.masked_fill(~mask.bool().to(logits.device), torch.finfo(logits.dtype).min)


def __getattr__(name: str) -> type:
    """The packed class of the head whose class is `name`; pickles find theirs here."""
    for module, model in READING_HEADS:
        if model == name:
            return reading_head(getattr(importlib.import_module(module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_reading_head(model: Any) -> bool:
    """Whether `model` is, or may become, such a head: a known class on a packed encoder."""
    cls = type(model)
    if (cls.__module__, cls.__name__) in READING_HEADS:
        # Without **kwargs it could not hand the word on.
        taken = signature(cls.forward).parameters.values()
        if all(p.kind is not Parameter.VAR_KEYWORD for p in taken):
            return False
    elif not isinstance(model, ReadingHead):
        return False
    return isinstance(getattr(model, model.base_model_prefix, None), Packed)


def swap_reading_head(model: Any) -> None:
    """Makes a module that `is_reading_head` run so."""
    if not isinstance(model, ReadingHead):
        model.__class__ = reading_head(type(model))  # type: ignore[arg-type]


def restore_reading_head(model: Any) -> None:
    """Undoes `swap_reading_head`."""
    if isinstance(model, ReadingHead) and type(model) is reading_head(model.bert_fast_original):
        model.__class__ = model.bert_fast_original
