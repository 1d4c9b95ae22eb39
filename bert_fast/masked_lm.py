"""The packed class of Hugging Face's masked-LM heads: same name, keys, signature, outputs, loss.

The head runs on packed tokens, and the loss on scored ones only, without their logits
(`ops.masked_lm_loss`). Where that does not apply, Hugging Face's own head runs. `splade` pools the
logits of such a model without making them.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .casting import cast
from .families import HEAD_BY_CLASS, Head, HeadParts
from .modeling import activated_linear, linear, normalized
from .ops.masked_lm_loss import IGNORED
from .packed import (
    AS_PACKED,
    NO_WORD,
    OPTIONS,
    KeepsCopies,
    Options,
    Packed,
    PackedStates,
    asked,
    forget_copies,
    options_of,
    takes_word,
    tell,
)
from .padding import Packing, pack_full
from .paths import Backend, chosen, reasons_against_now
from .structure import foreign, hooked, hooked_inside, odd
from .swap import arguments, encoder_of, put_back, swapped_class


class PackedHead(KeepsCopies):
    """What packed heads share."""

    bert_fast_head: ClassVar[Head]
    bert_fast_output: ClassVar[Any]


@functools.cache
def packed_head(original: type) -> type:
    """The packed class of a head class in `families.HEADS`."""
    row = HEAD_BY_CLASS[original.__module__, original.__name__]
    return swapped_class(
        original,
        PackedHead,
        packed_head,
        _forward,
        f"transformers' {original.__name__} with its loss on scored tokens only.",
        bert_fast_head=row,
        bert_fast_output=getattr(importlib.import_module(row.module), row.output),
    )


def is_head(model: Any) -> bool:
    """Whether `model` is, or may become, a packed head: a known class on a packed encoder."""
    known = (type(model).__module__, type(model).__name__) in HEAD_BY_CLASS
    return isinstance(encoder_of(model), Packed) and (known or isinstance(model, PackedHead))


def swap_head(model: Any, options: Options) -> None:
    """Makes a module that `is_head` run as a packed head."""
    if not isinstance(model, PackedHead):
        model.__class__ = packed_head(type(model))  # type: ignore[arg-type]
    model.__dict__[OPTIONS] = options


def restore_head(model: Any) -> None:
    """Undoes `swap_head`."""
    if isinstance(model, PackedHead) and model.__dict__.pop(OPTIONS, None) is not None:
        forget_copies(model)
        put_back(model)


def reasons_against_head(model: Any, row: Head) -> list[str]:
    """Why Hugging Face's own head has to run on this model as it is now (empty: ours runs)."""
    encoder: Any = encoder_of(model)
    if not takes_word(encoder):
        return [NO_WORD]
    try:
        parts, like = row.parts(model), encoder.embeddings.word_embeddings.weight
    except AttributeError as error:
        return [f"the head or its encoder has another layout ({error})"]
    for name, part, expected in (
        ("dense", parts.dense, nn.Linear),
        ("norm", parts.norm, nn.LayerNorm),
        ("decoder", parts.decoder, nn.Linear),
    ):
        if type(part) is not expected:
            return [f"the head's {name} is {type(part).__qualname__}, not {expected.__name__}"]
        if why := odd(part.weight, like):
            return [f"the head's {name}: {why}"]
    if parts.norm.bias is None:
        return ["the head's norm has no bias"]
    leaves = {*parts, row.pair and row.pair.classifier(model)}
    for child in model.children():
        if child is encoder:
            continue
        if hooked(child) or hooked_inside(child):
            return [f"a hook or a replaced method sits on the head's {type(child).__name__}"]
        # Others (a metric, a teacher) take no part.
        of_head = not leaves.isdisjoint(child.modules())
        if of_head and (found := foreign(child, leaves, row.module)):
            return [f"a {type(found).__qualname__} in its head is not transformers'"]
    return []


