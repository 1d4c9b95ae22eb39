"""What a forward needs to know of a model's modules: looked at once, kept while it is true."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from inspect import isfunction
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .families import Family, LayerParts
from .ops.backends import addresses, unchanged
from .ops.encoder import LAYER
from .ops.modes import recorded, tracing

# By the name of the activation's class, torch's or transformers'; any other runs unfused.
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}

# Modules whose forward hooks change nothing here: transformers collects hidden states by hooks
# that rest while it does not collect, and makes the embeddings require a gradient for
# checkpointing, which `run_layers` does by itself.
_HARMLESS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}


# What `ops.embed_layernorm` computes. A layer with more than that (boxes, paths, shapes of
# characters) or with other modules (LoRA's) runs as is.
_FUSED_EMBEDDINGS = {
    "word_embeddings": nn.Embedding,
    "position_embeddings": nn.Embedding,
    "token_type_embeddings": nn.Embedding,
    "LayerNorm": nn.LayerNorm,
    "dropout": nn.Dropout,
}


class Embeddings(NamedTuple):
    """The embedding layer: modules, for what may be set on them, and their tensors.

    known: whether it is transformers' own, which counts positions as `inputs` does.
    tables: of words, positions and types, where it has no other parts than those that
        `ops.embed_layernorm` computes; empty: what comes after has no meaning.
    """

    module: nn.Module
    word: nn.Embedding
    position: nn.Embedding | None
    words: Tensor
    positions: Tensor | None
    known: bool
    tables: tuple[nn.Embedding, ...] = ()
    type: nn.Embedding | None = None
    types: Tensor | None = None
    norm: Any = None
    scale: Any = None
    shift: Any = None
    dropout: Any = None

    @property
    def fused(self) -> bool:
        """Whether `ops.embed_layernorm` computes it, as its tables are set now."""
        return len(self.tables) > 0 and not any(
            t.max_norm is not None or t.scale_grad_by_freq or t.sparse for t in self.tables
        )


class Plain(NamedTuple):
    """Layers of nothing but plain modules, alike in their settings; weights one after the other."""

    weights: list[Tensor]
    heads: int
    eps: float
    activation: str
    width: int

    def of(self, layer: int) -> list[Tensor]:
        """The weights of one layer, in the order of `ops.encoder.LAYER`."""
        return self.weights[layer * len(LAYER) : (layer + 1) * len(LAYER)]


@dataclass(frozen=True)
class Structure:
    """A model's layers as modules and as their parts, in running order.

    family: the row by which they were found.
    embeddings: what comes before them; None only where there is a reason in `why`.
    why: the reasons, if any, why the packed forward cannot run on these modules.
    plain: the layers as `ops.encoder` takes them; None if they are more than what it computes.
    dropouts: those of the layers, in one list; see `LayerParts.dropouts`.
    """

    family: Family
    embeddings: Embeddings
    modules: Any
    layers: list[LayerParts]
    why: list[str]
    plain: Plain | None
    dropouts: list[tuple[nn.Module, nn.Module]]


# Called for every parameter in every forward: without a frame of Python each.
_dtype = attrgetter("dtype")


class KeptInModel:
    """What is kept in a model's `__dict__`: a global would keep for ever what refers back to the
    model, a hook of its owner's among it. A copy or a pickle of the model has None in its place."""

    def __reduce__(self) -> Any:
        return type(None), ()


class _Seen(KeptInModel):
    """A look at a model, and what tells that it is still true: that no inner module was replaced
    or wrapped, nothing set on one, and none moved to another dtype or device.

    Objects are kept with their addresses: as long as they live, no other is taken for them.
    """

    structure: Structure

    def __init__(self, model: Any) -> None:
        self.hooks, self.children = RemovableHandle.next_id, model._modules
        modules = tuple(model.modules())[1:]  # not the model, which keeps this
        insides = [module.__dict__ for module in modules]
        parts = [inside[n] for n in ("_parameters", "_modules", "_buffers") for inside in insides]
        dicts = (model._modules, *insides, *filter(None, parts))
        self.alive = list(map(type, modules)), [[*one, *one.values()] for one in dicts]
        self.objects, self.known = (modules, dicts), addresses(modules, dicts)
        own = chain.from_iterable(inside["_parameters"].values() for inside in insides)
        self.parameters = [parameter for parameter in own if parameter is not None]
        self.places = self._places()
        embeddings = model._modules.get("embeddings")
        found = [] if embeddings is None else embeddings._buffers.values()
        self.buffers = [b for b in found if b is not None and not b.is_inference()]
        self.written = self._written()

    def _places(self) -> tuple[list[Any], ...]:
        there = self.parameters
        return list(map(_dtype, there)), list(map(Tensor.get_device, there))

    def _written(self) -> list[int]:
        return [buffer._version for buffer in self.buffers]

    def holds(self, model: nn.Module) -> bool:
        """Whether the structure is as it was; of dtypes and devices, `in_place` tells."""
        # Every hook that is registered, on whatever module, takes the next number: while that
        # stands still, no hook has come to a model that had none.
        if self.hooks != RemovableHandle.next_id:
            if hooked_inside(model):
                return False
            self.hooks = RemovableHandle.next_id
        return (
            self.children is model._modules  # a replica (DataParallel) has its original's look
            and unchanged(*self.objects, self.known)
            and self.written == self._written()
        )

    def in_place(self) -> bool:
        return self.places == self._places()


