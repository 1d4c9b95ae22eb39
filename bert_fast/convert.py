"""accelerate, restore, report, and BertModel: where Hugging Face's classes meet the ops.

The only file that imports transformers' model code. `accelerate` swaps the class of each inner
BertModel for the one below: same parameters, same state_dict, same name, another forward.
Where that forward does not apply, Hugging Face's own runs, and says why once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as hf
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from . import ops
from .inputs import Batch, read_batch
from .modeling import (
    ACTIVATIONS,
    Backend,
    LayerParts,
    chosen,
    embed,
    forget_packed,
    run_layers,
)
from .padding import Packing

_OPTIONS = "_bert_fast"


@dataclass(frozen=True)
class Options:
    """What `accelerate` was told of one BertModel.

    keep_padding: padded positions are computed too, because the head above reads them.
    """

    backend: Backend = "auto"
    keep_padding: bool = False


_DEFAULT = Options()

# Modules whose forward hooks change nothing here: transformers collects hidden states by hooks
# that rest while it does not collect, and makes the embeddings require a gradient for
# checkpointing, which `run_layers` does by itself.
_HARMLESS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}


class BertModel(hf.BertModel):
    """Hugging Face's BertModel with a packed, fused forward.

    Same constructor, parameters, state_dict keys, signature and outputs as
    `transformers.BertModel`; `last_hidden_state` and `hidden_states` are zero at padded positions.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...] | BaseModelOutputWithPoolingAndCrossAttentions:
        """Shapes, dtypes and outputs as in `transformers.BertModel.forward`.

        Raises: ValueError or TypeError, naming the argument, for ids of a wrong kind or shape, a
            length over the position table, a mask that fits neither [B, S] nor [B, N, S, S].
        """
        extra = {
            "encoder_hidden_states": encoder_hidden_states,
            "past_key_values": past_key_values,
            "use_cache": use_cache or None,
        }
        why = reasons_against_call(self, {**kwargs, **extra}) or reasons_against(self)
        if why:
            _tell(why)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        batch = read_batch(
            self.embeddings,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            kwargs.get("cu_seq_lens_q"),
            kwargs.get("max_length_q"),
            keep_padding=options_of(self).keep_padding,
        )
        collect = self._asked(kwargs, "output_hidden_states")
        output = packed_forward(self, batch, options_of(self).backend, collect)
        return output if self._asked(kwargs, "return_dict", True) else output.to_tuple()

    def _asked(self, kwargs: dict[str, Any], name: str, default: bool = False) -> Any:
        value = kwargs.get(name)
        return getattr(self.config, name, default) if value is None else value

    def train(self, mode: bool = True) -> BertModel:
        forget_packed(self.encoder)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> BertModel:
        forget_packed(self.encoder)
        return super()._apply(fn, recurse)


# Hugging Face finds which outputs a class can record (hidden states, attentions) by the name of
# the class; ours records the same, also for instances that never ran __init__ (swapped, unpickled).
dict.__setitem__(_CAN_RECORD_REGISTRY, str(BertModel), hf.BertModel._can_record_outputs)


def packed_forward(
    model: nn.Module, batch: Batch, backend: Backend, collect: bool
) -> BaseModelOutputWithPoolingAndCrossAttentions:
    """Unpad once, run every layer on packed tokens, pad once."""
    packing: Packing = batch.packing
    h = embed(
        model.embeddings,
        batch.input_ids,
        batch.token_type_ids,
        batch.position_ids,
        batch.inputs_embeds,
        backend,
    )
    states: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        # Through the padded form and back, so that a gradient asked of a hidden state exists.
        states.append(packing.pad(h, chosen(backend, "pad")))
        return packing.unpad(states[-1], chosen(backend, "unpad")) if h.requires_grad else h

    activation = ACTIVATIONS[model.config.hidden_act]
    h = run_layers(
        model.encoder, activation, h, batch.sequences, backend, keep if collect else None
    )
    last = states[-1] if collect else packing.pad(h, chosen(backend, "pad"))
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last,
        pooler_output=model.pooler(last) if model.pooler is not None and last.shape[1] else None,
        hidden_states=tuple(states) if collect else None,
    )