def reasons_against_loss(model: Any) -> list[str]:
    """Why its loss is not the mean cross-entropy (DistilBERT's is a module)."""
    loss = model._modules.get("mlm_loss_fct")
    if loss is None:
        return []
    plain = type(loss) is nn.CrossEntropyLoss and not hooked(loss)
    if plain:
        settings = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        plain = settings == (None, IGNORED, "mean", 0.0)
    return [] if plain else [f"its loss is {loss}"]


def _forward(cls: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    row, kind, original = cls.bert_fast_head, cls.bert_fast_output, cls.bert_fast_original
    options = options_of(model)
    why = reasons_against_head(model, row) or reasons_against_loss(model) or reasons_against_now()
    if why:
        tell(why)
        return original.forward(model, *args, **kwargs)
    given = arguments(cls, args, kwargs)
    labels = given.pop("labels", None)
    pair_labels = None if row.pair is None else given.pop(row.pair.labels, None)
    as_dict = asked(model, given, "return_dict", True)
    given.pop("return_dict", None)
    with_loss = labels is not None and (row.pair is None or pair_labels is not None)
    sparse = with_loss and options.sparse_logits
    scored = _Scored(labels, sparse, row.pair is not None) if with_loss else None
    wanted = True if scored is None or torch.compiler.is_compiling() else scored.rows
    states = _states(encoder_of(model)(**given, **{AS_PACKED: wanted}, return_dict=True))
    fields: dict[str, Any] = {}
    parts, at = row.parts(model), None
    if scored is not None:
        at, targets = scored.found(states)
        fields["loss"] = _loss(parts, states.h, at, targets, options.backend)
    if sparse and model.training:
        fields[row.logits] = None
    else:
        fields[row.logits] = _logits(parts, states, at if sparse else None, options.backend)
    if row.pair is not None:
        fields[row.pair.logits] = scores = row.pair.classifier(model)(states.pooled())
        if with_loss:
            other = F.cross_entropy(scores.view(-1, 2), pair_labels.view(-1))  # type: ignore[union-attr]
            fields["loss"] = fields["loss"] + other
    output = kind(**fields, hidden_states=states.hidden_states, attentions=states.attentions)
    return output if as_dict else output.to_tuple()


def _states(found: Any) -> PackedStates:
    """The encoder's packed states; those of Hugging Face's own forward are packed as they are."""
    if isinstance(found, PackedStates):
        return found
    last = found.last_hidden_state
    packing = pack_full(last.shape[0], last.shape[1], last.device)

    def pooled() -> Tensor | None:
        return getattr(found, "pooler_output", None)

    return PackedStates(last.flatten(0, 1), packing, pooled, found.hidden_states, found.attentions)


@dataclass
class _Scored:
    """The tokens that a masked-LM loss reads. They are counted as soon as the batch is packed: that
    waits for all that a GPU has been given to do, which later is the encoder too.

    only: the head reads no others, but with first_too each sequence's first.
    at: [n] int64, of the encoder's rows, ascending; targets: [n], their labels.
    """

    labels: Tensor
    only: bool
    first_too: bool
    at: Tensor | None = None
    targets: Tensor | None = None

    def rows(self, packing: Packing) -> Tensor | None:
        """The packed tokens that the encoder is asked for, ascending; None for all."""
        targets = self._packed(packing)
        rows, scored = None, targets != IGNORED
        if self.only:
            read = scored.index_fill(0, packing.starts(), True) if self.first_too else scored
            rows = read.nonzero().flatten()
            targets, scored = targets[rows], scored[rows]
        self.at = scored.nonzero().flatten()
        self.targets = targets[self.at]
        return rows

    def found(self, states: PackedStates) -> tuple[Tensor, Tensor]:
        """`at`, as a mask of all rows while torch.compile traces, and `targets`."""
        if torch.compiler.is_compiling():  # whose sizes may not depend on values
            targets = self._packed(states.packing)
            return targets != IGNORED, targets
        if self.at is None:  # nobody asked for `rows`: the encoder has returned all
            self.only = False
            self.rows(states.packing)
        assert self.at is not None and self.targets is not None
        return self.at, self.targets

    def _packed(self, packing: Packing) -> Tensor:
        return packing.labels(_checked(self.labels, packing), IGNORED)


def _checked(labels: Tensor, packing: Packing) -> Tensor:
    if labels.dim() == 1 and labels.shape[0] == packing.batch * packing.length:
        labels = labels.view(packing.batch, packing.length)  # transformers flattens them anyway
    if tuple(labels.shape) != (packing.batch, packing.length):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected ({packing.batch}, {packing.length})"
        )
    return labels.to(packing.cu_seqlens.device)