_SEEN = "_bert_fast_seen"


def forget_structure(model: nn.Module) -> None:
    """Drops what was looked at."""
    model.__dict__.pop(_SEEN, None)


def structure_of(model: nn.Module, family: Family) -> Structure:
    """The structure of a family's model as it is now."""
    if tracing():
        return _look(model, family)
    found = model.__dict__.get(_SEEN)
    if (
        found is None
        or not found.holds(model)
        or not found.in_place()
        or found.structure.modules != family.layers(model)  # ALBERT's are counted by its config
    ):
        # Taken before the look: what another thread changes meanwhile is told by the next call.
        found = _Seen(model)
        found.structure = _look(model, family)
        if found.structure.why:  # to be looked at anew; nothing stays in a model left as it was
            forget_structure(model)
        else:
            model.__dict__[_SEEN] = found
    return found.structure


def is_structure_of(structure: Structure, model: nn.Module) -> bool:
    """Whether nothing of the model's modules has changed, nor what is set on them, since
    `structure_of` gave this. Where its tensors are and what of, the caller watches."""
    found = model.__dict__.get(_SEEN)
    return found is not None and found.structure is structure and found.holds(model)


def _look(model: nn.Module, family: Family) -> Structure:
    embeddings: Any = None
    modules: Any = []
    try:
        modules, why = family.layers(model), reasons_against_layers(model, family)
        if (kind := model.embeddings.word_embeddings.weight.device.type) not in ("cpu", "cuda"):
            why.append(f"parameters are on {kind}")
        if found := hooked_inside(model):
            why.append(f"a hook or a replaced method sits on an inner {type(found).__name__}")
        if not why:  # to look at a GPU's buffers is to wait for it
            embeddings = _embeddings(model.embeddings, family)
    except AttributeError as error:
        why = [f"its modules have another layout than {family.model}'s ({error})"]
    layers = [] if why else [family.parts(module) for module in modules]
    dropouts = [pair for m in layers for pair in m.dropouts()]
    return Structure(family, embeddings, modules, layers, why, _plain(layers), dropouts)


def _embeddings(module: nn.Module, family: Family) -> Embeddings:
    word, position = module.word_embeddings, getattr(module, "position_embeddings", None)
    known = type(module).__module__ == family.module and _buffers_as_made(module)
    parts = module, word, position, word.weight, getattr(position, "weight", None), known
    children = dict(module.named_children())
    if not known or any(type(m) is not _FUSED_EMBEDDINGS.get(n) for n, m in children.items()):
        return Embeddings(*parts)
    tables = tuple(m for m in children.values() if isinstance(m, nn.Embedding))
    kind, norm = getattr(module, "token_type_embeddings", None), module.LayerNorm
    weights = [m.weight for m in (*tables, norm)]
    if any(odd(weight, word.weight) for weight in (*weights, norm.bias)):
        return Embeddings(*parts)
    types = None if kind is None else kind.weight
    return Embeddings(*parts, tables, kind, types, norm, norm.weight, norm.bias, module.dropout)


def _buffers_as_made(module: nn.Module) -> bool:
    """Whether positions are columns and types 0 where none are given, as transformers has it."""
    for name, numbers in (("position_ids", torch.arange), ("token_type_ids", torch.zeros)):
        buffer = module._buffers.get(name)
        if buffer is None or buffer.is_meta or tracing() or (buffer.is_cuda and recorded()):
            continue  # there are no values to look at
        expected = numbers(buffer.shape[-1], dtype=buffer.dtype, device=buffer.device)
        if not torch.equal(buffer, expected.expand_as(buffer)):
            return False
    return True


