"""The packed class of Hugging Face's heads that read each sequence's first token only.

Their forward is Hugging Face's own; it only tells the encoder what will be read, so that the last
layer computes nothing else after its attention: exact, and three quarters of that layer saved.
"""

from __future__ import annotations

import functools
import importlib
from inspect import Parameter, signature
from typing import Any, ClassVar

from .families import FIRST_TOKEN_HEADS
from .packed import FIRST_ONLY, Packed


class FirstTokenHead:
    """What these heads share."""

    bert_fast_original: ClassVar[type]


@functools.cache
def first_token_head(original: type) -> type:
    """The packed class of a head class in `families.FIRST_TOKEN_HEADS`."""

    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoder = getattr(self, self.base_model_prefix)
        # A wrapper of the encoder, or a forward put in its place, may not take the keyword.
        if isinstance(encoder, Packed) and "forward" not in encoder.__dict__:
            kwargs[FIRST_ONLY] = True
        return original.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(
        original.__name__,
        (FirstTokenHead, original),
        {
            "__module__": __name__,
            "__doc__": f"transformers' {original.__name__}; its last layer computes what it reads.",
            "forward": forward,
            "bert_fast_original": original,
        },
    )


def __getattr__(name: str) -> type:
    """The packed class of the head whose class is `name`; pickles find theirs here."""
    for module, model in FIRST_TOKEN_HEADS:
        if model == name:
            return first_token_head(getattr(importlib.import_module(module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_first_token_head(model: Any) -> bool:
    """Whether `model` is, or may become, such a head: a known class on a packed encoder."""
    cls = type(model)
    if (cls.__module__, cls.__name__) in FIRST_TOKEN_HEADS:
        # Without **kwargs it could not hand the word on.
        taken = signature(cls.forward).parameters.values()
        if all(p.kind is not Parameter.VAR_KEYWORD for p in taken):
            return False
    elif not isinstance(model, FirstTokenHead):
        return False
    return isinstance(getattr(model, model.base_model_prefix, None), Packed)


def swap_first_token_head(model: Any) -> None:
    """Makes a module that `is_first_token_head` run so."""
    if not isinstance(model, FirstTokenHead):
        model.__class__ = first_token_head(type(model))  # type: ignore[arg-type]


def restore_first_token_head(model: Any) -> None:
    """Undoes `swap_first_token_head`."""
    if isinstance(model, FirstTokenHead) and type(model) is first_token_head(
        model.bert_fast_original
    ):
        model.__class__ = model.bert_fast_original
