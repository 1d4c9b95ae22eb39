"""The packed class of Hugging Face's heads that read a part of what their encoder returns.

Their forward is Hugging Face's own; it only tells the encoder what will be read:

- each sequence's first token (classification, multiple choice): the last layer computes nothing
  else after its attention, exact, and three quarters of that layer saved;
- real tokens (spans, without labels in evaluation): padding is spared, and gets the least logit
  there is. With labels or in training it is computed: Hugging Face's loss is taken over it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .families import READING_HEADS, Reading
from .packed import FIRST_ONLY, NO_WORD, REAL_ONLY, Packed, takes_word
from .structure import hooked
from .swap import Swapped, arguments, encoder_of, put_back, swapped_class


class ReadingHead(Swapped):
    """What these heads share."""

    bert_fast_reads: ClassVar[Reading]


@functools.cache
def reading_head(original: type) -> type:
    """The packed class of a head class in `families.READING_HEADS`."""
    return swapped_class(
        original,
        ReadingHead,
        reading_head,
        _forward,
        f"transformers' {original.__name__}; its encoder computes what it reads.",
        bert_fast_reads=READING_HEADS[original.__module__, original.__name__],
    )


def _forward(cls: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own = functools.partial(cls.bert_fast_original.forward, model)
    if _reasons_against(cls, model):
        return own(*args, **kwargs)
    if cls.bert_fast_reads.what == "first tokens":
        return own(*args, **kwargs, **{FIRST_ONLY: True})
    return _real_tokens(cls, model, own, args, kwargs)


def reasons_against_reading(model: Any) -> list[str]:
    """Why the encoder has to compute all tokens for this head as it is now (empty: it need not)."""
    return _reasons_against(type(model), model)


def _reasons_against(cls: Any, model: Any) -> list[str]:
    if not takes_word(encoder_of(model)):
        return [NO_WORD]
    what, by = cls.bert_fast_reads
    if by is None:
        return []
    child = getattr(model, by, None)
    if what == "real tokens":
        known = type(child) is nn.Linear
    else:
        known = type(child).__module__ == cls.bert_fast_original.__module__
    if not known:
        return [f"its {by} is {type(child).__qualname__}, which is not transformers'"]
    return [f"a hook or a replaced method sits on its {by}"] if hooked(child) else []


def _real_tokens(
    cls: Any, model: Any, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    given = arguments(cls, args, kwargs)
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
    return isinstance(encoder_of(model), Packed)


def swap_reading_head(model: Any) -> None:
    """Makes a module that `is_reading_head` run so."""
    if not isinstance(model, ReadingHead):
        model.__class__ = reading_head(type(model))  # type: ignore[arg-type]


def restore_reading_head(model: Any) -> None:
    """Undoes `swap_reading_head`."""
    if isinstance(model, ReadingHead):
        put_back(model)
