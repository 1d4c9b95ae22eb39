"""The packed class of a Hugging Face model class: same name, parameters and signature, another
forward. Where that forward does not apply, Hugging Face's own runs, and says why once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .families import BY_CLASS, Family, bert_pooled
from .graphs import bucket_of, forget_graphs, graphs_of
from .graphs import look as look_at_graphs
from .graphs import reasons_against as reasons_against_graph
from .inputs import Batch, read_batch
from .modeling import packed_forward
from .notice import warn_once
from .one_call import answer, forget_call, prepare, prepared
from .ops.weight_copies import forget
from .padding import Packing
from .paths import Backend, chosen, hooked_globally, reasons_against_now
from .structure import Structure, sees_output, structure_of
from .swap import Swapped, arguments, swapped_class

OPTIONS = "_bert_fast"
# The keywords by which a head of ours asks its encoder for the packed states (all of them, or a
# function's choice: `PackedStates.rows`), or says that it reads each sequence's first token only.
AS_PACKED = "bert_fast_packed"
FIRST_ONLY = "bert_fast_first_only"
REAL_ONLY = "bert_fast_real_only"
WORDS = (AS_PACKED, FIRST_ONLY, REAL_ONLY)
# The arguments of an encoder's forward that are read here, with those that no encoder reads alone.
# Another one is for transformers: a new one of a later version too, and a cache by its older name.
_READ = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "encoder_attention_mask", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict",
}  # fmt: skip
_OLDER = "past_key_values"


@dataclass(frozen=True)
class Options:
    """What `accelerate` was told of one model.

    keep_padding: padded positions are computed too, because the head above reads them.
    checkpoint: one of `modeling.CHECKPOINTS`.
    sparse_logits: a masked-LM head that is given labels leaves out the logits of other tokens.
    graphs: small batches on a GPU replay CUDA graphs; see `graphs`.
    dtype: "int8" or "fp8": in inference, that of products with the layers' weights; or None.
    """

    backend: Backend = "auto"
    keep_padding: bool = False
    sparse_logits: bool = False
    checkpoint: str = "none"
    dtype: str | None = None
    graphs: bool = False


_DEFAULT = Options()


class PackedStates(NamedTuple):
    """What an encoder hands to a head of ours instead of padded outputs.

    h: [T, H], or [R, H] of the packed tokens `rows` [R] int64, ascending, that the head asked for.
    pooled(): the pooler's output [B, H] or None; `rows` must then hold every first token.
    """

    h: Tensor
    packing: Packing
    pooled: Callable[[], Tensor | None]
    hidden_states: tuple[Tensor | None, ...] | None
    attentions: tuple[Tensor, ...] | None = None
    rows: Tensor | None = None


class KeepsCopies(Swapped):
    """Of classes whose forward keeps copies of the model's weights."""

    def train(self, mode: bool = True) -> Any:
        if mode:  # each step would make them stale; `eval()` is called before every inference
            forget_copies(self)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = _places(self)
        _let_be_swapped(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        if _places(self) != before:  # many a caller moves a model to where it is, before every use
            forget_copies(self)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # before its children's
        _let_be_swapped(self)
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


def _let_be_swapped(model: Any) -> None:
    """torch can be asked to swap parameters, not write to them; it cannot where copies are kept."""
    if torch.__future__.get_swap_module_params_on_conversion():
        forget_copies(model)


class Packed(KeepsCopies):
    """What packed classes share; `last_hidden_state` and `hidden_states` are zero at padding."""

    bert_fast_family: ClassVar[Family]
    bert_fast_unread: ClassVar[tuple[str, ...]]


@functools.cache
def packed_class(original: type) -> type:
    """The packed class of a model class of some family."""
    family = BY_CLASS[original.__module__, original.__name__]
    created: Any = swapped_class(
        original,
        Packed,
        packed_class,
        _forward,
        f"transformers' {original.__name__} with a packed, fused forward.\n\n"
        "Same constructor, parameters, state_dict keys, signature and outputs;\n"
        "`last_hidden_state` and `hidden_states` are zero at padded positions.",
        bert_fast_family=family,
    )
    read = {*_READ, *family.extra}
    names = (*created.bert_fast_arguments, _OLDER)
    created.bert_fast_unread = tuple(name for name in names if name not in read)
    # Hugging Face finds which outputs a class can record (hidden states, attentions) by its name,
    # which __init__ notes: not that of an instance out of a pickle.
    recorded = getattr(original, "_can_record_outputs", None)
    dict.setdefault(_CAN_RECORD_REGISTRY, str(created), recorded)
    return created


def _forward(cls: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    words = {name: kwargs.pop(name) for name in WORDS if name in kwargs}
    as_packed, real_only = words.get(AS_PACKED, False), words.get(REAL_ONLY, False)
    given, family = arguments(cls, args, kwargs), cls.bert_fast_family
    options = options_of(model)
    whole, first_only = options.keep_padding and not real_only, words.get(FIRST_ONLY, False)
    may = prepared(model) and not as_packed and not reasons_against_kind(model)
    if may and (found := answer(model, given, first_only, whole)):
        return _outputs(model, family, given, *found)
    why = reasons_against_call(cls, model, given)
    if not why:  # nor would a trace for TorchScript like to see it looked at
        structure = structure_of(model, family)
        why = reasons_against(model, structure)
    if why:
        tell(why)
        return cls.bert_fast_original.forward(model, *args, **kwargs)
    if options.graphs:
        look_at_graphs(model, structure)
    batch = read_batch(structure, given, whole)
    states: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        # Through the padded form and back, so that a gradient asked of a hidden state exists.
        states.append(batch.packing.pad(h, chosen(options.backend, "pad")))
        if not h.requires_grad:
            return h
        return batch.packing.unpad(states[-1], chosen(options.backend, "unpad"))

    collect = asked(model, given, "output_hidden_states")
    between = keep if collect else None  # an index of 0, too, is no wish to transformers
    packing, rows = batch.packing, None
    if not between:
        rows = rows_read(words, packing)
    h = _encoded(model, structure, batch, options, between, rows)
    if as_packed:

        def pool() -> Tensor | None:
            if family.pooled is None or not packing.length:
                return None
            starts = packing.starts()
            at = starts if rows is None else torch.searchsorted(rows, starts)
            return family.pooled(model, h[at].unsqueeze(1))

        collected = _selected(states, collect) if between else None
        return PackedStates(h, packing, pool, collected, rows=rows)
    if rows is not None:
        last = h.unsqueeze(1)
    else:
        last = states[-1] if between else packing.pad(h, chosen(options.backend, "pad"))
    if not between:
        prepare(model, structure, options)
    pooled = family.pooled(model, last) if family.pooled and last.shape[1] else None
    collected = _selected(states, collect) if between else None
    return _outputs(model, family, given, last, pooled, collected)


def _outputs(
    model: Any,
    family: Family,
    given: dict[str, Any],
    last: Tensor,
    pooled: Tensor | None,
    states: tuple[Tensor | None, ...] | None = None,
) -> Any:
    """The outputs as transformers has them, `states` being the hidden ones that are asked for."""
    fields: dict[str, Any] = {"last_hidden_state": last}
    if family.pooled is not None:
        fields["pooler_output"] = pooled
    if states is not None:
        fields["hidden_states"] = states
    output = getattr(modeling_outputs, family.output)(**fields)
    if asked(model, given, "return_dict", True):
        return output
    if family.pooled_in_tuple:
        last, pooled, *rest = fields.values()
        return (last, pooled, *rest)
    return output.to_tuple()


def rows_read(words: Mapping[str, Any], packing: Packing) -> Tensor | None:
    """The packed tokens that a head says it reads, [R] int64; None for all."""
    if packing.length and callable(words.get(AS_PACKED)):
        return words[AS_PACKED](packing)
    return packing.starts() if packing.length and words.get(FIRST_ONLY) else None


def _encoded(
    model: Any,
    structure: Structure,
    batch: Batch,
    options: Options,
    between: Callable[[Tensor], Tensor] | None,
    rows: Tensor | None,
) -> Tensor:
    """The packed forward, replayed from a graph where that serves."""
    backend, dtype = options.backend, options.dtype

    def run(batch: Batch, rows: Tensor | None) -> Tensor:
        return packed_forward(
            model, structure, batch, backend, between, options.checkpoint, rows, dtype
        )

    if not options.graphs or between or reasons_against_graph(structure, batch):
        return run(batch, rows)
    return graphs_of(model, structure)(bucket_of(batch, rows), batch, rows, run)


def asked(model: Any, given: dict[str, Any], name: str, default: Any = None) -> Any:
    value = given.get(name)
    if value is not None:
        return value
    settings = vars(model.config)  # where they are; getattr goes through transformers' own first
    return settings[name] if name in settings else getattr(model.config, name, default)


def _selected(states: list[Tensor], which: Any) -> tuple[Tensor | None, ...]:
    """All hidden states, or None where an index or a list of indices does not ask for it."""
    if which is True:
        return tuple(states)
    indices = {which} if isinstance(which, int) else set(which)
    kept = {i % len(states) for i in indices if -len(states) <= i < len(states)}
    return tuple(state if i in kept else None for i, state in enumerate(states))


def options_of(model: nn.Module) -> Options:
    """What an accelerated model was given."""
    return model.__dict__.get(OPTIONS, _DEFAULT)


def _places(model: Any) -> list[tuple[torch.device, torch.dtype]]:
    return [(p.device, p.dtype) for p in model.parameters()]


NO_WORD = "its encoder is not accelerated, or its pooler or a hook reads all that it returns"


def takes_word(encoder: Any) -> bool:
    """Whether a head may say what it reads: nobody else is there to read the encoder's output, and
    the pooler is transformers' own, which of each sequence reads the first token."""
    cls = type(encoder)
    return (
        issubclass(cls, Packed)
        and _runs_ours(cls)
        and "forward" not in encoder.__dict__
        and not sees_output(encoder)
        and _pools_first(cls.bert_fast_family, encoder)
    )


def _runs_ours(cls: type) -> bool:
    """Whether the forward of a packed class, or of a class on one, is the packed one."""
    return "bert_fast_original" in vars(next(one for one in cls.__mro__ if "forward" in vars(one)))


def _pools_first(family: Family, encoder: Any) -> bool:
    pooler = getattr(encoder, "pooler", None)
    if pooler is None or family.pooled is not bert_pooled:  # none, or it is handed first tokens
        return True
    return type(pooler).__module__ == family.module


def forget_copies(model: Any) -> None:
    """Drops every copy made of the model's weights, and what reads them: graphs, the one call."""
    forget_graphs(model)
    forget_call(model)
    for parameter in model.parameters():
        forget(parameter)


# -- where the packed forward does not apply ------------------------------------------------


def reasons_against(model: Any, structure: Structure) -> list[str]:
    """Why the packed forward cannot run on this model as it is now (empty: it can)."""
    why = reasons_against_kind(model) or list(structure.why)
    if hooked_globally():
        why.append("global module hooks are registered")
    if model.training and any(dropout.p == 1.0 for _, dropout in structure.dropouts):
        why.append("a dropout drops all (p = 1)")
    return why


def reasons_against_kind(model: Any) -> list[str]:
    """Why the packed forward cannot run on this kind of model."""
    config = vars(model.config)
    if config.get("is_decoder") or config.get("add_cross_attention"):
        return ["it is a decoder or has cross-attention"]
    name = config.get("_attn_implementation_internal")
    if _somebodys(ALL_ATTENTION_FUNCTIONS, name) or _somebodys(ALL_MASK_ATTENTION_FUNCTIONS, name):
        return [f"its attention is {name!r}, which is not transformers' own"]
    return []


def _somebodys(registry: Mapping[Any, Any], name: Any) -> bool:
    """Whether what transformers calls by this name was registered by somebody else, and is not a
    kernel of the Hub ("owner/repository"), which computes the same."""
    if name and "/" in name:
        return False
    found = registry.get(name)
    home = getattr(getattr(found, "func", found), "__module__", None) or ""
    return found is not None and not home.startswith(("transformers.", "bert_fast."))


def reasons_against_call(cls: Any, model: Any, given: dict[str, Any]) -> list[str]:
    """Why the packed forward cannot answer this call."""
    why = [f"{name} is given" for name in cls.bert_fast_unread if given.get(name) is not None]
    if asked(model, given, "output_attentions"):
        why.append("output_attentions: the fused attention never forms the probabilities")
    if given.get("is_causal") or vars(model.config).get("is_causal"):
        why.append("is_causal is given")
    mask = given.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        why.append(f"attention_mask is a {type(mask).__name__}")
    elif mask is not None and mask.requires_grad:
        why.append("attention_mask wants a gradient")
    trains = torch.is_grad_enabled() and cls.bert_fast_family.bias is not None
    if trains and model.encoder.relative_attention_bias.weight.requires_grad:
        why.append("the relative position bias is being trained")
    return why + reasons_against_now()


def tell(why: list[str]) -> None:
    if not torch.compiler.is_compiling():
        for reason in why:
            warn_once(f"bert_fast: Hugging Face's own forward runs: {reason}")
