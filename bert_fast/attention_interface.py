"""The attention "bert_fast" in transformers' registries, for encoders that are not packed whole.

    bert_fast.register_attention()
    model = AutoModel.from_pretrained(..., attn_implementation="bert_fast")

Each layer unpads its queries, keys and values, attends, and pads again. Cases that the op does not
serve (causal, cross-attention, sliding windows, a cache) go to transformers' own SDPA, and where
the attention's probabilities are asked for, to its eager form.

Of padded positions it computes nothing: under a head whose loss reads them (question answering),
take another.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from . import ops
from .ops.rng import draw_seeds
from .padding import pack_full, pack_mask
from .paths import reasons_against_now

NAME = "bert_fast"
_BEFORE = "_bert_fast_attention_before"


def attention_mask(
    *, mask_function: Any, attention_mask: Tensor | None = None, **rest: Any
) -> Tensor | None:
    """The 2D mask [B, S] as it is, for bidirectional attention; else the mask of SDPA."""
    if mask_function is bidirectional_mask_function and rest["q_length"] == rest["kv_length"]:
        return attention_mask
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **rest)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key, value [B, N, S, D] -> [B, S, N, D]; zeros at padded positions.

    attention_mask: [B, S], non-zero keeps; or a 4D mask, which SDPA is given.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    asked = kwargs.get("output_attentions")
    if eager and (module.config.output_attentions if asked is None else asked):
        mask, scale = _additive(attention_mask, query.dtype), scaling or query.shape[-1] ** -0.5
        return eager(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if (
        causal
        or _may_cross(module)
        or query.shape != key.shape
        or _not_2d(attention_mask)
        or _has_bias(kwargs)
        or reasons_against_now()
    ):
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, length, width = query.shape
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)  # [B, S, 3, N, D]
    if attention_mask is None:
        packing = pack_full(batch, length, query.device)
    else:
        packing = pack_mask(attention_mask)
    out = ops.attention(
        packing.unpad(qkv.flatten(2)).view(-1, 3, heads, width),
        packing.cu_seqlens,
        packing.max_seqlen,
        width**-0.5 if scaling is None else scaling,
        packing.key_start,
        p=dropout,
        seed=draw_seeds(1, query.device) if dropout else None,
    )
    return packing.pad(out.flatten(1)).view(batch, length, heads, width), None


def _may_cross(module: nn.Module) -> bool:
    """Whether its keys may be another sequence's, whose mask says nothing of its queries: a shape
    does not tell where both are as long."""
    decodes = any(getattr(module, name, False) for name in ("is_decoder", "is_cross_attention"))
    return decodes or "Cross" in type(module).__name__


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As eager attention takes it: a 4D mask that is added to the scores."""
    if mask is None or (mask.is_floating_point() and mask.dim() == 4):
        return mask
    keep = mask.bool()[:, None, None, :] if mask.dim() == 2 else mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return zero.where(keep, torch.finfo(dtype).min)


def _not_2d(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() != 2


def _has_bias(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))


def register_attention() -> None:
    """Makes `attn_implementation="bert_fast"` known to transformers, with its mask function.

    Without the second, transformers would hand over no mask at all and padding would be attended.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


class _Before(str):
    """The attention that a model had. Its pickle, read in another process, registers ours there."""

    def __reduce__(self) -> Any:
        return _unpickled, (str(self),)


def _unpickled(name: str) -> _Before:
    register_attention()
    return _Before(name)


def accelerate_attention(model: nn.Module) -> list[str]:
    """Gives `model` the attention "bert_fast", or says why not; `restore_attention` undoes it."""
    before = model.config._attn_implementation
    if before != NAME:
        register_attention()
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            return [f"{type(model).__name__} computes its attention by itself"]
        model.__dict__[_BEFORE] = _Before(before)
    return []


def restore_attention(model: nn.Module) -> None:
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        model.set_attn_implementation(str(before))