def _plain(layers: list[LayerParts]) -> Plain | None:
    weights: list[Tensor] = []
    for m in layers:
        if any(type(part) is not nn.Linear or part.bias is None for _, part in m.linears()):
            return None
        three = (m.query, m.key, m.value)
        rest = (m.out, m.out_norm, m.up, m.down, m.down_norm)
        weights += [part.weight for part in three]
        weights += [part.bias for part in three]
        weights += [tensor for part in rest for tensor in (part.weight, part.bias)]
    settings = {
        (m.query.weight.shape[0], m.width, norm.eps, activation_name(m.activation))
        for m in layers
        for _, norm in m.norms()
    }
    if len(settings) != 1:
        return None
    inside, width, eps, activation = settings.pop()
    if activation is None or inside % width:
        return None
    return Plain(weights, inside // width, eps, activation, width)


def activation_name(activation: nn.Module | str) -> str | None:
    """Which of `ops`' activations this is; None for any other."""
    if isinstance(activation, str):
        return activation
    cls = type(activation)
    home = cls.__module__.startswith(("torch.nn.", "transformers."))
    return ACTIVATIONS.get(cls.__name__) if home else None


# -- where the packed forward does not apply ------------------------------------------------


def reasons_against_layers(model: nn.Module, family: Family) -> list[str]:
    """Why the packed forward cannot run on this model's layers: their classes, dtypes, devices."""
    weight = model.embeddings.word_embeddings.weight
    layers = list(family.layers(model))
    leaves: set[nn.Module | None] = {family.project(model)}
    for layer in layers:
        cls = type(layer)
        if cls.__name__ != family.layer or cls.__module__ != family.module:
            return [f"a layer is {cls.__qualname__}, not transformers' {family.layer}"]
        parts = family.parts(layer)
        leaves |= parts.leaves()
        if why := _unfit(parts, weight):
            return [why]
        own = getattr(parts.attention, "config", model.config)
        if own is not model.config and _attention_of(own) != _attention_of(model.config):
            return [f"a layer's own config asks for {_attention_of(own)!r} attention"]
    around = [child for child in model.children() if layers and layers[0] in child.modules()]
    for child in around:
        if found := foreign(child, leaves, family.module):
            return [f"a {type(found).__qualname__} around its layers is not transformers'"]
    return []


def foreign(module: nn.Module, leaves: Container[Any], home: str) -> Any:
    """The first module around the leaves whose class, and so its forward, is somebody else's."""
    if module in leaves:
        return None
    where = type(module).__module__
    if where != home and not where.startswith("torch.nn."):
        return module
    found = (foreign(child, leaves, home) for child in module.children())
    return next(filter(lambda one: one is not None, found), None)


def _unfit(parts: LayerParts, weight: Tensor) -> str | None:
    for name, part in parts.linears():
        if type(part) is nn.Linear:
            if why := odd(part.weight, weight) or (
                part.bias is not None and odd(part.bias, weight)
            ):
                return why
        elif not (hasattr(part, "in_features") and hasattr(part, "out_features")):
            return f"{name} is {type(part).__qualname__}, not a linear projection"
    for name, part in parts.norms():
        if type(part) is not nn.LayerNorm:
            return f"{name} is {type(part).__qualname__}, not nn.LayerNorm"
        if part.weight is None or part.bias is None:
            return f"{name} has no weight or no bias"
        if why := odd(part.weight, weight) or odd(part.bias, weight):
            return why
    for _, dropout in parts.dropouts():
        if type(dropout) is not nn.Dropout:
            return f"a dropout is {type(dropout).__qualname__}, not nn.Dropout"
    if getattr(parts.attention, "is_causal", False):
        return "its attention is causal"
    return None


def _attention_of(config: Any) -> Any:
    """Which attention a config asks transformers for."""
    return vars(config).get("_attn_implementation_internal")


def odd(parameter: Tensor, weight: Tensor) -> str | None:
    """How a parameter differs from what the ops take beside `weight`."""
    if parameter.dtype != weight.dtype or parameter.device != weight.device:
        return "parameters differ in dtype or device"
    if type(parameter).__name__ not in ("Parameter", "FakeTensor"):  # the latter under export
        return f"parameters are {type(parameter).__name__}"
    return None


def hooked_inside(model: nn.Module) -> nn.Module | None:
    """The first inner module with a hook."""
    for module in model._modules.values():
        if module is None:
            continue
        if hooked(module):
            return module
        if found := hooked_inside(module) if module._modules else None:
            return found
    return None


_DYNAMO_ITERATES = torch.__version__ >= (2, 13)  # over a `__dict__`; 2.11's does not


def hooked(module: nn.Module) -> bool:
    """Whether somebody else takes part in what it computes; or one of its methods is replaced."""
    if module._forward_pre_hooks or sees_output(module):
        return True
    if not _DYNAMO_ITERATES and torch.compiler.is_compiling():
        return "forward" in module.__dict__
    cls = type(module)
    return any(isfunction(getattr(cls, name, None)) for name in module.__dict__)


def sees_output(module: nn.Module) -> bool:
    """Whether somebody else reads, or changes, what the module returns."""
    return bool(module._backward_hooks or module._backward_pre_hooks) or any(
        getattr(hook, "__module__", "") not in _HARMLESS for hook in module._forward_hooks.values()
    )
