"""A whole forward in one call of C++: inference on a CPU, of whose outputs only the states, and the
pooler's, are asked for.

Whether a model can is looked at once and kept while nothing of it has changed: no module, nor what
is set on one, nor a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import Family, bert_pooled
from .inputs import first_position, most_tokens
from .modeling import rate
from .ops.backends import ISAS
from .ops.encoder import OP as ENCODER
from .ops.encoder import WeightTable, preferred, table_of
from .ops.modes import tracing
from .ops.padded_encoder import Parts, Settings, padded_encoder
from .ops.weight_copies import Stamp, begin, reasons_against_copies, stamp_of
from .paths import hooked_globally, reasons_against_now, reasons_against_one_call
from .structure import KeptInModel, Structure, is_structure_of, odd

# All that a call may give; what else it gives has to be false or None.
_SERVED = ("input_ids", "attention_mask", "token_type_ids", "return_dict")
# What a config may ask for beyond that.
_MORE = ("output_hidden_states", "output_attentions", "is_causal")

_READY = "_bert_fast_one_call"


class _Call(NamedTuple):
    """What C++ is given beside the inputs; `most` is how many tokens a text may have."""

    parts: Parts
    table: WeightTable
    settings: Settings
    isa: int
    most: int


class _Ready(KeptInModel):
    """A model's call, and what tells that it is still true."""

    def __init__(
        self, model: Any, structure: Structure, call: _Call, weights: list[Tensor], stamp: Stamp
    ) -> None:
        self.structure, self.call = structure, call
        self.weights, self.stamp = weights, stamp
        self.config = dict(vars(model.config))

    def holds(self, model: Any) -> bool:
        return (
            is_structure_of(self.structure, model)
            and self._config_holds(model)
            and self.stamp.holds(self.weights)
        )

    def _config_holds(self, model: Any) -> bool:
        try:
            return self.config == vars(model.config)
        except (RuntimeError, ValueError):  # two tensors or arrays, which are not alike or unlike
            return False


def forget_call(model: nn.Module) -> None:
    """Drops what was found of the model."""
    model.__dict__.pop(_READY, None)


def prepared(model: nn.Module) -> bool:
    """Whether `prepare` found the model fit, and nobody has looked since whether it still is."""
    return model.__dict__.get(_READY) is not None


def answer(
    model: Any, given: Mapping[str, Any], first_only: bool = False, whole: bool = False
) -> tuple[Tensor, Tensor | None] | None:
    """States [B, S, H] and the pooler's output [B, H] if there is one, where `prepare` found the
    model fit for it and this call asks for no more; else None.

    first_only: states of first tokens [B, 1, H] are all that is read.
    whole: padding is computed too, so there may be none.

    Raises: IndexError for an id or type that its table does not have.
    """
    ready: _Ready | None = model.__dict__.get(_READY)
    if ready is None or _watched() or not _serves(ready.call, given):
        return None
    mask = given.get("attention_mask")
    if whole and mask is not None and not mask.all():
        return None
    if not ready.holds(model):
        forget_call(model)
        return None
    parts, table, settings, isa, _ = ready.call
    ids, types = given["input_ids"], given.get("token_type_ids")
    return padded_encoder(ids, types, mask, parts, table, settings, isa, first_only)


def prepare(model: Any, structure: Structure, options: Any) -> None:
    """Keeps for `answer` what it needs, if the model is fit for it as it is now."""
    plain = structure.plain
    if plain is None or plain.weights[0].device.type != "cpu":  # a GPU's host has no time for more
        return
    if prepared(model) or _watched():
        return
    if (fit := _fit(model, structure, options)) is None:
        return
    parts, settings, isa = fit
    around = [part for part in parts if part is not None]
    weights = plain.weights + around
    begun = begin(weights)
    table = table_of(plain.weights, plain.heads, parts.word, isa, settings.int8)
    stamp = stamp_of(weights, begun, table.weights + around)
    call = _Call(parts, table, settings, isa, most_tokens(structure.embeddings.module))
    model.__dict__[_READY] = _Ready(model, structure, call, weights, stamp)


def _watched() -> bool:
    """Whether gradients are recorded, or somebody takes part who does not see into C++."""
    return (
        torch.is_grad_enabled()
        or tracing()
        or torch.is_autocast_enabled("cpu")
        or hooked_globally()
        or bool(reasons_against_now())
    )


def _serves(call: _Call, given: Mapping[str, Any]) -> bool:
    """Whether a call's inputs are ids, and at most types and a 2D mask of integers, on a CPU."""
    ids: Any = given.get("input_ids")
    mask, types = given.get("attention_mask"), given.get("token_type_ids")
    if type(ids) is not Tensor or ids.dim() != 2 or not ids.numel():
        return False
    shapes = (ids.shape, (1, ids.shape[1]))
    return (
        all(value is None or value is False or n in _SERVED for n, value in given.items())
        and ids.shape[1] <= call.most
        and _integers(ids, shapes[:1])
        and (mask is None or _integers(mask, shapes[:1], torch.bool))
        and (types is None or _integers(types, shapes))
    )


def _integers(x: Any, shapes: Sequence[Any], *dtypes: torch.dtype) -> bool:
    return (
        type(x) is Tensor
        and x.dtype in (torch.int64, torch.int32, *dtypes)
        and x.device.type == "cpu"
        and x.shape in shapes
    )


def _fit(model: Any, structure: Structure, options: Any) -> tuple[Parts, Settings, int] | None:
    """What C++ computes of the model, and for which instruction set; None where that is not all."""
    family, e, plain = structure.family, structure.embeddings, structure.plain
    if (
        plain is None
        or not (e.known and e.fused)
        or family.bias is not None
        or family.project(model) is not None
        or options.backend != "auto"
        or options.dtype == "fp8"
        or not (options.dtype == "int8" or preferred(e.words))
        or rate(e.dropout)
        or any(switch.training and dropout.p for switch, dropout in structure.dropouts)
        or reasons_against_one_call(structure)
        or e.positions is None
    ):
        return None
    if any(getattr(model.config, name, None) for name in _MORE) or not _pools(model, family):
        return None
    pooler = getattr(model, "pooler", None)
    pooling = (None, None) if pooler is None else (pooler.dense.weight, pooler.dense.bias)
    parts = Parts(e.words, e.positions, e.types, e.scale, e.shift, *pooling)
    tensors = [part for part in parts if part is not None]
    if reasons_against_copies(*plain.weights, *tensors):
        return None
    if any(odd(t, e.words) or not t.is_contiguous() for t in tensors):
        return None
    settings = Settings(
        e.norm.eps, first_position(e.module) - 1, plain.heads, plain.eps, plain.activation,
        options.dtype == "int8",
    )  # fmt: skip
    args = (e.words, None, None, None, None, plain.weights, plain.heads, 0, 0.0, "", settings.int8)
    kernel = ENCODER.choose(args, "auto").backend
    return (parts, settings, ISAS[kernel]) if kernel in ISAS else None


def _pools(model: Any, family: Family) -> bool:
    """Whether there is no pooler, or transformers' own: tanh(W h + b) of a first token."""
    pooler = getattr(model, "pooler", None)
    if pooler is None or family.pooled is not bert_pooled:
        return pooler is None and family.pooled in (None, bert_pooled)
    inside = [(name, type(module)) for name, module in pooler.named_children()]
    cls = type(pooler)
    home = cls.__module__ == cls.forward.__module__ == family.module
    return home and inside == [("dense", nn.Linear), ("activation", nn.Tanh)]