def _loss(parts: HeadParts, h: Tensor, at: Tensor, targets: Tensor, backend: Backend) -> Tensor:
    """The mean over scored tokens, in the dtype of the hidden states, as Hugging Face has it."""
    counted = at.dtype != torch.bool
    if counted:
        h = ops.unpad(h, at)
    x, weight, bias = _operands(parts, h, backend)
    use = chosen(backend, "masked_lm_loss")
    return ops.masked_lm_loss(x, weight, bias, targets, use, all_scored=counted).to(h.dtype)


def _logits(parts: HeadParts, states: PackedStates, at: Tensor | None, backend: Backend) -> Tensor:
    """[B, S, V], zeros at padding; [scored, V] of the rows `at`, where given."""
    h = states.h if at is None else states.h[at]
    logits = linear(parts.decoder, _transformed(parts, h, backend), backend)
    return logits if at is not None else states.packing.pad(logits, chosen(backend, "pad"))


def splade(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """SPLADE's sparse vectors: max over a text's tokens of log(1 + relu(logits)), arXiv 2109.10086.

    The logits, [B, S, V], are never held, in training neither (`ops.splade`).

    Args:
        model: a masked-LM model of transformers that `accelerate` has taken.
        args, kwargs: what its forward takes, without labels; attention_mask is 2D or None.

    Returns: [B, V] in the dtype of the hidden states; zeros for a text that is masked whole.
    Raises: ValueError for another model, or one whose head cannot run packed, with the reason.
    """
    cls = type(model)
    if not issubclass(cls, PackedHead):
        raise ValueError(
            f"bert_fast.splade: {cls.__name__} is no masked-LM model that "
            "bert_fast.accelerate has taken"
        )
    row, backend = cls.bert_fast_head, options_of(model).backend
    if why := reasons_against_head(model, row) or reasons_against_now():
        raise ValueError(f"bert_fast.splade: {'; '.join(why)}")
    given = arguments(cls, args, kwargs)
    given.pop("return_dict", None)
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"bert_fast.splade: attention_mask has shape {tuple(mask.shape)}, expected [B, S]"
        )
    states = _states(encoder_of(model)(**given, **{AS_PACKED: True}, return_dict=True))
    packing, h = states.packing, states.h
    bounds = packing.cu_seqlens
    if mask is not None and (packing.indices is None or packing.key_start is not None):
        # Rows that are packed but masked: a first column, or padding of transformers' own forward.
        real = mask.bool()
        h = ops.unpad(h, packing.unpad_ids(real).nonzero().flatten())
        bounds = F.pad(real.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    x, weight, bias = _operands(row.parts(model), h, backend)
    return ops.splade(x, weight, bias, bounds, chosen(backend, "splade"))


def _operands(parts: HeadParts, h: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    """What the decoder multiplies, its weight and its bias, in one dtype."""
    x = _transformed(parts, h, backend)
    return cast(x, parts.decoder.weight, parts.decoder.bias)


def _transformed(parts: HeadParts, h: Tensor, backend: Backend) -> Tensor:
    """LayerNorm(activation(dense(h))) [rows, H] -> [rows, E]."""
    y = activated_linear(parts.dense, parts.activation, h, backend)
    return normalized(y, parts.norm, backend)