def accelerate(model: nn.Module, backend: Backend = "auto", verbose: bool = False) -> nn.Module:
    """Makes every Hugging Face BertModel inside `model` run packed and fused, in place.

    Args:
        model: a BertModel, a Bert* head, or any module that contains one.
        backend: "auto", one backend for every op, or a mapping from op name to backend; a forced
            backend that cannot run raises, with every kernel's reasons.
        verbose: print `report(model)`.

    Returns: the same object. Parameters, state_dict, dtype and device are not touched;
        `restore` undoes the change.
    Raises: ValueError if there is nothing to accelerate, with the reasons; for an unknown op or
        backend.
    """
    _check_backend(backend)
    found = [m for m in model.modules() if is_bert(m)]
    if not found:
        raise ValueError(
            f"bert_fast.accelerate: {type(model).__name__} contains no transformers BertModel"
        )
    # A question-answering head takes its softmax over every position, padded ones included.
    read_whole = {m.bert for m in model.modules() if isinstance(m, hf.BertForQuestionAnswering)}
    refused = {}
    for module in found:
        if type(module) not in (hf.BertModel, BertModel):
            refused[module] = [f"{type(module).__qualname__} is a subclass with code of its own"]
        elif why := reasons_against_structure(module):
            refused[module] = why
        else:
            module.__class__ = BertModel
            module.__dict__[_OPTIONS] = Options(backend, module in read_whole)
    if len(refused) == len(found):
        told = "; ".join(sorted({reason for why in refused.values() for reason in why}))
        raise ValueError(f"bert_fast.accelerate: cannot accelerate this model: {told}")
    if verbose:
        print(report(model))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: the model's own classes run again. Returns the same object."""
    for module in model.modules():
        if type(module) is BertModel and _OPTIONS in module.__dict__:
            forget_packed(module.encoder)
            del module.__dict__[_OPTIONS]
            module.__class__ = hf.BertModel
    return model


@dataclass(frozen=True)
class Report:
    """Per module: accelerated, and if not, why. `str()` gives a text of one line each."""

    swapped: dict[str, str]
    skipped: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{name}: accelerated ({how})" for name, how in self.swapped.items()]
        lines += [f"{name}: not accelerated: {'; '.join(w)}" for name, w in self.skipped.items()]
        return "\n".join(lines) or "no transformers BertModel inside"


def report(model: nn.Module) -> Report:
    """Which inner BertModels run packed and fused, and why the others do not.

    A module that is accelerated but in a state that its packed forward cannot serve (a hook, an
    adapter put in later) is listed as skipped with the reason; Hugging Face's forward runs there.
    """
    result = Report({}, {})
    for name, module in model.named_modules():
        if not is_bert(module):
            continue
        name = name or type(module).__name__
        why = reasons_against(module) if isinstance(module, BertModel) else []
        if isinstance(module, BertModel) and not why:
            options = options_of(module)
            kept = ", padding kept: its head reads every position" * options.keep_padding
            result.swapped[name] = f"backend {options.backend}{kept}"
        else:
            result.skipped[name] = (
                why or reasons_against_structure(module) or ["accelerate was not called on it"]
            )
    return result


def is_bert(module: nn.Module) -> bool:
    """Whether `accelerate` considers this module."""
    return isinstance(module, hf.BertModel)


def options_of(model: nn.Module) -> Options:
    """What an accelerated BertModel was given."""
    return model.__dict__.get(_OPTIONS, _DEFAULT)


# -- where the packed forward does not apply ------------------------------------------------


def reasons_against(model: nn.Module) -> list[str]:
    """Why the packed forward cannot run on this model as it is now (empty: it can)."""
    why = reasons_against_structure(model)
    for module in model.modules():
        if module is not model and _hooked(module):
            why.append(f"a hook or a replaced forward sits on an inner {type(module).__name__}")
            break
    rule = torch.nn.modules.module
    if rule._global_forward_hooks or rule._global_forward_pre_hooks:
        why.append("global module hooks are registered")
    return why


