"""Another forward for a module, in place: a subclass of its class, of the same name, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import nn


class Swapped:
    """What such classes share."""

    bert_fast_original: ClassVar[type]
    bert_fast_make: ClassVar[Callable[[Any], Any]]
    bert_fast_arguments: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies make the class again: by its name they would find the original."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *state = reduced
        cls = type(self)
        if "bert_fast_original" in vars(cls):
            make, args = _new, (cls.bert_fast_make, cls.bert_fast_original)
        return make, args, *state


def _new(make: Callable[[Any], Any], original: Any) -> Any:
    cls = make(original)
    return cls.__new__(cls)


def swapped_class(
    original: Any,
    kind: type[Swapped],
    make: Callable[[Any], Any],
    forward: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any],
    doc: str,
    **attributes: Any,
) -> type:
    """`original` with another forward: same constructor, parameters, state_dict keys, signature,
    and same name and module, by which other libraries know the class or import it again.

    kind: its first base. make: what gives this class for `original`.
    forward: called with the class, the model, args and kwargs. What is of the class, it asks the
        class: another thread may put the model back meanwhile.
    """

    @functools.wraps(original.forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, kind):  # put back, but somebody (accelerate's hooks) has kept this
            return original.forward(self, *args, **kwargs)
        return forward(created, self, args, kwargs)

    own = {
        "__module__": original.__module__,
        "__doc__": doc,
        "forward": wrapped,
        "bert_fast_original": original,
        "bert_fast_make": staticmethod(make),
        "bert_fast_arguments": tuple(
            name
            for name, parameter in signature(original.forward).parameters.items()
            if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        )[1:],
    }
    created = type(original.__name__, (kind, original), own | attributes)
    return created


def put_back(module: nn.Module) -> None:
    """The module's own class again; a class of somebody's on one of ours stays."""
    if "bert_fast_original" in vars(type(module)):
        module.__class__ = original_of(module)


def original_of(module: nn.Module) -> Any:
    """The class of a module, or the one it was before it was swapped."""
    return getattr(type(module), "bert_fast_original", type(module))


def arguments(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name of a call of such a class; TypeError, as Python has it, for one too
    many or given twice."""
    names = cls.bert_fast_arguments
    if len(args) > len(names) or kwargs.keys() & set(names[: len(args)]):
        signature(cls.bert_fast_original.forward).bind(None, *args, **kwargs)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def encoder_of(head: Any) -> Any:
    """The encoder below a head of transformers, None where there is none."""
    return getattr(head, getattr(head, "base_model_prefix", ""), None)