def reasons_against_structure(model: nn.Module) -> list[str]:
    """Why the packed forward can never run on this model: its classes, sizes, dtypes."""
    config, why = model.config, []
    if config.is_decoder or config.add_cross_attention:
        why.append("it is a decoder or has cross-attention")
    act = config.hidden_act
    if act not in ACTIVATIONS:
        why.append(f"hidden_act is {act!r}, not one of {sorted(ACTIVATIONS)}")
    kinds = (*[nn.Linear] * 3, nn.Dropout, nn.Linear, nn.LayerNorm, nn.Dropout)
    kinds = (*kinds, nn.Linear, nn.Linear, nn.LayerNorm, nn.Dropout)
    weight = model.embeddings.word_embeddings.weight
    for layer in model.encoder.layer:
        if type(layer) is not hf.BertLayer:
            return [*why, f"a layer is {type(layer).__qualname__}, not transformers' BertLayer"]
        parts = LayerParts.of(layer)
        for name, part, kind in zip(LayerParts._fields, parts, kinds, strict=True):
            if type(part) is not kind:
                return [*why, f"{name} is {type(part).__qualname__}, not nn.{kind.__name__}"]
        for parameter in parts.parameters():
            if parameter is None:
                return [*why, "a projection has no bias or a LayerNorm no weight"]
            if parameter.dtype != weight.dtype or parameter.device != weight.device:
                return [*why, "parameters differ in dtype or device"]
            if type(parameter) is not nn.Parameter:
                return [*why, f"parameters are {type(parameter).__name__}"]
        if not why and type(layer.intermediate.intermediate_act_fn) is not _activation_type(act):
            return [*why, f"the activation module is not that of hidden_act={act!r}"]
    if weight.device.type not in ("cpu", "cuda"):
        why.append(f"parameters are on {weight.device.type}")
    return why


def reasons_against_call(model: nn.Module, kwargs: dict[str, Any]) -> list[str]:
    """Why the packed forward cannot answer this call."""
    if torch.compiler.is_compiling():  # first and alone: what follows is nothing to trace
        return ["torch.compile or torch.export is tracing"]
    why = [
        f"{name} is given"
        for name in ("encoder_hidden_states", "past_key_values", "use_cache")
        if kwargs.get(name) is not None
    ]
    if kwargs.get("output_attentions", getattr(model.config, "output_attentions", False)):
        why.append("output_attentions: the fused attention never forms the probabilities")
    hidden = kwargs.get("output_hidden_states")
    if hidden is not None and not isinstance(hidden, bool):
        why.append("output_hidden_states selects layers")
    device = model.embeddings.word_embeddings.weight.device
    if torch.is_autocast_enabled(device.type):
        why.append("torch.autocast is on")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        why.append("a torch.func transform is active")
    return why


@functools.cache
def _activation_type(name: str) -> type:
    return type(ACT2FN[name])


def _hooked(module: nn.Module) -> bool:
    if "forward" in module.__dict__ or module._forward_pre_hooks or module._backward_hooks:
        return True
    return any(
        getattr(hook, "__module__", "") not in _HARMLESS for hook in module._forward_hooks.values()
    )


def _check_backend(backend: Backend) -> None:
    if not isinstance(backend, str | Mapping):
        return  # a chooser decides per call
    values = [backend] if isinstance(backend, str) else list(backend.values())
    for name in () if isinstance(backend, str) else backend:
        if name not in ops.OPS:
            raise ValueError(f"bert_fast.accelerate: no op {name!r}; ops are {sorted(ops.OPS)}")
    known = {kernel.backend for op in ops.OPS.values() for kernel in op.kernels} | {"auto"}
    for value in values:
        if value not in known:
            raise ValueError(
                f"bert_fast.accelerate: no backend {value!r}; backends are {sorted(known)}"
            )


def _tell(why: list[str]) -> None:
    if not torch.compiler.is_compiling():
        for reason in why:
            _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"bert_fast: Hugging Face's own forward runs: {reason}", stacklevel=4)
